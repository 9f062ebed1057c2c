"""What the kernels of the dense layers share: loads of rows, norms, and rows of a matrix times a vector.

Everything here runs inside a kernel; names ending in ``_ref`` are references to memory. A parameter has a leading axis
of layers, and ``at`` says which of them is meant (`stacked`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.model.forward import Params

Vector = Callable[[Any], jax.Array]  # first column -> [columns] float32


@dataclass(frozen=True)
class Tile:
    """How a program goes over its rows of a matrix: ``rows`` at once, ``columns`` a step (powers of two)."""

    rows: int
    columns: int
    num_warps: int = 4
    num_stages: int = 1

    @property
    def compiler_params(self) -> triton.CompilerParams:
        return triton.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


WANTED_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
TILE_ENTRIES = 4096  # of 4 warps: 32 entries a thread


def choose_tile(outputs: Sequence[int], inputs: int, matrices: int = 1) -> Tile:
    """Gives the default tile for matrices of [outputs, inputs] in one launch; a program reads ``matrices`` at once."""
    columns = min(next_power_of_two(inputs), 1024)
    rows = max(TILE_ENTRIES // columns // matrices, 1)
    while rows > 1 and (sum(outputs) // rows < WANTED_PROGRAMS or math.gcd(*outputs) % rows):
        rows //= 2
    return Tile(rows, columns)


def fit(tile: Tile, outputs: Sequence[int], inputs: int) -> Tile:
    """Gives the tile with no more rows than divide every output, and no more columns than hold all inputs."""
    rows = math.gcd(tile.rows, *outputs)
    return Tile(rows, min(tile.columns, next_power_of_two(inputs)), tile.num_warps, tile.num_stages)


def stacked(tree: Any, index: jax.Array | None) -> Any:
    """Gives every leaf a leading axis of layers, if it has none (``index`` None)."""
    return jax.tree.map(lambda leaf: leaf[None], tree) if index is None else tree


def place(index_ref: Any) -> Any:
    """Gives the layer's place along the leading axis."""
    return jnp.int32(0) if index_ref is None else index_ref[0]


def lanes(size: int) -> tuple[jax.Array, jax.Array | None]:
    """Gives 0, 1, .. up to a power of two, and which of them are below ``size`` (None: all)."""
    lane = jnp.arange(next_power_of_two(size), dtype=jnp.int32)
    return lane, None if lane.shape[0] == size else lane < size


def load(ref: Any, where: Any, mask: jax.Array | None = None) -> jax.Array:
    """Loads ``ref[where]`` as float32, 0 where ``mask`` is false: there it may lie outside of the array."""
    loaded = (
        ref[where] if mask is None else triton.load(ref.at[tuple(_array(index) for index in where)], mask=mask, other=0)
    )
    return loaded.astype(jnp.float32)


def store(ref: Any, where: Any, value: jax.Array, mask: jax.Array | None = None) -> None:
    """Writes ``value``, in the array's dtype, to ``ref[where]`` where ``mask`` is true."""
    value = value.astype(ref.dtype)
    if mask is None:
        ref[where] = value
    else:
        triton.store(ref.at[tuple(_array(index) for index in where)], value, mask=mask)


def _array(index: Any) -> Any:
    """Gives a plain number as an array: an interpreted kernel wants that beside a mask."""
    return jnp.int32(index) if isinstance(index, int) else index


def statistics(x_ref: Any, eps: float, centred: bool) -> tuple[Any, jax.Array]:
    """Gives the mean (0 unless ``centred``) of the row x [1, n], and 1 / its standard deviation about that."""
    size = x_ref.shape[-1]
    lane, mask = lanes(size)
    row, mean = load(x_ref, (0, lane), mask), jnp.float32(0)
    if centred:
        mean = jnp.sum(row) / size
        row = row - mean if mask is None else jnp.where(mask, row - mean, 0.0)
    return mean, lax.rsqrt(jnp.sum(row * row) / size + eps)


def normed_row(x_ref: Any, norm: Params | None, at: Any, eps: float, out_ref: Any) -> None:
    """Writes the whole normed row to ``out_ref`` [1, n]."""
    lane, mask = lanes(x_ref.shape[-1])
    store(out_ref, (0, lane), normed(x_ref, norm, at, eps, lane.shape[0])(0), mask)


def normed(x_ref: Any, norm: Params | None, at: Any, eps: float, columns: int) -> Vector:
    """Gives the function that loads columns of the row x [1, n], normed and rounded to its dtype as `Norm` does."""
    size = x_ref.shape[-1]
    column = jnp.arange(columns, dtype=jnp.int32)
    if norm is None:
        return lambda first: _load_columns(x_ref, 0, first, column, size)
    bias = norm.get("bias")
    mean, scale = statistics(x_ref, eps, bias is not None)

    def vector(first: Any) -> jax.Array:
        row = (_load_columns(x_ref, 0, first, column, size) - mean) * scale
        row = row * _load_columns(norm["weight"], at, first, column, size)
        if bias is not None:
            row = row + _load_columns(bias, at, first, column, size)
        return row.astype(x_ref.dtype).astype(jnp.float32)

    return vector


def _load_columns(ref: Any, at: Any, first: Any, column: jax.Array, size: int) -> jax.Array:
    if size % column.shape[0] == 0:
        return load(ref, (at, pl.ds(first, column.shape[0])))
    return load(ref, (at, first + column), first + column < size)


def weigh(
    weights: Sequence[Any], at: Any, row: jax.Array, tile: Tile, prepare: Callable[[], Vector]
) -> list[jax.Array]:
    """Multiplies ``rows`` rows, from ``row``, of each matrix [L, out, in] by a vector: [rows] float32 each.

    A step loads the next block of columns before it uses the present one, and the first is loaded before ``prepare``
    makes the vector, so that memory is never idle. Sums are kept per column and added once, at the end.
    """
    size, rows, columns = weights[0].shape[-1], tile.rows, tile.columns
    blocks = -(-size // columns)

    def fetch(block: Any) -> list[jax.Array]:
        first = block * columns
        if size % columns == 0:
            return [weight[at, pl.ds(row, rows), pl.ds(first, columns)] for weight in weights]
        down = jnp.broadcast_to((row + jnp.arange(rows, dtype=jnp.int32))[:, None], (rows, columns))
        along = jnp.broadcast_to((first + jnp.arange(columns, dtype=jnp.int32))[None, :], (rows, columns))
        return [triton.load(weight.at[at, down, along], mask=along < size, other=0) for weight in weights]

    ahead = fetch(0)
    vector = prepare()

    def add(block: Any, sums: list[jax.Array], tiles: list[jax.Array]) -> list[jax.Array]:
        values = vector(block * columns)[None, :]
        return [total + tile.astype(jnp.float32) * values for total, tile in zip(sums, tiles, strict=True)]

    def step(block: jax.Array, carry: Any) -> Any:
        sums, tiles = carry
        following = fetch(block + 1)
        return add(block, sums, tiles), following

    sums = [jnp.zeros((rows, columns), jnp.float32) for _ in weights]
    if blocks > 1:
        sums, ahead = lax.fori_loop(0, blocks - 1, step, (sums, ahead))
    return [jnp.sum(total, axis=1) for total in add(blocks - 1, sums, ahead)]
