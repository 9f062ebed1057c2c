"""Loops that stay cheap under `vmap`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def anywhere(flag: jax.Array) -> jax.Array:
    """The flag itself; under `vmap`, whether it holds in *any* batch element, unbatched.

    A `while_loop` whose condition is batched makes `vmap` select the whole carry in every iteration, which copies every
    table. A loop `while anywhere(condition)` whose body does nothing where the condition is false means the same and
    copies nothing.
    """
    return flag


@anywhere.def_vmap
def _anywhere_vmap(axis_size: int, in_batched: list[bool], flag: jax.Array) -> tuple[Any, bool]:
    del axis_size
    return anywhere(jnp.any(flag, axis=0) if in_batched[0] else flag), False
