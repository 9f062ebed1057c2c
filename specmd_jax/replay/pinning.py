"""Who must not leave when a visit makes room, and where to look for who may (CONTRACT.md section 2, step 7)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from specmd_jax.replay.state import Cell, Flight, State, Visit


def pins(
    cell: Cell,
    flight: Flight,
    visit: Visit,
    demand: Bool[Array, " E"],
    stream: Bool[Array, ""],
    started: Int32[Array, "H E"],
    kept: Bool[Array, "L E"] | None = None,
) -> Callable[[Int32[Array, ""]], Bool[Array, " E"]]:
    """Gives who must stay of a layer: the pinned demand, the copy in flight unless all streams, what has started, and
    what is kept for good.
    """
    setup, layer = cell.setup, visit.layer

    def pinned(row: Int32[Array, ""]) -> Bool[Array, " E"]:
        in_flight = flight.of(row, setup.experts) & ~stream
        distance = row - layer - 1
        distance += jnp.where(distance < 0, setup.layers, 0)
        just_started = jnp.any((distance == jnp.arange(setup.horizon))[:, None] & (started > 0), axis=0)
        spared = ((row == layer) & demand) | in_flight | just_started
        return spared if kept is None else spared | kept[row]

    return pinned


def touched_by(
    cell: Cell,
    state: State,
    visit: Visit,
    targets: Int32[Array, " H"],
    pinned_layer: Int32[Array, ""],
    flight_layer: Int32[Array, ""],
) -> tuple[Int32[Array, " touched"], Int32[Array, " also"]]:
    """Gives the layers whose residents, pins or scores may have changed, as `evict` takes them."""
    touched, also = jnp.stack([state.layer, visit.layer]), jnp.zeros(0, jnp.int32)
    if cell.policies.prefetch is not None:
        touched = jnp.concatenate([touched, targets])
        also = jnp.stack([pinned_layer, flight_layer])
    return touched, also
