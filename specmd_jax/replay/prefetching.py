"""Prefetch copies: what is foreseen at a gate, and which of it starts before the next one (CONTRACT.md section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int8, Int32

from specmd_jax.loops import anywhere
from specmd_jax.policies.base import Arrival, Gate, Now, Prefetch, Selection, Size
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.demand import Copied
from specmd_jax.replay.host_tier import Asked, copied_ahead, parts
from specmd_jax.replay.state import Cell, Flight, Numbers, Open, Setup, State, Visit


class Behind(NamedTuple):
    """What the copies that have started did to the tier behind them."""

    read: Bool[Array, "H E"]  # were read first
    storage_s: Float32[Array, ""]  # seconds from the gate until the storage link is free
    copying_s: Float32[Array, ""]  # that the host link copies them
    pinned: Int32[Array, " L"]  # units of host memory
    used: Int32[Array, " L"]


class Queue(NamedTuple):
    """The wanted copies, or reads, and those that have started."""

    wanted: Float32[Array, "H E"]  # want-score, -inf: not, or no longer
    started: Int32[Array, "H E"]  # 1, 2, ... in the order of starting; 0: not
    pinned: Int32[Array, " L"]  # units
    used: Int32[Array, " L"]  # units
    flight: Flight
    behind: Behind | None = None  # with a host tier
    skipped: Bool[Array, "H E"] | None = None  # had time and no room; None: nobody asks


class Foreseen(NamedTuple):
    """What a gate foresees."""

    rows: Int32[Array, " H"]  # target layers
    want: Float32[Array, "H E"]
    selected: Bool[Array, "H E"]
    prefetch: Any  # what the predictor then remembers
    selection: Any


def targets_of(size: Setup | Size, layer: Int32[Array, ""]) -> Int32[Array, " H"]:
    """Gives the next layers, wrapping into the next pass."""
    return jnp.mod(layer + 1 + jnp.arange(size.horizon, dtype=jnp.int32), size.layers)


def gather(gate: Open, demand: Bool[Array, " E"], visit: Visit) -> Open:
    """Joins the open demand of a (pass, layer) with that of a visit; a closed one gives way."""
    return Open(
        jnp.where(gate.closed, demand, gate.demand | demand),
        jnp.where(gate.closed, visit.mass, gate.mass + visit.mass),
        visit.ends_layer,
    )


def foresee(
    prefetch: Prefetch,
    selection: Selection,
    memories: tuple[Any, Any],
    gate: Gate,
    size: Size,
    closing: Bool[Array, ""],
) -> tuple[Any, Any, Float32[Array, "H E"], Bool[Array, "H E"]]:
    """Lets the predictor and the selection see a gate: their new memories, want-scores and what is selected, [H, E]
    both. Nothing is selected before the layer closes.
    """
    before, memory = memories
    learned = jax.lax.cond(closing, lambda old: prefetch.observe(old, gate), lambda old: old, before)
    want = prefetch.want(learned, gate, size)
    memory, selected = selection.select(memory, want, targets_of(size, gate.now.layer), closing)
    return learned, memory, want, selected


def look_ahead(cell: Cell, state: State, visit: Visit, now: Now) -> Foreseen:
    """Predicts and selects."""
    setup, policies, _ = cell
    assert policies.prefetch is not None and policies.selection is not None
    gate = Gate(now, state.gate.demand, state.gate.mass, visit.ahead, visit.future)
    size = Size(setup.layers, setup.experts, setup.horizon)
    learned, memory, want, selected = foresee(
        policies.prefetch, policies.selection, (state.prefetch, state.selection), gate, size, visit.ends_layer
    )
    return Foreseen(targets_of(setup, visit.layer), want, selected, learned, memory)


def arrivals(state: State, visit: Visit, foreseen: Foreseen, arrived: Bool[Array, "H E"]) -> Arrival:
    """Gives a visit's prefetching as policies see it."""
    return Arrival(
        rows=foreseen.rows,
        selected=foreseen.selected,
        arrived=arrived,
        touch=state.clock,
        visit=visit.index,
        pass_id=visit.pass_id + (foreseen.rows <= visit.layer).astype(jnp.int32),
    )


def told(cell: Cell, state: State, visit: Visit, foreseen: Foreseen, arrival: Arrival) -> State:
    """Lets predictor, selection and the device's eviction policy remember what has been foreseen."""
    rows, closing = foreseen.rows, visit.ends_layer
    return state._replace(
        eviction=cell.policies.eviction.arrive(state.eviction, arrival),
        prefetch=foreseen.prefetch,
        selection=foreseen.selection,
        predicted=state.predicted.at[rows].set(jnp.where(closing, foreseen.selected, state.predicted[rows])),
    )


