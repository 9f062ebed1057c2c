"""The `weighted` eviction policy: a weighted sum of six features, whose weights a gradient can find."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from specmd_jax.policies.base import Curve, Eviction, Keys, Now
from specmd_jax.policies.columns import COUNT, LAST_PASS, TOUCH, cyclic_distance, fading, scored
from specmd_jax.policies.features import ONE, Features, faded, log2_eighths, whole
from specmd_jax.policies.numbers import Share, Weight


def weighted(
    recency: Weight = 0.5,
    frequency: Weight = 0.0,
    fast: Weight = 1.0,
    slow: Weight = 1.0,
    mass: Weight = 0.0,
    distance: Weight = 0.0,
    fast_decay: Share = 0.7,
    slow_decay: Share = 0.95,
) -> Eviction:
    """A weighted sum of six features (`policies.features`), ties by recency; `soft.search` finds the weights."""
    weights = Features(*map(whole, (recency, frequency, fast, slow, mass, distance)))
    quick, lasting = jnp.float32(fast_decay), jnp.float32(slow_decay)

    def keep(now: Now, layer: jax.Array, last: jax.Array, count: jax.Array, touch: jax.Array, **fading: Any) -> Keys:
        found = Features(
            recency=-log2_eighths(jnp.maximum(now.pass_id - last, 0) + 1),
            frequency=log2_eighths(count + 1),
            fast=faded(fading["fast"], quick),
            slow=faded(fading["slow"], lasting),
            mass=faded(fading["mass"], lasting),
            distance=-(cyclic_distance(now, layer) * ONE // now.layers),
        )
        score = jnp.zeros_like(touch)
        for weight, feature in zip(weights, found, strict=True):
            score = score + weight * feature
        return (score, touch)

    return scored(
        keep,
        curve=Curve("given_all"),
        last=LAST_PASS,
        count=COUNT,
        touch=TOUCH,
        fast=fading(quick, lambda use: use.demand),
        slow=fading(lasting, lambda use: use.demand),
        mass=fading(lasting, lambda use: jnp.where(use.demand, use.mass, 0.0)),
    )
