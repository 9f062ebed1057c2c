"""One visit of a replay. CONTRACT.md is its specification, `tests/reference` its slow twin.

`Setup` and the policies' code are static (one compile each); everything in `Numbers` and every number a policy is
closed over is traced, so a `vmap` over any of them is a sweep. State that does not depend on a swept number stays
unbatched: under a vmap over capacities the recency table of `lru` is one table, and under a vmap over hardware a
residency without prefetch is one residency.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.loops import anywhere
from specmd_jax.policies.base import (
    Arrival,
    Gate,
    Now,
    Plan,
    Policies,
    Prefetch,
    Routing,
    Row,
    Selection,
    Size,
    Start,
    Use,
)
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay import totals as tally
from specmd_jax.replay.make_room import Cache, evict, pick
from specmd_jax.replay.timing import Costs, Timeline, roofline, timeline
from specmd_jax.replay.totals import Classified, Events, Totals


class Setup(NamedTuple):
    """Static choices: they decide shapes and code (hashable)."""

    layers: int
    experts: int
    top_k: int
    hold: bool = False  # oversize="hold" instead of "stream"
    horizon: int = 1
    may_evict: bool = True  # prefetching may make room
    timed: bool = True  # False: no seconds, and prefetching is not limited by time
    resets: bool = False  # the schedule empties the cache somewhere
    detail: str = "totals"  # "events": also Events of each visit; "full": with the residency after each


class Numbers(NamedTuple):
    """Everything numeric that is not a policy's own."""

    budget: jax.Array  # int32 units: a scalar for one pool, [L] for a pool a layer
    units: jax.Array  # [Q + 1, L] int32: what an expert takes at each level; row 0 (absent) is 0
    first_use: jax.Array  # [L, E] int32
    costs: Costs | None = None  # None only when `Setup.timed` is False


class Visit(NamedTuple):
    """One visit; a stretch of a schedule has a leading V axis on every leaf. Meanings as in `types.Schedule`."""

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layer: jax.Array
    pass_id: jax.Array
    tokens: jax.Array
    decode: jax.Array  # bool
    starts_pass: jax.Array
    ends_layer: jax.Array
    reset: jax.Array
    counted: jax.Array
    count: jax.Array  # [E]  # pyright: ignore[reportIncompatibleMethodOverride]
    mass: jax.Array  # [E]
    rank: jax.Array  # [E]
    next_use: jax.Array  # [E]
    by_mass: jax.Array  # [M]
    ahead: jax.Array | None = None  # [E]
    future: jax.Array | None = None  # [H, E]
    logits: jax.Array | None = None  # [T, E]


class Flight(NamedTuple):
    """The host link as the next gate finds it. At most one copy can be in flight at a gate: the last one started."""

    link_s: jax.Array  # float32: seconds from the gate until the link is free
    expert: jax.Array  # int32 flat id of the copy in flight (-1: none)
    pinned_layer: jax.Array  # int32: where the previous visit's copy in flight pinned an expert


class Open(NamedTuple):
    """The demand of a (pass, layer), gathered over its visits: one in the event contract, one an expert in the
    sequential ones.
    """

    demand: jax.Array  # [E] bool
    mass: jax.Array  # [E] float32
    closed: jax.Array  # bool: complete


class State(NamedTuple):
    """What the next visit needs."""

    cache: Cache
    clock: jax.Array  # int32: demanded experts so far, plus visits
    layer: jax.Array  # int32: the previous visit's
    gate: Open
    flight: Flight
    eviction: Any
    prefetch: Any
    selection: Any
    routing: Any
    fresh: jax.Array  # [L, E] int8: came in by prefetch and is unused; 1 outside, 2 inside the counted visits
    predicted: jax.Array  # [L, E] bool: the last selection for each layer


