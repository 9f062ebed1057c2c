"""Admission: which demand copies stay in the cache (CONTRACT.md section 2). The others pass through.

To add one: write a function that returns an `Admission` and give it a line in `ADMISSION`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from specmd_jax.policies.base import Admission, Offer
from specmd_jax.policies.numbers import Count, Gain


def compete() -> Admission:
    """The demand is not spared: a copy stays if its keep-score beats what it would push out."""
    return Admission(competes=True)


def limited(copies: Count = 4) -> Admission:
    """At most `copies` demand copies of a pass are let in: earlier visits first, then larger gate mass."""

    def admit(before: Int32[Array, ""], offer: Offer) -> tuple[Int32[Array, ""], Bool[Array, " E"]]:
        left = jnp.asarray(copies, jnp.int32) - jnp.where(offer.starts_pass, 0, before)
        # few experts are demanded: their places among the copies by comparing them with each other
        ahead = offer.copied[None] & (offer.order[None] < offer.order[:, None])  # [copy, another]
        place = jnp.sum(ahead, axis=1, dtype=jnp.int32)
        taken = offer.copied & (place < left)
        return jnp.asarray(copies, jnp.int32) - left + jnp.sum(taken, dtype=jnp.int32), taken

    return Admission(init=lambda: jnp.int32(0), admit=admit)


def margin(gain: Gain = 1) -> Admission:
    """As `compete`, but a newcomer's first keep-score must beat that of what it pushes out by `gain`, in its units."""
    return Admission(competes=True, gain=gain)


ADMISSION: dict[str, Callable[..., Admission] | None] = {
    "always": None,
    "compete": compete,
    "limited": limited,
    "margin": margin,
}
