"""Rotary position embeddings: frequencies on the host, rotation on the device.

Sources: RoPE (Su et al. 2021, arXiv:2104.09864), position interpolation (arXiv:2306.15595), YaRN (arXiv:2309.00071),
LongRoPE (arXiv:2402.13753).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.model.config import Rope


def frequencies(rope: Rope, context: int) -> tuple[npt.NDArray[np.float32], float]:
    """Gives radians per position of each rotated pair, [dim / 2], and the factor on cos and sin.

    ``context`` is the number of positions that the KV cache holds. LongRoPE uses its long factors when that exceeds
    the positions of the pre-training: one choice for the whole sequence, because keys already in the cache cannot
    be rotated again when a sequence grows past the border.
    """
    pair = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    period = np.power(np.float32(rope.theta), pair, dtype=np.float32)
    if rope.kind == "linear":
        return (1.0 / (np.float32(rope.factor) * period)).astype(np.float32), 1.0
    if rope.kind == "longrope":
        long = context > rope.original_positions
        factors = np.asarray(rope.long_factors if long else rope.short_factors, np.float32)
        return (1.0 / (factors * period)).astype(np.float32), rope.long_scale if long else rope.short_scale
    if rope.kind == "yarn":
        keep = 1.0 - _ramp(rope)
        blended = (1.0 / (np.float32(rope.factor) * period)) * (1.0 - keep) + (1.0 / period) * keep
        return blended.astype(np.float32), rope.scale
    return (1.0 / period).astype(np.float32), 1.0


def _ramp(rope: Rope) -> npt.NDArray[np.float32]:
    """YaRN: 0 for pairs that turn often enough to be left alone, 1 for those that are interpolated. [dim / 2]"""

    def pair_of(turns: float) -> float:
        return rope.dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    return np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of the attention temperature: 0.1 * weight * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotate(rope: Rope, x: jax.Array, position: jax.Array, context: int) -> jax.Array:
    """Rotates ``x`` [B, T, heads, rope.dim] to ``position`` [B, T] int32; computed in float32, returned in x.dtype."""
    radians_per_position, scale = frequencies(rope, context)
    angle = position.astype(jnp.float32)[:, :, None, None] * jnp.asarray(radians_per_position)[None, None, None, :]
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    wide = x.astype(jnp.float32)
    if rope.interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)
