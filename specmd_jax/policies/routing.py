"""Routing: a policy may look at what is resident before the experts are chosen (CONTRACT.md section 2, step 1).

To add one: write a function that returns a `Routing` and give it a line in `ROUTING`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.loops import in_order
from specmd_jax.policies.base import Routing
from specmd_jax.policies.numbers import Strength


def cache_aware(strength: Strength = 0.3) -> Routing:
    """z' = z + strength * spread * resident.

    `spread` is the layer's running average of max - min of the logits, over the tokens so far and all of this pass. The
    paper says "a running average of the logits"; an average *value* would be near zero or negative, so the spread is
    what gives `strength` the meaning its range (0.1 to 0.5) suggests.
    """

    def init(layers: int) -> tuple[Float32[Array, " L"], Int32[Array, " L"]]:
        return jnp.zeros(layers, jnp.float32), jnp.zeros(layers, jnp.int32)

    def adjust(
        state: tuple[Float32[Array, " L"], Int32[Array, " L"]],
        layer: Int32[Array, ""],
        logits: Float32[Array, "t E"],
        resident: Bool[Array, " E"],
    ) -> tuple[Any, Float32[Array, "t E"]]:
        total, seen = state
        valid = ~jnp.isnan(logits[:, :1])
        spread = jnp.where(valid[:, 0], jnp.max(logits, axis=1) - jnp.min(logits, axis=1), 0.0)
        total = total.at[layer].set(in_order(spread, total[layer]))
        seen = seen.at[layer].add(jnp.sum(valid, dtype=jnp.int32))
        average = total[layer] / jnp.maximum(seen[layer], 1).astype(jnp.float32)
        favoured = jnp.float32(strength) * average * resident.astype(jnp.float32)
        return (total, seen), logits + favoured[None]

    return Routing(init, adjust)


ROUTING: dict[str, Callable[..., Routing] | None] = {"standard": None, "cache_aware": cache_aware}
