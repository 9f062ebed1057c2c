"""Predictions that are read into host memory and go no further (CONTRACT.md section 6). Time and room are given as for
copies to the device, by `serving`; here the link is that of storage, and the room that of host memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.policies.base import Now
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.host_tier import Asked, parts
from specmd_jax.replay.prefetching import arrivals, look_ahead, told
from specmd_jax.replay.serving import Queue, pinned_units, serve_in_turn
from specmd_jax.replay.state import Cell, Early, Flight, State, Visit


class Ahead(NamedTuple):
    """The reads that a visit starts."""

    started: Int32[Array, "H E"]  # 1, 2, ... in their order; 0: not
    skipped: Bool[Array, "H E"]  # had time and no room
    flight: Flight  # of storage behind them


def read_ahead(
    cell: Cell, state: State, visit: Visit, now: Now, gate_s: Float32[Array, ""], asked: Asked
) -> tuple[State, Ahead]:
    """Predicts, selects and starts reads until the next gate.

    Args:
      state: behind the demand; `storage_s` of its host tier is that behind the visit's reads.
      gate_s: seconds until the next gate.
      asked: of the host tier.
    """
    host, policy, _ = parts(cell, state)
    numbers, early, layer = cell.numbers.of_storage(), host.early, visit.layer
    assert early is not None
    foreseen = look_ahead(cell, state, visit, now)
    rows, cache = foreseen.rows, host.cache
    absent = (state.cache.level[rows] == 0) & (cache.level[rows] == 0)
    wanted = jnp.where(foreseen.selected & absent & ~asked.stream, foreseen.want, NO)
    demand = asked.stays & (not policy.bypass)
    units = jnp.sum(jnp.where(demand, numbers.units[1, layer], 0))
    none = jnp.zeros(wanted.shape, bool)
    # what is read on demand is there by the next gate, and so is what was read before it
    flight = Flight(host.storage_s, jnp.where(jnp.any(asked.read), -1, early.flight.expert), early.flight.pinned_layer)
    queue = Queue(
        wanted=wanted,
        started=none.astype(jnp.int32),
        pinned=pinned_units(numbers, early.flight, layer, demand, units, cache.level),
        used=cache.used,
        flight=flight,
        skipped=none,
    )
    queue = serve_in_turn(cell._replace(numbers=numbers), rows, lambda work_s: work_s < gate_s, queue)
    assert queue.skipped is not None

    started = queue.started > 0
    arrival = arrivals(state, visit, foreseen, started)
    fresh = jnp.where(started, 1 + visit.counted.astype(jnp.int8), early.fresh[rows])
    host = host._replace(
        cache=cache._replace(
            level=cache.level.at[rows].set(jnp.where(started, jnp.int8(1), cache.level[rows])), used=queue.used
        ),
        eviction=policy.arrive(host.eviction, arrival),
        storage_s=queue.flight.link_s,
        early=Early(early.flight, early.fresh.at[rows].set(fresh)),
    )
    state = told(cell, state._replace(host=host), visit, foreseen, arrival._replace(arrived=none))
    return state, Ahead(queue.started, queue.skipped, queue.flight)
