"""A counter-based hash: reproducible draws that plain Python, NumPy and XLA agree on to the bit."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32, Integer


def hash31(
    seed: Integer[Array, ""], counter: Integer[Array, " *#n"], index: Integer[Array, " *#n"]
) -> Int32[Array, "..."]:
    """Gives 31 mixed bits of (seed, counter, index) as a non-negative int32 (CONTRACT.md section 3)."""
    seed, counter, index = (jnp.asarray(a).astype(jnp.uint32) for a in (seed, counter, index))
    x = seed * jnp.uint32(0x9E3779B1) + counter * jnp.uint32(0x85EBCA77) + index * jnp.uint32(0xC2B2AE3D)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return ((x ^ (x >> 16)) >> 1).astype(jnp.int32)
