"""The `weighted` eviction policy: a weighted sum of six features, whose weights a gradient can find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from specmd_jax.policies.base import Column, Curve, Eviction, Keys, Now
from specmd_jax.policies.columns import COUNT, LAST_PASS, TOUCH, cyclic_distance, fading, scored
from specmd_jax.policies.features import ONE, Features, faded, log2_eighths, whole
from specmd_jax.policies.numbers import Real, Share, Weight


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

    def keep(now: Now, layer: jax.Array, touch: jax.Array, **tables: jax.Array) -> Keys:
        return (features_sum(weights, (fast_decay, slow_decay), now, layer, tables), touch)

    columns = feature_columns((fast_decay, slow_decay))
    return scored(keep, curve=Curve("given_all"), touch=TOUCH, **columns)  # pyright: ignore[reportArgumentType]


def feature_columns(decays: tuple[Real, Real]) -> dict[str, Column]:
    """Gives the tables that the features are read from, with the fast and the slow decay."""
    quick, lasting = map(jnp.float32, decays)
    return {
        "last": LAST_PASS,
        "count": COUNT,
        "fast": fading(quick, lambda use: use.demand),
        "slow": fading(lasting, lambda use: use.demand),
        "mass": fading(lasting, lambda use: jnp.where(use.demand, use.mass, 0.0)),
    }


def features_sum(
    weights: Features, decays: tuple[Real, Real], now: Now, layer: jax.Array, tables: Mapping[str, Any]
) -> jax.Array:
    """Gives the weighted sum of what `feature_columns` say, in 2^-20: int32, at most 6 x 2^27 in size."""
    quick, lasting = map(jnp.float32, decays)
    found = Features(
        recency=-log2_eighths(jnp.maximum(now.pass_id - tables["last"], 0) + 1),
        frequency=log2_eighths(tables["count"] + 1),
        fast=faded(tables["fast"], quick),
        slow=faded(tables["slow"], lasting),
        mass=faded(tables["mass"], lasting),
        distance=-(cyclic_distance(now, layer) * ONE // now.layers),
    )
    score = jnp.zeros_like(tables["count"])
    for weight, feature in zip(weights, found, strict=True):
        score = score + weight * feature
    return score