def prefetch(
    cell: Cell,
    state: State,
    visit: Visit,
    now: Now,
    flight: Flight,
    gate_s: Float32[Array, ""],
    copied: Copied,
    clock: Callable[[Float32[Array, ""]], Float32[Array, ""]],
    asked: Asked | None = None,
    copied_s: Callable[[Float32[Array, ""], Float32[Array, ""]], Float32[Array, ""]] | None = None,
) -> tuple[State, Flight, Int32[Array, "H E"], Behind | None]:
    """Predicts, selects and starts copies until the next gate.

    Args:
      state: behind the demand copies; its `flight` is that of the visit's own gate.
      flight: behind the demand copies; the seconds of its link, here and as returned, are work, whatever disturbs it.
      gate_s: seconds until the next gate.
      clock: work of the link -> seconds from the gate.
      asked: of the host tier, where there is one; its `storage_s` is then that behind the visit's reads.
      copied_s: as `spending.Spent` has it.

    Returns:
      The state with what was started resident, the link's state, the order of starting, [H, E] int32 from 1 (0: not
      started), and what it did to the tier behind.
    """
    setup, policies, numbers = cell
    foreseen = look_ahead(cell, state, visit, now)
    rows, want, selected = foreseen.rows, foreseen.want, foreseen.selected
    cache = state.cache
    wanted = jnp.where(selected & (cache.level[rows] == 0) & ~copied.stream, want, NO)
    demand = visit.demand & (not policies.competes)
    demand_units = jnp.where(policies.competes, 0, copied.units)
    pinned = pinned_units(numbers, state.flight, visit.layer, demand, demand_units, cache.level)
    if state.held is not None and copied.pinned_units is not None:
        twice = jnp.where(policies.competes, 0, copied.pinned_units)  # demanded, and kept by pins
        pinned += state.held.units - jnp.where(jnp.arange(setup.layers) == visit.layer, twice, 0)
    queue = Queue(wanted, jnp.zeros(want.shape, jnp.int32), pinned, cache.used, flight)
    absent = None
    if state.host is not None and asked is not None:
        absent = state.host.cache.level[rows] == 0
        queue = queue._replace(
            wanted=jnp.where(absent & asked.stream, NO, wanted), behind=_behind(cell, state, visit, asked)
        )
    queue = serve_in_turn(cell, rows, lambda work_s: clock(work_s) < gate_s, queue, absent, copied_s)

    started, top = queue.started > 0, numbers.units.shape[0] - 1
    arrival = arrivals(state, visit, foreseen, started)
    if queue.behind is not None:
        state = state._replace(host=copied_ahead(cell, state, arrival, queue.behind.read))
    state = told(cell, state, visit, foreseen, arrival)
    state = state._replace(
        cache=cache._replace(
            level=cache.level.at[rows].set(jnp.where(started, jnp.int8(top), cache.level[rows])), used=queue.used
        ),
        fresh=state.fresh.at[rows].set(jnp.where(started, 1 + visit.counted.astype(jnp.int8), state.fresh[rows])),
    )
    return state, queue.flight, queue.started, queue.behind