def begin(setup: Setup, policies: Policies, numbers: Numbers) -> State:
    """The state before the first visit: an empty cache."""
    shape = setup.layers, setup.experts
    size = Size(*shape, setup.horizon)
    prefetch, selection, routing = policies.prefetch, policies.selection, policies.routing
    return State(
        cache=Cache(
            level=jnp.zeros(shape, jnp.int8),
            used=jnp.zeros(setup.layers, jnp.int32),
            best=jnp.full(setup.layers, -1, jnp.int32),
            evicted=jnp.full(shape, -1, jnp.int32),
        ),
        clock=jnp.int32(0),
        layer=jnp.int32(0),
        gate=Open(jnp.zeros(setup.experts, bool), jnp.zeros(setup.experts), jnp.asarray(True)),
        flight=Flight(jnp.float32(0), jnp.int32(-1), jnp.int32(0)),
        eviction=policies.eviction.init(Start(numbers.first_use)),
        prefetch=prefetch.init(size) if prefetch else (),
        selection=selection.init(size) if selection else (),
        routing=routing.init(setup.layers) if routing else (),
        fresh=jnp.zeros(shape, jnp.int8),
        predicted=jnp.zeros(shape, bool),
    )


def empty(setup: Setup, policies: Policies, numbers: Numbers, old: State) -> State:
    """A new beginning: all but the time, the link's last copy, and what an oracle knows of the future."""
    state = begin(setup, policies, numbers)
    eviction = old.eviction if policies.eviction.oracle else state.eviction
    return state._replace(eviction=eviction, flight=state.flight._replace(link_s=old.flight.link_s), layer=old.layer)


