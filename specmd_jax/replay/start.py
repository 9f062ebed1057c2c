"""What lies in the cache before anything is demanded: what pins keep, and a warm start (CONTRACT.md section 2)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from specmd_jax.policies.base import Pins
from specmd_jax.trace.profile import Profile


class Held(NamedTuple):
    """Experts that never leave."""

    which: Bool[Array, "L E"]
    units: Int32[Array, " L"]  # what they take

    def of_pool(self, layer: Int32[Array, ""], pooled: bool) -> Int32[Array, ""]:
        """Gives what they take of the pool that a layer belongs to."""
        return jnp.sum(self.units) if pooled else self.units[layer]


def most_used(profile: Profile, size: Int32[Array, "L E"], limit: Int32[Array, " *pools"]) -> Bool[Array, "L E"]:
    """Takes experts of each pool by falling count (ties: the lower flat id) up to the first that does not fit.

    Args:
      size: what each takes of the limit.
      limit: a scalar for one pool, or [L] for a pool per layer.
    """
    rows = profile.rank if limit.ndim else profile.rank.reshape(1, -1)
    order = np.argsort(rows, axis=1).astype(np.int32)
    place = np.argsort(order, axis=1).astype(np.int32)
    so_far = jnp.cumsum(jnp.take_along_axis(size.reshape(rows.shape), jnp.asarray(order), axis=1), axis=1)
    fits = so_far <= limit.reshape(-1, 1)
    return jnp.take_along_axis(fits, jnp.asarray(place), axis=1).reshape(size.shape)


def held_by(pins: Pins, units: Int32[Array, " L"], experts: int, budget: Int32[Array, " *pools"]) -> Held:
    """Gives what pins keep; `units` [L] is what an expert takes at the highest precision."""
    share = jnp.asarray(pins.share, jnp.float32) * budget.astype(jnp.float32)
    limit = jnp.minimum(jnp.floor(share).astype(jnp.int32), budget)  # float32 may round a large budget up
    which = most_used(pins.profile, sizes_of(units, experts), limit)
    return Held(which, units_of(which, units))


def warm(
    profile: Profile,
    units: Int32[Array, " L"],
    experts: int,
    budget: Int32[Array, " *pools"],
    held: Held | None,
) -> Bool[Array, "L E"]:
    """Gives what a warm start puts beside the pins."""
    size = sizes_of(units, experts)
    if held is None:
        return most_used(profile, size, budget)
    taken = held.units if budget.ndim else jnp.sum(held.units)
    return most_used(profile, jnp.where(held.which, 0, size), budget - taken)


def sizes_of(units: Int32[Array, " L"], experts: int) -> Int32[Array, "L E"]:
    """Gives what each expert takes."""
    return jnp.broadcast_to(units[:, None], (units.shape[0], experts))


def units_of(which: Bool[Array, "L E"], units: Int32[Array, " L"]) -> Int32[Array, " L"]:
    """Gives what some experts of each layer take."""
    return jnp.sum(which, axis=1, dtype=jnp.int32) * units
