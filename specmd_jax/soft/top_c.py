"""The soft top-C: which shares of a cache's contents stay within a budget, differentiable in all that decides it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TINY = float(np.finfo(np.float32).tiny)


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def cut(
    score: jax.Array, amount: jax.Array, room: jax.Array, temperature: jax.Array, axes: tuple[int, ...], steps: int
) -> jax.Array:
    """Gives the score `t` with ``sum(amount * sigmoid((score - t) / temperature)) == room``, summed over `axes`.

    `room` and the result have the summed axes with length 1. `steps` halvings of the range of the scores are followed
    by three Newton steps: enough once the range over 2^steps is about the temperature. The gradient, for all but the
    temperature, is that of the exact `t`. Where everything fits, the result means nothing.
    """
    total = jnp.sum(amount, axes, keepdims=True)
    over = total - room
    here = (amount > 0) | (total == 0)
    low = jnp.min(jnp.where(here, score, jnp.inf), axes, keepdims=True) - 40 * temperature
    high = jnp.max(jnp.where(here, score, -jnp.inf), axes, keepdims=True) + 40 * temperature

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = (ends[0] + ends[1]) / 2
        enough = jnp.sum(amount * jax.nn.sigmoid((middle - score) / temperature), axes, keepdims=True) >= over
        return jnp.where(enough, ends[0], middle), jnp.where(enough, middle, ends[1])

    low, high = jax.lax.fori_loop(0, steps, halve, (low, high))

    def polish(_: Any, t: jax.Array) -> jax.Array:
        # on the logarithm: far below all scores what leaves grows exponentially in t
        share = jax.nn.sigmoid((t - score) / temperature)
        gone = jnp.sum(amount * share, axes, keepdims=True)
        edge = jnp.sum(amount * share * (1 - share), axes, keepdims=True)
        step = jnp.log(jnp.maximum(over, TINY) / jnp.maximum(gone, TINY)) * gone / jnp.maximum(edge, TINY)
        return jnp.clip(t + temperature * step, low, high)

    t = jax.lax.fori_loop(0, 3, polish, (low + high) / 2)
    return t


@cut.defjvp
def _cut_jvp(axes: tuple[int, ...], steps: int, values: Any, slopes: Any) -> tuple[jax.Array, jax.Array]:
    score, amount, room, temperature = values
    d_score, d_amount, d_room, _ = slopes
    t = cut(score, amount, room, temperature, axes, steps)
    stays = jax.nn.sigmoid((score - t) / temperature)
    edge = amount * stays * (1 - stays)
    moved = jnp.sum(edge * d_score + temperature * stays * d_amount, axes, keepdims=True) - temperature * d_room
    return t, moved / jnp.maximum(jnp.sum(edge, axes, keepdims=True), TINY)


def kept(
    score: jax.Array, amount: jax.Array, room: jax.Array, temperature: jax.Array, axes: tuple[int, ...], steps: int = 12
) -> jax.Array:
    """Gives the share of each `amount` that stays, so that they take `room` (arguments as for `cut`); 1 if all fit."""
    total = jnp.sum(amount, axes, keepdims=True)
    # where nothing must leave, or all must, a cut that exists is searched: no gradient goes through it
    some = (total > room) & (room > 0)
    t = cut(score, amount, jnp.where(some, room, total / 2), temperature, axes, steps)
    share = jnp.where(some, jax.nn.sigmoid((score - t) / temperature), (total <= room).astype(score.dtype))
    stays = jnp.sum(amount * share, axes, keepdims=True)
    trim = jnp.where(some, jnp.minimum(1.0, room / jnp.maximum(stays, TINY)), 1.0)  # 1 but for rounding
    return share * jax.lax.stop_gradient(trim)
