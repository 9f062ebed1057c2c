"""Prefetch copies: what is foreseen at a gate, and which of it starts before the next one (CONTRACT.md section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.loops import anywhere
from specmd_jax.policies.base import Arrival, Gate, Now, Prefetch, Selection, Size
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.demand import Copied
from specmd_jax.replay.state import Cell, Flight, Numbers, Open, Setup, State, Visit


class Queue(NamedTuple):
    """The wanted copies and those that have started."""

    wanted: Float32[Array, "H E"]  # want-score, -inf: not, or no longer
    started: Int32[Array, "H E"]  # 1, 2, ... in the order of starting; 0: not
    pinned: Int32[Array, " L"]  # units
    used: Int32[Array, " L"]  # units
    flight: Flight


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


def prefetch(
    cell: Cell,
    state: State,
    visit: Visit,
    now: Now,
    flight: Flight,
    gate_s: Float32[Array, ""],
    copied: Copied,
    clock: Callable[[Float32[Array, ""]], Float32[Array, ""]],
) -> tuple[State, Flight, Int32[Array, "H E"]]:
    """Predicts, selects and starts copies until the next gate.

    Args:
      state: behind the demand copies; its `flight` is that of the visit's own gate.
      flight: behind the demand copies; the seconds of its link, here and as returned, are work, whatever disturbs it.
      gate_s: seconds until the next gate.
      clock: work of the link -> seconds from the gate.

    Returns:
      The state with what was started resident, the link's state, and the order of starting, [H, E] int32 from 1 (0:
      not started).
    """
    setup, policies, numbers = cell
    assert policies.prefetch is not None and policies.selection is not None
    rows, closing = targets_of(setup, visit.layer), visit.ends_layer
    gate = Gate(now, state.gate.demand, state.gate.mass, visit.ahead, visit.future)
    size = Size(setup.layers, setup.experts, setup.horizon)
    learned, memory, want, selected = foresee(
        policies.prefetch, policies.selection, (state.prefetch, state.selection), gate, size, closing
    )
    cache = state.cache
    wanted = jnp.where(selected & (cache.level[rows] == 0) & ~copied.stream, want, NO)
    pinned = _pinned_units(cell, state, visit, copied)
    queue = Queue(wanted, jnp.zeros(want.shape, jnp.int32), pinned, cache.used, flight)
    queue = _serve(cell, rows, lambda work_s: clock(work_s) < gate_s, queue)

    started, top = queue.started > 0, numbers.units.shape[0] - 1
    arrival = Arrival(
        rows=rows,
        selected=selected,
        arrived=started,
        touch=state.clock,
        visit=visit.index,
        pass_id=visit.pass_id + (rows <= visit.layer).astype(jnp.int32),
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


def _serve(
    cell: Cell,
    rows: Int32[Array, " H"],
    starts: Callable[[Float32[Array, ""]], Bool[Array, ""]],
    queue: Queue,
) -> Queue:
    """Starts the wanted copies one after the other, as far as time and room allow.

    Args:
      rows: their layers.
      starts: whether a copy that comes after so many seconds of the link's work starts before the next gate.
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
        fits = _fits(numbers, queue.pinned, row, units)
        if not setup.may_evict:
            fits &= _fits(numbers, queue.used, row, units)
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

    return jax.lax.while_loop(lambda queue: anywhere(jnp.any(queue.wanted > NO)), serve, queue)


def _fits(
    numbers: Numbers, held: Int32[Array, " L"], row: Int32[Array, ""], extra: Int32[Array, ""]
) -> Bool[Array, ""]:
    """Whether a layer's pool, of whose units `held` [L] are taken, has room for some more."""
    return (jnp.sum(held) if numbers.pooled else held[row]) + extra <= numbers.budget_of(row)


def _pinned_units(cell: Cell, state: State, visit: Visit, copied: Copied) -> Int32[Array, " L"]:
    """Gives what the pinned demand, the copy in flight and pins hold in each layer."""
    setup, policies, numbers = cell
    demand = visit.demand & (not policies.competes)
    demand_units = jnp.where(policies.competes, 0, copied.units)
    flight_layer, expert = state.flight.expert // setup.experts, state.flight.expert % setup.experts
    in_flight = (state.flight.link_s > 0) & (state.flight.expert >= 0)
    apart = in_flight & ~((flight_layer == visit.layer) & demand[expert])
    held = jnp.where(apart, numbers.units[state.cache.level[flight_layer, expert].astype(jnp.int32), flight_layer], 0)
    layers = jnp.arange(setup.layers)
    pinned = jnp.where(layers == visit.layer, demand_units, 0) + jnp.where(layers == flight_layer, held, 0)
    if state.held is None or copied.pinned_units is None:
        return pinned
    twice = jnp.where(policies.competes, 0, copied.pinned_units)  # demanded, and kept by pins
    return pinned + state.held.units - jnp.where(layers == visit.layer, twice, 0)
