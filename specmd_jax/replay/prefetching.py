"""Prefetch copies: what is foreseen at a gate, and which of it starts before the next one (CONTRACT.md section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.policies.base import Arrival, Gate, Now, Prefetch, Selection, Size
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.demand import Copied
from specmd_jax.replay.host_tier import Asked, copied_ahead, parts
from specmd_jax.replay.serving import Behind, Queue, pinned_units, serve_in_turn
from specmd_jax.replay.state import Cell, Flight, Open, Setup, State, Visit


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


def _behind(cell: Cell, state: State, visit: Visit, asked: Asked) -> Behind:
    """Gives the host tier before any prefetch copy."""
    host, policy, numbers = parts(cell, state)
    demand = asked.stays & (not policy.bypass)
    units = jnp.sum(jnp.where(demand, numbers.units[1, visit.layer], 0))
    pinned = pinned_units(numbers, state.flight, visit.layer, demand, units, host.cache.level)
    read = jnp.zeros((cell.setup.horizon, cell.setup.experts), bool)
    return Behind(read, host.storage_s, jnp.float32(0), pinned, host.cache.used)
