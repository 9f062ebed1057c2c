"""The experts of all tokens as one batched product, for training: no token is dropped, and shapes are static.

The (token, choice) pairs are sorted by expert, and each expert's are filled up to whole blocks of rows; a block is one
product with its expert's matrix. There are at most ``pairs / rows + E`` blocks, so that little is computed for nothing.
Every gradient is a gather or a product as well: nothing is scattered onto the same place twice, which on a GPU would be
slow and add up in another order each time.

Axis letters beside those of `specmd_jax.moe.model.config`: R rows in blocks, X blocks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Plan(NamedTuple):
    """Which pair is in which row."""

    pair: jax.Array  # [R] int32; N * K: none
    place: jax.Array  # [N * K] int32 row of each pair
    expert: jax.Array  # [X] int32 of each block
    top_k: int


def plan(ids: jax.Array, experts: int, rows: int) -> Plan:
    """Sorts pairs into blocks of ``rows``: ids [N, K] int32 within 0..experts - 1."""
    pairs, top_k = ids.size, ids.shape[1]
    bits = max(pairs - 1, 1).bit_length()
    assert experts << bits <= 1 << 32, "pair and expert do not fit in 32 bits"
    number = jnp.arange(pairs, dtype=jnp.int32)
    # expert and pair in one word: a plain sort of words is the fastest one that there is, and stable
    key = (ids.reshape(-1).astype(jnp.uint32) << jnp.uint32(bits)) | number.astype(jnp.uint32)
    key = jnp.sort(key)
    pair, expert = (key & jnp.uint32((1 << bits) - 1)).astype(jnp.int32), (key >> jnp.uint32(bits)).astype(jnp.int32)
    # compared with all at once: a search is a loop of many tiny operations
    edges = jnp.searchsorted(expert, jnp.arange(experts + 1, dtype=jnp.int32), method="compare_all").astype(jnp.int32)
    blocks = (edges[1:] - edges[:-1] + (rows - 1)) // rows
    end = jnp.cumsum(blocks, dtype=jnp.int32)
    row = (end - blocks)[expert] * rows + number - edges[expert]
    count = pairs // rows + experts
    block = jnp.arange(count, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(end, block, side="right", method="compare_all").astype(jnp.int32), experts - 1)
    return Plan(
        pair=jnp.full((count * rows,), pairs, jnp.int32).at[row].set(pair, unique_indices=True),
        place=jnp.zeros((pairs,), jnp.int32).at[pair].set(row, unique_indices=True),
        expert=owner,
        top_k=top_k,
    )


def dispatch(h: jax.Array, plan: Plan) -> jax.Array:
    """Gives each row its token's hidden state: [N, D] -> [R, D], zeros where a row has no pair."""
    return _dispatch(h, plan.pair, plan.place, plan.top_k)


def collect(rows: jax.Array, plan: Plan) -> jax.Array:
    """Gives each pair its row: [R, D] -> [N, K, D]."""
    pairs = _collect(rows, plan.pair, plan.place)
    return pairs.reshape(-1, plan.top_k, rows.shape[-1])


def _rows_of(values: jax.Array, pair: jax.Array, each: int) -> jax.Array:
    count = values.shape[0] * each
    rows = values[jnp.minimum(pair, count - 1) // each]
    return jnp.where((pair < count)[:, None], rows, jnp.zeros((), values.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(h: jax.Array, pair: jax.Array, place: jax.Array, top_k: int) -> jax.Array:
    return _rows_of(h, pair, top_k)


def _dispatch_back(top_k: int, place: jax.Array, slope: jax.Array) -> tuple[jax.Array, None, None]:
    each = slope[place].reshape(-1, top_k, slope.shape[-1])
    return each.astype(jnp.float32).sum(axis=1).astype(slope.dtype), None, None


_dispatch.defvjp(lambda h, pair, place, top_k: (_rows_of(h, pair, top_k), place), _dispatch_back)


@jax.custom_vjp
def _collect(rows: jax.Array, pair: jax.Array, place: jax.Array) -> jax.Array:
    return rows[place]


_collect.defvjp(
    lambda rows, pair, place: (rows[place], pair), lambda pair, slope: (_rows_of(slope, pair, 1), None, None)
)


@jax.custom_vjp
def blocks_of(weights: jax.Array, expert: jax.Array) -> jax.Array:
    """Gives each block its expert's matrix: [E, ...], [X] -> [X, ...]."""
    return weights[expert]


def _blocks_forward(weights: jax.Array, expert: jax.Array) -> Any:
    return weights[expert], (expert, weights.shape[0])


def _blocks_back(kept: tuple[jax.Array, int], slope: jax.Array) -> tuple[jax.Array, None]:
    expert, experts = kept
    own = (expert[None, :] == jnp.arange(experts, dtype=jnp.int32)[:, None]).astype(slope.dtype)
    total = lax.dot_general(own, slope, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return total.astype(slope.dtype), None


blocks_of.defvjp(_blocks_forward, _blocks_back)


@jax.custom_vjp
def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Computes ``x @ matrix.T`` in float32: [.., n, in] by [.., out, in] -> [.., n, out], with as many leading axes.

    Slopes take the type of ``x`` before they are multiplied: a product of float32 by bfloat16 would be one of float32.
    """
    return _dot(x, matrix, -1, -1)


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    leading = tuple(range(a.ndim - 2))
    sums = (((a.ndim + of_a,), (b.ndim + of_b,)), (leading, leading))
    return lax.dot_general(a, b, sums, preferred_element_type=jnp.float32)


def _product_back(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = kept
    slope = slope.astype(x.dtype)
    return _dot(slope, matrix, -1, -2).astype(x.dtype), _dot(slope, x, -2, -2).astype(matrix.dtype)


product.defvjp(lambda x, matrix: (product(x, matrix), (x, matrix)), _product_back)
