"""Room in host memory, behind the device's own evictions (CONTRACT.md section 6)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8, Int32

from specmd_jax.policies.base import Now
from specmd_jax.replay.host_tier import Asked, parts, taken_back
from specmd_jax.replay.make_room import evict
from specmd_jax.replay.pinning import pins, touched_by
from specmd_jax.replay.prefetching import targets_of
from specmd_jax.replay.reading_ahead import Ahead
from specmd_jax.replay.serving import Behind
from specmd_jax.replay.state import Cell, Flight, State, Visit
from specmd_jax.replay.storage import Reads
from specmd_jax.replay.totals import EarlyEvents, TierEvents


def room_in_host(
    cell: Cell,
    state: State,
    visit: Visit,
    now: Now,
    asked: Asked,
    held: Int8[Array, "L E"],
    started: Int32[Array, "H E"],
    reads: Reads | None,
    behind: Behind | None,
    ahead: Ahead | None,
    gate_s: Float32[Array, ""],
) -> tuple[State, TierEvents]:
    """Makes room in the host tier, behind the device's own evictions.

    Args:
      held: [L, E] int8, who was on the device before those.
      started: prefetch copies to the device, in their order.
      reads: of the demand.
      behind: what prefetching to the device did to the tier.
      ahead: what is read into it and goes no further.
      gate_s: seconds until the next gate.
    """
    setup, tier = cell.setup, cell.setup.tier
    layer, targets = visit.layer, targets_of(setup, visit.layer)
    assert tier is not None and reads is not None
    host, policy, numbers = parts(cell, state)
    flight = state.flight if host.early is None else host.early.flight
    started = started if ahead is None else ahead.started
    flight_layer = flight.layer_of(setup.experts, layer)
    touched, also = touched_by(cell, state, visit, targets, flight.pinned_layer, flight_layer)
    pools = (jnp.arange(setup.layers) == layer).at[targets].max(jnp.any(started > 0, axis=1))
    if tier.exclusive:  # what enters may be of any layer
        gone = (held == cell.numbers.units.shape[0] - 1) & (state.cache.level == 0)
        host = taken_back(cell, state, visit, gone)
        touched, also = jnp.arange(setup.layers, dtype=jnp.int32), jnp.zeros(0, jnp.int32)
        pools = jnp.ones(setup.layers, bool)
    demand = asked.stays & ~asked.stream & (not policy.bypass)
    cache, evictions = evict(
        policy,
        host.eviction,
        host.cache,
        now=now,
        units=numbers.units,
        budget=numbers.budget,
        pinned=pins(cell, flight, visit, demand, asked.stream, started),
        touched=touched,
        also=also,
        pools=pools,
        starts_pass=visit.starts_pass,
    )
    order = started if behind is None else jnp.where(behind.read, started, 0)
    storage_s = host.storage_s if behind is None else behind.storage_s
    ahead_s = jnp.float32(0)
    if cell.numbers.costs is not None:
        assert cell.numbers.costs.read_s is not None
        ahead_s = jnp.sum(jnp.where(order > 0, cell.numbers.costs.read_s[targets][:, None], 0.0))
    left_s, early, seen = jnp.maximum(storage_s - gate_s, 0.0), host.early, None
    if early is not None and asked.used is not None and asked.late is not None:
        after = flight if ahead is None else ahead.flight
        early = early._replace(flight=Flight(left_s, jnp.where(left_s > 0, after.expert, -1), flight_layer))
        skipped = jnp.zeros(started.shape, bool) if ahead is None else ahead.skipped
        seen = EarlyEvents(asked.used, asked.late, skipped)
    events = TierEvents(
        read=asked.read,
        ahead=order,
        evictions=evictions,
        seconds=jnp.stack([reads.stall_s, reads.busy_s + ahead_s]),
        level=cache.level if setup.detail == "full" else None,
        early=seen,
    )
    return state._replace(host=host._replace(cache=cache, storage_s=left_s, early=early)), events
