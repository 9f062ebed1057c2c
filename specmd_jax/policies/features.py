"""What the `weighted` eviction policy looks at, in fixed point: a weighted sum of integers rounds nowhere.

Weights and features are multiples of 1/1024 (`ONE`), so a keep-score is an int32 that every device, every order of
summation and the differentiable cache agree on.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

ONE = 1024
MOST = 16 * ONE  # six features of at most 16, weights of at most 8: sums stay inside an int32


class Features(NamedTuple):
    """One number per expert (int32 multiples of 1/1024, or the same as floats), or the weight of each."""

    recency: jax.Array  # -log2(1 + passes since the last use) / 8
    frequency: jax.Array  # log2(1 + visits that used it) / 8
    fast: jax.Array  # share of its layer's visits that used it, fading by `fast_decay` per visit
    slow: jax.Array  # the same with `slow_decay`
    mass: jax.Array  # its gate mass per visit, with `slow_decay`
    distance: jax.Array  # -(layers until its layer is visited again) / L


def log2_eighths(count: Int32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives log2(count) / 8 of int32 numbers >= 1, linear within an octave: read off the bits of the float32."""
    bits = jax.lax.bitcast_convert_type(count.astype(jnp.float32), jnp.int32)
    return (bits >> 16) - (127 << 7)


def faded(value: Float32[Array, " *n"], decay: Float32[Array, ""]) -> Int32[Array, " *n"]:
    """Gives an average as int32: `value` is what ``(value + new) * decay`` accumulates, at most decay / (1 - decay)."""
    return jnp.minimum(jnp.floor(value * (1 - decay) * ONE), MOST).astype(jnp.int32)


def whole(weight: float | Float[Array, ""]) -> Int32[Array, ""]:
    """Gives a weight as int32: the nearest, of two the even one."""
    scaled = jnp.asarray(weight, jnp.float32) * ONE
    below = jnp.floor(scaled)  # not jnp.round, which not every backend has
    number, rest = below.astype(jnp.int32), scaled - below
    return number + ((rest > 0.5) | ((rest == 0.5) & (number % 2 != 0))).astype(jnp.int32)
