"""Loops that are cheap: under `vmap` in JAX, and compiled by numba on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numba

Tree = TypeVar("Tree")


@jax.custom_batching.custom_vmap
def anywhere(flag: jax.Array) -> jax.Array:
    """Gives the flag itself; under `vmap`, whether it holds in *any* batch element, unbatched.

    A `while_loop` whose condition is batched makes `vmap` select the whole carry in every iteration, which copies every
    table. A loop `while anywhere(condition)` whose body does nothing where the condition is false means the same and
    copies nothing.
    """
    return flag


@anywhere.def_vmap
def _anywhere_vmap(axis_size: int, in_batched: list[bool], flag: jax.Array) -> tuple[Any, bool]:
    del axis_size
    return anywhere(jnp.any(flag, axis=0) if in_batched[0] else flag), False


def settled(arrays: Tree, certain: jax.Array) -> Tree:
    """Gives the same arrays, worked out here once and for all.

    XLA repeats a cheap operation in everything that uses it. For a row of a table that is written afterwards this is
    dear: a repeated read may come after the write, so the whole table is copied first. An `optimization_barrier` does
    not help on a CPU, where jax 0.10 removes barriers before it repeats operations; a branch that XLA cannot foresee
    does, in every version, and it orders the write behind the read. Elsewhere a branch would wait for the host.

    Args:
      arrays: a pytree.
      certain: bool scalar that always holds, though XLA cannot know it.
    """

    def branch(arrays: Tree) -> Tree:
        return jax.lax.cond(certain, lambda arrays: arrays, lambda arrays: jax.tree.map(jnp.zeros_like, arrays), arrays)

    return jax.lax.platform_dependent(arrays, cpu=branch, default=jax.lax.optimization_barrier)


def in_order(rows: jax.Array, start: jax.Array) -> jax.Array:
    """Gives ``start`` and all rows of the first axis, one added after the other, as the contract has sums over tokens.

    The order is part of the result: every program gives the same bits, and rows of zeros behind change none of them.
    """
    if rows.shape[0] == 1:
        return start + rows[0]
    return jax.lax.scan(lambda total, row: (total + row, None), start, rows, unroll=16)[0]


def compiled(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """Compiles at the first call, and keeps the result on disk where some place for it can be written.

    ``more`` are options of ``numba.njit``, such as ``fastmath``.

    Kernels allocate nothing, so numba need not count references to the arrays they are given: loops are twice as fast
    without. The option for that is not a documented one; where it is unknown, kernels work without it.
    """
    tries: list[dict[str, Any]] = [{"cache": True, "_nrt": False}, {"cache": True}, {"_nrt": False}, {}]
    for options in tries:
        # RuntimeError: nowhere to write, neither beside this file nor in the user's cache; KeyError: an unknown option
        with contextlib.suppress(RuntimeError, KeyError):
            return numba.njit(nogil=True, **options, **more)(function)
    raise AssertionError("numba.njit takes no function at all")


def next_power_of_two(count: int) -> int:
    """Gives the least power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