def serve_in_turn(
    cell: Cell,
    rows: Int32[Array, " H"],
    starts: Callable[[Float32[Array, ""]], Bool[Array, ""]],
    queue: Queue,
    absent: Bool[Array, "H E"] | None = None,
    copied_s: Callable[[Float32[Array, ""], Float32[Array, ""]], Float32[Array, ""]] | None = None,
) -> Queue:
    """Starts the wanted copies, or reads, one after the other, as far as time and room allow.

    Args:
      rows: their layers.
      starts: whether a copy that comes after so many seconds of the link's work starts before the next gate.
      absent: those that storage has to be read for, where there is a host tier.
      copied_s: as for `prefetch`.
    """
    setup, _, numbers = cell
    top = numbers.units.shape[0] - 1
    flat = jnp.arange(setup.horizon * setup.experts, dtype=jnp.int32).reshape(setup.horizon, setup.experts)

    def serve(queue: Queue) -> Queue:
        most = jnp.max(queue.wanted)
        index = jnp.min(jnp.where(queue.wanted == most, flat, flat.size - 1))  # of equals: nearer layer, lower id
        row = rows[index // setup.experts]
        units = numbers.units[top, row]
        in_time = starts(queue.flight.link_s) if setup.timed else jnp.asarray(True)
        fits = has_room(numbers, queue.pinned, row, units)
        if not setup.may_evict:
            fits &= has_room(numbers, queue.used, row, units)
        go, start_s, behind = (most > NO) & in_time & fits, queue.flight.link_s, None
        if queue.behind is not None and absent is not None:
            away = jnp.any(absent & (flat == index))
            if cell.policies.miss.hosts and setup.timed:  # storage may still read what the host is to run
                start_s = jnp.where(away, jnp.maximum(start_s, queue.behind.storage_s), start_s)
                go &= starts(start_s)
            go, start_s, behind = _read_first(cell, queue.behind, row, away, go, start_s)
            behind = behind._replace(read=behind.read | (absent & (flat == index) & go))
        taken = jnp.where((jnp.arange(setup.layers) == row) & go, units, 0)
        copy_s = numbers.costs.copy_s[top - 1, row] if numbers.costs is not None else jnp.float32(0)
        end_s = start_s + jnp.where(go, copy_s, 0.0)
        if copied_s is not None:
            end_s = jnp.where(go, copied_s(start_s, copy_s), queue.flight.link_s)
        if behind is not None:
            behind = behind._replace(copying_s=behind.copying_s + jnp.where(go, end_s - start_s, 0.0))
        skipped = queue.skipped
        if skipped is not None:
            skipped |= (flat == index) & (most > NO) & in_time & ~fits
        # masks, not writes at an index: under vmap those would be loops over the batch
        return Queue(
            wanted=jnp.where((flat != index) & in_time, queue.wanted, NO),
            started=jnp.where((flat == index) & go, jnp.max(queue.started) + 1, queue.started),
            pinned=queue.pinned + taken,
            used=queue.used + taken,
            flight=queue.flight._replace(
                link_s=end_s,
                expert=jnp.where(go, row * setup.experts + index % setup.experts, queue.flight.expert),
            ),
            behind=behind,
            skipped=skipped,
        )

    return jax.lax.while_loop(lambda queue: anywhere(jnp.any(queue.wanted > NO)), serve, queue)


def has_room(
    numbers: Numbers, held: Int32[Array, " L"], row: Int32[Array, ""], extra: Int32[Array, ""]
) -> Bool[Array, ""]:
    """Whether a layer's pool, of whose units `held` [L] are taken, has room for some more."""
    return (jnp.sum(held) if numbers.pooled else held[row]) + extra <= numbers.budget_of(row)


def pinned_units(
    numbers: Numbers,
    flight: Flight,
    layer: Int32[Array, ""],
    demand: Bool[Array, " E"],
    demand_units: Int32[Array, ""],
    level: Int8[Array, "L E"],
) -> Int32[Array, " L"]:
    """Gives what the pinned demand of a layer and the copy in flight hold in each layer."""
    experts = demand.shape[0]
    flight_layer, expert = flight.expert // experts, flight.expert % experts
    in_flight = (flight.link_s > 0) & (flight.expert >= 0)
    apart = in_flight & ~((flight_layer == layer) & demand[expert])
    held = jnp.where(apart, numbers.units[level[flight_layer, expert].astype(jnp.int32), flight_layer], 0)
    layers = jnp.arange(level.shape[0])
    return jnp.where(layers == layer, demand_units, 0) + jnp.where(layers == flight_layer, held, 0)


def _behind(cell: Cell, state: State, visit: Visit, asked: Asked) -> Behind:
    """Gives the host tier before any prefetch copy."""
    host, policy, numbers = parts(cell, state)
    demand = asked.stays & (not policy.bypass)
    units = jnp.sum(jnp.where(demand, numbers.units[1, visit.layer], 0))
    pinned = pinned_units(numbers, state.flight, visit.layer, demand, units, host.cache.level)
    read = jnp.zeros((cell.setup.horizon, cell.setup.experts), bool)
    return Behind(read, host.storage_s, jnp.float32(0), pinned, host.cache.used)


def _read_first(
    cell: Cell,
    behind: Behind,
    row: Int32[Array, ""],
    absent: Bool[Array, ""],
    go: Bool[Array, ""],
    link_s: Float32[Array, ""],
) -> tuple[Bool[Array, ""], Float32[Array, ""], Behind]:
    """Lets a prefetch copy of an expert of layer `row` wait for its read, if it is `absent` from host memory.

    Where the host link is free, at `link_s`, storage is free.

    Returns:
      Whether it starts, when its copy does, and the tier behind it.
    """
    setup, numbers = cell.setup, cell.numbers.of_host()
    assert setup.tier is not None
    units = numbers.units[1, row]
    reads = absent & go
    if not setup.tier.exclusive:
        reads &= has_room(numbers, behind.pinned, row, units)
        if not setup.may_evict:
            reads &= has_room(numbers, behind.used, row, units)
    go &= reads | ~absent
    read_s = jnp.float32(0) if numbers.costs is None or numbers.costs.read_s is None else numbers.costs.read_s[row]
    here = jnp.arange(setup.layers) == row
    held = not setup.tier.exclusive
    behind = behind._replace(
        storage_s=jnp.where(reads, link_s + read_s, behind.storage_s),
        pinned=behind.pinned + jnp.where(here & go & held, units, 0),
        used=behind.used + jnp.where(here & reads & held, units, 0),
    )
    return go, jnp.where(reads, link_s + read_s, link_s), behind
