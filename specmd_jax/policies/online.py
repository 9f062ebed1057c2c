"""Linear predictors that learn inside the scan, from what they see: no training set, no float rounding.

For each expert of a layer there is a value, in 1/16384: the sum of

* its shares of use at seven decays (`use_history.DECAYS`) and a constant, times eight weights of the layer, and
* for each of j *sources*, which are sets of experts used lately, the mean of its pair weights with that set.

At the next visit of the layer the value is moved towards what it should have been, along the inputs that it came from
(normalised gradient steps). Weights start as the mean share of use, pairs at nothing. Weights are int32 in 2^-24,
between -4 and 4; shares are 256ths; every sum is one of integers, so that its order does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from specmd_jax.policies.use_history import DECAYS, shares

ONE = 1 << 14  # of a value
RATE = 1 << 10  # of fades and rates
_FINE = 10  # bits that weights have below values
_MOST = 4 << (14 + _FINE)
_INPUTS = len(DECAYS) + 1


class Linear(NamedTuple):
    """Weights of all layers, or of one without the leading axis."""

    shares: Int32[Array, " *L 8"]
    pairs: Int32[Array, " *L E j E"]  # of an expert with each expert of each source


def blank(layers: int, experts: int, sources: int) -> Linear:
    """Gives the weights before anything was seen."""
    start = [ONE // len(DECAYS) << _FINE] * len(DECAYS) + [0]
    return Linear(
        jnp.broadcast_to(jnp.asarray(start, jnp.int32), (layers, _INPUTS)),
        jnp.zeros((layers, experts, sources, experts), jnp.int32),
    )


def whole(share: float | Float[Array, ""]) -> Int32[Array, ""]:
    """Gives a fade or rate in 1/1024, the nearest."""
    return jnp.round(jnp.asarray(share, jnp.float32) * RATE).astype(jnp.int32)


def inputs(use: Float32[Array, "E 7"]) -> Int32[Array, "E 8"]:
    """Gives 256ths from `History.use` of a layer."""
    found = shares(use)
    return jnp.concatenate([found, jnp.full((*found.shape[:-1], 1), 256, jnp.int32)], axis=-1)


def value(row: Linear, seen: Int32[Array, "E 8"], sources: Bool[Array, "j E"]) -> Int32[Array, " E"]:
    """Gives the values of a layer's experts, from their inputs and the sources."""
    own = jnp.sum((row.shares >> _FINE)[None] * seen, axis=-1) >> 8
    together = jnp.sum(jnp.where(sources[None], row.pairs >> _FINE, 0), axis=-1)  # [E, j]
    size = jnp.maximum(jnp.sum(sources, axis=-1, dtype=jnp.int32), 1)
    return own + jnp.sum(together // size[None], axis=-1)


def clipped(values: Int32[Array, " E"]) -> Int32[Array, " E"]:
    """Gives values as shares, 0..ONE."""
    return jnp.clip(values, 0, ONE)


def corrected(
    row: Linear,
    seen: Int32[Array, "E 8"],
    sources: Bool[Array, "j E"],
    error: Int32[Array, " E"],
    rate: Int32[Array, ""],
) -> Linear:
    """Gives the layer's weights after a step of `rate` (1/1024) against the `error` of the values of these inputs."""
    slope = jnp.sum((error >> 2)[:, None] * seen, axis=0) // seen.shape[0]  # [8] in 2^-20
    step = jnp.where(sources[None], (error * rate)[:, None, None], 0)  # [E, j, E] in 2^-24
    return Linear(jnp.clip(row.shares + (slope * rate >> 5), -_MOST, _MOST), jnp.clip(row.pairs + step, -_MOST, _MOST))