def step(
    setup: Setup, policies: Policies, numbers: Numbers, state: State, totals: Totals, visit: Visit
) -> tuple[State, Totals, Events]:
    """One visit, in the order of CONTRACT.md section 2."""
    layer, cache = visit.layer, state.cache
    ids = jnp.arange(setup.experts, dtype=jnp.int32)
    now = Now(visit.index, layer, visit.pass_id, setup.layers)
    levels = numbers.units.shape[0] - 1
    flying = (state.flight.expert == layer * setup.experts + ids) & (state.flight.link_s > 0)

    # routing, classification, miss rule
    routing, visit, rerouted = _route(setup, policies.routing, state, visit)
    demand = visit.count > 0
    # the visited rows are read here and nowhere else: what is read later could not be overwritten in place
    before, fresh, evicted, predicted = jax.lax.optimization_barrier(
        (cache.level[layer], state.fresh[layer], cache.evicted[layer], state.predicted[layer])
    )
    before = before.astype(jnp.int32)
    plan = policies.miss.plan(_row(visit, before, flying, levels))
    hit = demand & (before > 0) & (before >= plan.need)
    miss = demand & ~hit
    fetched = miss & (plan.fetch > 0)
    substituted = miss & ~fetched & (plan.instead >= 0)
    host = miss & ~fetched & ~substituted & plan.host
    late = hit & flying
    closing = visit.ends_layer
    gate = gather(state.gate, demand, visit)
    predicted &= closing
    experts = Classified(
        demand=demand,
        reused=hit & ~late & (fresh == 0),
        prefetch_hits=hit & ~late & (fresh > 0),
        late=late,
        fetched=fetched,
        dropped=miss & ~fetched & ~substituted & ~host,
        substituted=substituted,
        host=host,
        collisions=miss & (evicted == visit.pass_id),
        prefetch_used=hit & (fresh == 2),
        rerouted=rerouted,
        predicted=predicted,
        predicted_right=predicted & gate.demand,
    )

    # demand copies
    level = jnp.where(fetched, plan.fetch, before)
    row_units = pick(numbers.units[:, layer], level)
    cache = cache._replace(
        level=cache.level.at[layer].set(level.astype(jnp.int8)), used=cache.used.at[layer].set(jnp.sum(row_units))
    )
    demand_units = jnp.sum(jnp.where(demand, row_units, 0))
    budget = numbers.budget[layer] if numbers.budget.ndim else numbers.budget
    stream = (demand_units > budget) & (not setup.hold)

    # the policies observe
    clock = state.clock + jnp.sum(demand, dtype=jnp.int32)
    pool = jnp.arange(setup.layers) == layer if numbers.budget.ndim else jnp.ones(setup.layers, bool)
    use = Use(
        now=now,
        demand=demand,
        touch=state.clock + visit.rank,
        mass=visit.mass,
        hit=hit,
        loaded=fetched & (before == 0),
        top=demand & (level == levels),
        next_use=visit.next_use,
        end_touch=clock,
        pool=pool,
        budget=budget,
        units=jnp.take_along_axis(numbers.units.T, cache.level.astype(jnp.int32), axis=1),
    )
    state = state._replace(cache=cache, clock=clock, gate=gate, eviction=policies.eviction.observe(state.eviction, use))
    state = state._replace(fresh=state.fresh.at[layer].set(jnp.where(demand, 0, fresh)))

    # the visit's own time
    runs = _runs(visit, experts, plan)
    line, gate_s = _spend(setup, numbers, state.flight, visit, experts, level, runs, stream)

    # prefetch copies
    flight = state.flight._replace(link_s=line.link_s)
    started = jnp.zeros((setup.horizon, setup.experts), jnp.int32)
    targets = targets_of(setup, layer)
    if policies.prefetch is not None:
        held = jnp.where(policies.eviction.bypass, 0, demand_units)
        pinned_units = _pinned_units(numbers, state, layer, demand & (not policies.eviction.bypass), held)
        state, flight, started = _prefetch(
            setup, policies, numbers, state, visit, now, flight, gate_s, pinned_units, stream
        )

    # evict
    # with nothing in flight any layer will do, but a real one: row -1 would be searched as another name of the last
    flight_layer = jnp.where(state.flight.expert < 0, layer, state.flight.expert // setup.experts)
    pinned_demand = demand & ~stream & (not policies.eviction.bypass)

    def pinned(row: jax.Array) -> jax.Array:
        in_flight = (state.flight.expert == row * setup.experts + ids) & (state.flight.link_s > 0) & ~stream
        distance = row - layer - 1
        distance += jnp.where(distance < 0, setup.layers, 0)
        just_started = jnp.any((distance == jnp.arange(setup.horizon))[:, None] & (started > 0), axis=0)
        return ((row == layer) & pinned_demand) | in_flight | just_started

    touched, also = jnp.stack([state.layer, layer]), jnp.zeros(0, jnp.int32)
    if policies.prefetch is not None:
        touched = jnp.concatenate([touched, targets])
        also = jnp.stack([state.flight.pinned_layer, flight_layer])
    cache, evictions = evict(
        policies.eviction,
        state.eviction,
        state.cache,
        now=now,
        units=numbers.units,
        budget=numbers.budget,
        pinned=pinned,
        touched=touched,
        also=also,
        pools=(jnp.arange(setup.layers) == layer).at[targets].max(jnp.any(started > 0, axis=1)),
        starts_pass=visit.starts_pass,
    )

    left_s = jnp.maximum(flight.link_s - gate_s, 0.0)
    seconds = jnp.stack([gate_s, line.late_s, line.miss_s, line.busy_s, flight.link_s - state.flight.link_s])
    at_level = level == jnp.arange(1, levels + 1)[:, None]
    totals = tally.add(
        totals,
        layer=layer,
        counted=visit.counted,
        decode=visit.decode,
        experts=experts,
        fetched_at=fetched & at_level,
        runs_at=(runs > 0) & at_level,
        evictions=evictions,
        prefetched=jnp.zeros(setup.layers, jnp.int32).at[targets].add(jnp.sum(started > 0, axis=1, dtype=jnp.int32)),
        mass=visit.mass,
        seconds=seconds,
    )
    full = setup.detail == "full"
    events = Events(
        outcome=experts.outcome,
        collision=experts.collisions,
        evictions=evictions,
        seconds=seconds,
        prefetched=started if policies.prefetch is not None else None,
        level=cache.level if full else None,
        row=level.astype(jnp.int8) if full else None,
        instead=jnp.where(substituted, plan.instead, -1) if full else None,
    )
    flight = Flight(left_s, jnp.where(left_s > 0, flight.expert, -1), flight_layer)
    return state._replace(cache=cache, clock=clock + 1, layer=layer, flight=flight, routing=routing), totals, events


def _route(setup: Setup, routing: Routing | None, state: State, visit: Visit) -> tuple[Any, Visit, jax.Array]:
    """Lets the routing policy change the demand; also which experts ([E] bool) are demanded only because of it."""
    if routing is None:
        return state.routing, visit, jnp.zeros(setup.experts, bool)
    assert visit.logits is not None
    memory, adjusted = routing.adjust(state.routing, visit.layer, visit.logits, state.cache.level[visit.layer] > 0)
    valid = ~jnp.isnan(visit.logits[:, 0])  # [T]
    chosen = jax.lax.top_k(jnp.where(valid[:, None], adjusted, NO), setup.top_k)[1]  # [T, K]
    gates = jax.nn.softmax(jnp.take_along_axis(visit.logits, chosen, axis=1), axis=1)
    # a token's experts weigh by the original logits, so its gate order is that of the original logits too
    order = jnp.argsort(-gates, axis=1, stable=True)
    chosen, gates = jnp.take_along_axis(chosen, order, axis=1), jnp.take_along_axis(gates, order, axis=1)
    flat = jnp.where(valid[:, None], chosen, -1).reshape(-1)  # [T * K] token-major gate order
    routed = flat[:, None] == jnp.arange(setup.experts)  # [T * K, E]
    count = jnp.sum(routed, axis=0, dtype=jnp.int32)
    mass = jnp.sum(jnp.where(routed, gates.reshape(-1)[:, None], 0.0), axis=0)
    position = jnp.max(jnp.where(routed, jnp.arange(flat.shape[0])[:, None], -1), axis=0)
    rank = jnp.sum((position[:, None] > position) & (position >= 0), axis=1, dtype=jnp.int32)
    by_mass = jnp.argsort(jnp.where(count > 0, -mass, jnp.inf), stable=True)[: visit.by_mass.shape[0]].astype(jnp.int32)
    by_mass = jnp.where(count[by_mass] > 0, by_mass, -1)
    rerouted = (count > 0) & (visit.count == 0)
    return (
        memory,
        visit._replace(count=count, mass=mass, rank=jnp.where(count > 0, rank, -1), by_mass=by_mass),
        rerouted,
    )


def _row(visit: Visit, level: jax.Array, flying: jax.Array, levels: int) -> Row:
    """The visited layer as the miss rule sees it."""
    ids = jnp.arange(level.shape[0])
    matches = visit.by_mass[:, None] == ids  # [M, E]
    order = jnp.sum(jnp.where(matches, jnp.arange(visit.by_mass.shape[0])[:, None], 0), axis=0, dtype=jnp.int32)
    probability = None
    if visit.logits is not None:
        probability = jnp.where(visit.tokens == 1, jax.nn.softmax(visit.logits[0]), jnp.nan)
    return Row(visit.count > 0, level, (level > 0) & ~flying, visit.mass, order, probability, levels)


def gather(gate: Open, demand: jax.Array, visit: Visit) -> Open:
    """The open demand of a (pass, layer) with that of a visit; a closed one gives way."""
    return Open(
        jnp.where(gate.closed, demand, gate.demand | demand),
        jnp.where(gate.closed, visit.mass, gate.mass + visit.mass),
        visit.ends_layer,
    )


def targets_of(size: Setup | Size, layer: jax.Array) -> jax.Array:
    """[H] int32: the next layers, wrapping into the next pass."""
    return jnp.mod(layer + 1 + jnp.arange(size.horizon, dtype=jnp.int32), size.layers)


def foresee(
    prefetch: Prefetch, selection: Selection, memories: tuple[Any, Any], gate: Gate, size: Size, closing: jax.Array
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Lets the predictor and the selection see a gate: their new memories, want-scores and what is selected, [H, E]
    both. Nothing is selected before the layer closes.
    """
    before, memory = memories
    learned = jax.lax.cond(closing, lambda old: prefetch.observe(old, gate), lambda old: old, before)
    want = prefetch.want(learned, gate, size)
    memory, selected = selection.select(memory, want, targets_of(size, gate.now.layer), closing)
    return learned, memory, want, selected


def _runs(visit: Visit, experts: Classified, plan: Plan) -> jax.Array:
    """[E] int32: tokens each expert computes on the device."""
    kept = experts.demand & ~experts.dropped & ~experts.substituted & ~experts.host
    moved = jnp.where(experts.substituted, visit.count, 0)
    at = plan.instead[:, None] == jnp.arange(moved.shape[0])
    # a token that loses several experts to one stand-in runs it once
    extra = jnp.minimum(jnp.sum(jnp.where(at, moved[:, None], 0), axis=0, dtype=jnp.int32), visit.tokens)
    return jnp.where(kept, visit.count, 0) + extra


def _spend(
    setup: Setup,
    numbers: Numbers,
    flight: Flight,
    visit: Visit,
    experts: Classified,
    level: jax.Array,
    runs: jax.Array,
    stream: jax.Array,
) -> tuple[Timeline, jax.Array]:
    """The visit's timeline and the time of the next gate, both in seconds from this one."""
    if not setup.timed:
        zero = jnp.float32(0)
        return Timeline(zero, zero, zero, zero, zero), zero
    costs, layer = numbers.costs, visit.layer
    assert costs is not None
    at = jnp.maximum(level - 1, 0)
    compute_s = roofline(runs, costs.expert_flop_s[layer], pick(costs.expert_read_s[:, layer], at), costs.launch_s)
    copy_s = jnp.where(experts.fetched, pick(costs.copy_s[:, layer], at), 0.0)
    host_s = roofline(
        jnp.where(experts.host, visit.count, 0), costs.host_flop_s[layer], costs.host_read_s[layer], jnp.float32(0)
    )
    # copies go by falling gate mass, or in id order when the demand does not fit; experts that run in another's place
    # come last
    by_mass = jnp.where(visit.by_mass < 0, setup.experts, visit.by_mass)
    by_id = jnp.sort(by_mass)

    def take(row: jax.Array) -> jax.Array:  # in both orders: neither depends on what is swept, unlike the choice
        found = jnp.take(row, jnp.stack([by_id, by_mass]), mode="fill", fill_value=0)
        return jnp.where(stream, found[0], found[1])

    extra_s = jnp.sum(jnp.where(experts.demand, 0.0, compute_s))
    line = timeline(take(compute_s), take(copy_s), take(experts.late), extra_s, jnp.sum(host_s), flight.link_s)
    dense_s = roofline(visit.tokens, costs.dense_flop_s[layer], costs.dense_read_s[layer], costs.launch_s)
    return line, line.done_s + jnp.where(visit.ends_layer, dense_s, 0.0)


def _pinned_units(
    numbers: Numbers, state: State, layer: jax.Array, demand: jax.Array, demand_units: jax.Array
) -> jax.Array:
    """[L] int32: what the pinned demand and the copy in flight hold in each layer."""
    experts = demand.shape[0]
    flight_layer, expert = state.flight.expert // experts, state.flight.expert % experts
    apart = (state.flight.link_s > 0) & (state.flight.expert >= 0) & ~((flight_layer == layer) & demand[expert])
    held = jnp.where(apart, numbers.units[state.cache.level[flight_layer, expert].astype(jnp.int32), flight_layer], 0)
    layers = jnp.arange(numbers.units.shape[1])
    return jnp.where(layers == layer, demand_units, 0) + jnp.where(layers == flight_layer, held, 0)


def _prefetch(
    setup: Setup,
    policies: Policies,
    numbers: Numbers,
    state: State,
    visit: Visit,
    now: Now,
    flight: Flight,
    gate_s: jax.Array,
    pinned_units: jax.Array,
    stream: jax.Array,
) -> tuple[State, Flight, jax.Array]:
    """Predicts, selects and starts copies until the next gate; also the order in which they started, [H, E] int32 from
    1.
    """
    prefetch, selection = policies.prefetch, policies.selection
    assert prefetch is not None and selection is not None
    size = Size(setup.layers, setup.experts, setup.horizon)
    rows, closing = targets_of(setup, visit.layer), visit.ends_layer
    gate = Gate(now, state.gate.demand, state.gate.mass, visit.ahead, visit.future)
    memories = state.prefetch, state.selection
    learned, memory, want, selected = foresee(prefetch, selection, memories, gate, size, closing)
    cache, top = state.cache, numbers.units.shape[0] - 1
    whole = numbers.budget.ndim == 0

    def room(held: jax.Array, row: jax.Array, extra: jax.Array) -> jax.Array:
        return jnp.sum(held) + extra <= numbers.budget if whole else held[row] + extra <= numbers.budget[row]

    class Queue(NamedTuple):
        wanted: jax.Array  # [H, E] want-score, -inf: not, or no longer
        started: jax.Array  # [H, E] int32
        pinned: jax.Array  # [L] int32 units
        used: jax.Array  # [L] int32 units
        flight: Flight

    flat = jnp.arange(setup.horizon * setup.experts, dtype=jnp.int32).reshape(setup.horizon, setup.experts)

    def serve(queue: Queue) -> Queue:
        most = jnp.max(queue.wanted)
        index = jnp.min(jnp.where(queue.wanted == most, flat, flat.size - 1))  # of equals: nearer layer, lower id
        row = rows[index // setup.experts]
        units = numbers.units[top, row]
        in_time = queue.flight.link_s < gate_s if setup.timed else jnp.asarray(True)
        fits = room(queue.pinned, row, units)
        if not setup.may_evict:
            fits &= room(queue.used, row, units)
        go = (most > NO) & in_time & fits
        taken = jnp.where((jnp.arange(setup.layers) == row) & go, units, 0)
        copy_s = numbers.costs.copy_s[top - 1, row] if numbers.costs is not None else jnp.float32(0)
        # masks, not writes at an index: under vmap those would be loops over the batch
        return Queue(
            wanted=jnp.where((flat != index) & in_time, queue.wanted, NO),
            started=jnp.where((flat == index) & go, jnp.max(queue.started) + 1, queue.started),
            pinned=queue.pinned + taken,
            used=queue.used + taken,
            flight=queue.flight._replace(
                link_s=queue.flight.link_s + jnp.where(go, copy_s, 0.0),
                expert=jnp.where(go, row * setup.experts + index % setup.experts, queue.flight.expert),
            ),
        )

    wanted = jnp.where(selected & (cache.level[rows] == 0) & ~stream, want, NO)
    queue = Queue(wanted, jnp.zeros(want.shape, jnp.int32), pinned_units, cache.used, flight)
    queue = jax.lax.while_loop(lambda q: anywhere(jnp.any(q.wanted > NO)), serve, queue)

    started = queue.started > 0
    arrival = Arrival(
        rows=rows,
        selected=selected,
        arrived=started,
        touch=state.clock,
        visit=visit.index,
        pass_id=visit.pass_id + (rows <= visit.layer),
    )
    state = state._replace(
        cache=cache._replace(
            level=cache.level.at[rows].set(jnp.where(started, jnp.int8(top), cache.level[rows])), used=queue.used
        ),
        eviction=policies.eviction.arrive(state.eviction, arrival),
        prefetch=learned,
        selection=memory,
        fresh=state.fresh.at[rows].set(jnp.where(started, 1 + visit.counted.astype(jnp.int8), state.fresh[rows])),
        predicted=state.predicted.at[rows].set(jnp.where(closing, selected, state.predicted[rows])),
    )
    return state, queue.flight, queue.started
