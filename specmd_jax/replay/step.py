"""One visit of a replay. CONTRACT.md is its specification, `tests/reference` its slow twin."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.policies.base import Eviction, Keys, Now, Policies, Use
from specmd_jax.replay import totals as tally
from specmd_jax.replay.demand import Copied, Found, admit, classify, copy_demand, find, row_of, runs_of
from specmd_jax.replay.host_room import room_in_host
from specmd_jax.replay.host_tier import arriving_of, ask, there_of
from specmd_jax.replay.make_room import evict, pick
from specmd_jax.replay.pinning import pins, touched_by
from specmd_jax.replay.prefetching import gather, prefetch, targets_of
from specmd_jax.replay.reading_ahead import read_ahead
from specmd_jax.replay.routing import route
from specmd_jax.replay.spending import InHost, divide, spend
from specmd_jax.replay.state import Cell, Flight, Numbers, Setup, State, Visit
from specmd_jax.replay.totals import Classified, Events, Totals


def step(
    setup: Setup, policies: Policies, numbers: Numbers, state: State, totals: Totals, visit: Visit
) -> tuple[State, Totals, Events]:
    """Replays one visit, in the order of CONTRACT.md section 2."""
    cell, now = Cell(setup, policies, numbers), Now(visit.index, visit.layer, visit.pass_id, setup.layers)
    found, visit = find(state, visit)
    state, visit, rerouted = route(cell, state, visit, found)
    state = state._replace(gate=gather(state.gate, visit.demand, visit))
    row = row_of(numbers, visit, found, state.cache)
    plan = policies.miss.plan(row)
    in_host = None
    if state.host is not None:
        there = there_of(state, visit)
        in_host = InHost(there, state.host.storage_s, arriving_of(state, visit, there))
    if policies.miss.divides:
        plan = divide(cell, state.flight, visit, found, plan, in_host)
    experts = classify(visit, found, plan, state.gate, rerouted)
    state, taken = admit(cell, state, visit, row, experts)
    asked = None
    if in_host is not None:
        host, asked = ask(cell, state, visit, now, experts, plan, taken, in_host.there, in_host.arriving)
        state = state._replace(host=host)
    cache, copied = copy_demand(cell, state.cache, state.held, visit, found, experts, plan, taken)
    state = _observe(cell, state._replace(cache=cache), visit, now, found, experts, copied)
    runs = runs_of(visit, experts, plan)
    spent = spend(cell, state.flight, visit, experts, copied, runs, in_host)
    line, gate_s, visit_s, host_s, clock, reads, copied_s = spent
    if state.host is not None and reads is not None:
        state = state._replace(host=state.host._replace(storage_s=reads.storage_s))

    flight = state.flight._replace(link_s=line.link_s)
    started = jnp.zeros((setup.horizon, setup.experts), jnp.int32)
    behind = ahead = None
    if policies.prefetch is not None and asked is not None and state.host is not None and state.host.early is not None:
        state, ahead = read_ahead(cell, state, visit, now, gate_s, asked)
    elif policies.prefetch is not None:
        state, flight, started, behind = prefetch(
            cell, state, visit, now, flight, gate_s, copied, clock, asked, copied_s
        )
    flight = flight._replace(link_s=clock(flight.link_s))
    # with nothing in flight any layer will do, but a real one: row -1 would be searched as another name of the last
    flight_layer = state.flight.layer_of(setup.experts, visit.layer)
    held, arrivals = state.cache.level, taken & (found.level == 0)
    state, evictions = _make_room(cell, state, visit, now, copied, arrivals, started, flight_layer)
    admitted = None
    if policies.selective:
        admitted = taken & (state.cache.level[visit.layer].astype(jnp.int32) == copied.level)

    link_s, left_s = flight.link_s - state.flight.link_s, jnp.maximum(flight.link_s - gate_s, 0.0)
    copies = jnp.sum(started > 0, axis=1, dtype=jnp.int32)
    tier = None
    if asked is not None:
        if reads is not None and reads.copying_s is not None:
            link_s = reads.copying_s + (jnp.float32(0) if behind is None else behind.copying_s)
        else:
            link_s = _copying(cell, visit, experts, copied, copies)
        state, tier = room_in_host(cell, state, visit, now, asked, held, started, reads, behind, ahead, gate_s)
    seconds = jnp.stack([visit_s, line.late_s, line.miss_s, line.busy_s, link_s, host_s])
    totals = tally.add(
        totals,
        layer=visit.layer,
        counted=visit.counted,
        decode=visit.decode,
        experts=experts,
        level=copied.level,
        runs=runs,
        evictions=evictions,
        prefetched=jnp.zeros(setup.layers, jnp.int32).at[targets_of(setup, visit.layer)].add(copies),
        mass=visit.mass,
        seconds=seconds,
        admitted=admitted,
    )
    if totals.tier is not None and tier is not None:
        targets = targets_of(setup, visit.layer)
        sums = tally.add_tier(
            totals.tier, tier, layer=visit.layer, targets=targets, counted=visit.counted, decode=visit.decode
        )
        totals = totals._replace(tier=sums)
    full = setup.detail == "full"
    events = Events(
        outcome=experts.outcome,
        collision=experts.collisions,
        evictions=evictions,
        seconds=seconds,
        prefetched=started if policies.prefetch is not None else None,
        level=state.cache.level if full else None,
        row=copied.level.astype(jnp.int8) if full else None,
        instead=jnp.where(experts.substituted, plan.instead, -1) if full else None,
        count=visit.count if full and policies.routing is not None else None,
        mass=visit.mass if full and policies.routing is not None else None,
        taken=taken if full else None,
        stream=copied.stream if full else None,
        tier=tier,
    )
    flight = Flight(left_s, jnp.where(left_s > 0, flight.expert, -1), flight_layer)
    return state._replace(clock=state.clock + 1, layer=visit.layer, flight=flight), totals, events


def _observe(
    cell: Cell, state: State, visit: Visit, now: Now, found: Found, experts: Classified, copied: Copied
) -> State:
    """Lets the eviction policy see the visit; what was prefetched and is demanded now is fresh no more."""
    setup, policies, numbers = cell
    layer, demand, levels = visit.layer, experts.demand, numbers.units.shape[0] - 1
    clock = state.clock + jnp.sum(demand, dtype=jnp.int32)
    use = Use(
        now=now,
        demand=demand,
        touch=state.clock + visit.rank,
        mass=visit.mass,
        hit=experts.hit,
        loaded=experts.fetched,
        top=demand & (copied.level == levels),
        next_use=visit.next_use,
        end_touch=clock,
        pool=jnp.ones(setup.layers, bool) if numbers.pooled else jnp.arange(setup.layers) == layer,
        budget=numbers.budget_of(layer),
        units=jnp.take_along_axis(numbers.units.T, state.cache.level.astype(jnp.int32), axis=1),
    )
    return state._replace(
        clock=clock,
        eviction=policies.eviction.observe(state.eviction, use),
        fresh=state.fresh.at[layer].set(jnp.where(demand, 0, found.fresh)),
    )


def _make_room(
    cell: Cell,
    state: State,
    visit: Visit,
    now: Now,
    copied: Copied,
    arrivals: Bool[Array, " E"],
    started: Int32[Array, "H E"],
    flight_layer: Int32[Array, ""],
) -> tuple[State, Int32[Array, " L"]]:
    """Evicts until each pool that was copied into holds no more than its budget; also the evictions, [L] int32.

    Args:
      arrivals: [E], absent experts of the visited layer that were copied and let in.
      started: [H, E] int32, above 0 for the prefetch copies of this visit.
      flight_layer: scalar, of the copy that is in flight at the visit's gate.
    """
    setup, policies, numbers = cell
    layer, targets = visit.layer, targets_of(setup, visit.layer)
    pinned_demand = visit.demand & ~copied.stream & (not policies.competes)
    kept = None if state.held is None else state.held.which
    touched, also = touched_by(cell, state, visit, targets, state.flight.pinned_layer, flight_layer)
    policy, memory = policies.eviction, state.eviction
    if policies.admission is not None and policies.admission.gain is not None:
        new = jnp.zeros(state.cache.level.shape, bool).at[layer].set(arrivals)
        policy, memory = _handicapped(policy, policies.admission.gain), (memory, new)
    cache, evictions = evict(
        policy,
        memory,
        state.cache,
        now=now,
        units=numbers.units,
        budget=numbers.budget,
        pinned=pins(cell, state.flight, visit, pinned_demand, copied.stream, started, kept),
        touched=touched,
        also=also,
        pools=(jnp.arange(setup.layers) == layer).at[targets].max(jnp.any(started > 0, axis=1)),
        starts_pass=visit.starts_pass,
    )
    return state._replace(cache=cache), evictions


def _handicapped(policy: Eviction, gain: float | int | Array) -> Eviction:
    """Takes `gain` off the first keep-score of experts that are marked beside the policy's own memory."""

    def keep(entries: tuple[Any, Bool[Array, " *at"]], now: Now, layer: Int32[Array, " *layers"]) -> Keys:
        own, new = entries
        first, *rest = policy.keep(own, now, layer)
        less = jnp.asarray(gain, jnp.float32)
        less = less if jnp.issubdtype(first.dtype, jnp.floating) else jnp.round(less).astype(first.dtype)
        return (first - jnp.where(new, less, jnp.zeros((), first.dtype)), *rest)

    return policy._replace(keep=keep)


def _copying(
    cell: Cell, visit: Visit, experts: Classified, copied: Copied, ahead: Int32[Array, " H"]
) -> Float32[Array, ""]:
    """Gives the seconds that the host link copies: behind reads it may wait between two copies."""
    costs = cell.numbers.costs
    if costs is None:
        return jnp.float32(0)
    own_s = pick(costs.copy_s[:, visit.layer], jnp.maximum(copied.level - 1, 0))
    ahead_s = ahead.astype(jnp.float32) * costs.copy_s[-1, targets_of(cell.setup, visit.layer)]
    return jnp.sum(jnp.where(experts.fetched, own_s, 0.0)) + jnp.sum(ahead_s)
