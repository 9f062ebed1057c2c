"""A block of an expert's matrix inside a kernel: loaded as it lies in memory, put elsewhere as it is, and decoded.

A matrix [out, in] of any form of `model.quant` is cut into blocks of rows x *codes*. A code of a packed form stands for
two entries of its row; all first entries are one *plane* of the matrix, all second entries another, and a plane is
what can be multiplied without interleaving anything. int4 has the entries i and in / 2 + i in a code, mxfp4 2 i and
2 i + 1.

Names ending in ``_ref`` are references to memory: the arrays of a leaf, each with a leading axis of experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.kernels.rows import load as load_entries
from specmd_jax.moe.model.quant import MXFP4, Int4, Int8, Leaf

# an int4 code in the low bits of 2 ** 23 as a float32 is 2 ** 23 + code; the codes are stored + 8
INT4_EXPONENT, INT4_ZERO = 0x4B000000, 8388608.0 + 8.0
# a 4-bit float's bits are those of a float16 2 ** 14 times smaller
MXFP4_SCALE = 16384.0


class Cut(NamedTuple):
    """How the rows of a matrix are cut (hashable)."""

    codes: int  # in a block, a power of two
    columns: int  # codes in a row
    planes: int  # entries that a code stands for
    stride: int  # columns of the matrix between neighbours of a plane
    offset: int  # columns of the matrix between the planes
    group: int  # codes that share a scale; 0: no scales
    scaled: int  # how many planes have scales of their own

    @property
    def blocks(self) -> int:
        """Blocks in a row; the last one may be filled up."""
        return -(-self.columns // self.codes)

    @property
    def whole(self) -> bool:
        """Whether no block is filled up."""
        return self.columns % self.codes == 0

    @property
    def scales(self) -> int:
        """Scales of a row of a block, in one plane."""
        return max(self.codes // self.group, 1)


class Block(NamedTuple):
    """A block as it lies in memory."""

    codes: jax.Array  # [rows, codes]
    scales: tuple[jax.Array, ...]  # [rows, `Cut.scales`] per scaled plane


def serves(leaf: Leaf) -> str | None:
    """Gives None, or the reason why a matrix (arrays or shapes, [.., out, in]) cannot be cut."""
    if isinstance(leaf, Int8 | Int4 | MXFP4):
        group = cut(leaf, 1).group
        if group & (group - 1) and group != cut(leaf, 1).columns:
            return f"{group} codes share a scale, expected a power of two or a whole row"
    return None


def cut(leaf: Leaf, codes: int) -> Cut:
    """Cuts the rows of a matrix (arrays, shapes or references, [.., out, in]) into blocks of at most so many codes."""
    if isinstance(leaf, Int8 | Int4 | MXFP4):
        columns, scaled = leaf.codes.shape[-1], 2 if isinstance(leaf, Int4) else 1
        group = columns * scaled // leaf.scales.shape[-1]
        planes = 1 if isinstance(leaf, Int8) else 2
        stride, offset = (2, 1) if isinstance(leaf, MXFP4) else (1, columns)
    else:
        columns, planes, stride, offset, group, scaled = leaf.shape[-1], 1, 1, 0, 0, 0
    return Cut(min(codes, next_power_of_two(columns)), columns, planes, stride, offset, group, scaled)


def load(leaf_ref: Leaf, own: Cut, expert: Any, row: Any, rows: int, number: Any) -> Block:
    """Loads block ``number`` of ``rows`` rows from ``row`` of an expert; beyond the last column it is filled with 0."""
    parts = _parts(leaf_ref, own, number)
    codes, *scales = (_load(part, expert, row, rows, own.whole) for part in parts)
    return Block(codes, tuple(scales))


def store(leaf_ref: Leaf, own: Cut, expert: Any, row: Any, number: Any, block: Block) -> None:
    """Puts a block where another expert has it."""
    for part, values in zip(_parts(leaf_ref, own, number), (block.codes, *block.scales), strict=True):
        _store(part, expert, row, own.whole, values)


def decoded(leaf_ref: Leaf, own: Cut, block: Block) -> list[jax.Array]:
    """Gives what a block stands for, [rows, codes] float32 per plane."""
    codes = block.codes
    if isinstance(leaf_ref, Int4):
        values = [_int4(codes & 15), _int4(codes >> 4)]
        scales = [scale.astype(jnp.float32) for scale in block.scales]
    elif isinstance(leaf_ref, MXFP4):
        values = [_fp4(codes & 15), _fp4(codes >> 4)]
        # 2 ** (exponent - 127) by the bits of a float32; exponent 0, which is 2 ** -127, becomes zero
        bits = block.scales[0].astype(jnp.uint32) << 23
        scales = [lax.bitcast_convert_type(bits, jnp.float32) * MXFP4_SCALE] * 2
    else:
        values, scales = [codes.astype(jnp.float32)], [scale.astype(jnp.float32) for scale in block.scales]
    if not scales:
        return values
    return [value * _spread(scale, own) for value, scale in zip(values, scales, strict=True)]


def entries(x_ref: Any, own: Cut, row: Any, number: Any) -> list[jax.Array]:
    """Loads what block ``number`` of a matrix is multiplied by from ``x_ref`` [n, in]: [codes] float32 per plane, 0
    beyond the last column."""
    code = number * own.codes + jnp.arange(own.codes, dtype=jnp.int32)
    mask = None if own.whole else code < own.columns
    return [load_entries(x_ref, (row, own.stride * code + plane * own.offset), mask) for plane in range(own.planes)]


def by_plane(own: Cut, x: jax.Array) -> jax.Array:
    """Gives ``x`` [n, in] with the entries of a plane side by side, one plane behind the other."""
    if own.stride == 1:
        return x
    return x.reshape(-1, own.columns, own.stride).swapaxes(1, 2).reshape(x.shape)


def place_by_plane(own: Cut, column: jax.Array) -> jax.Array:
    """Gives where `by_plane` puts a column."""
    return column if own.stride == 1 else column % own.stride * own.columns + column // own.stride


class _Part(NamedTuple):
    """Columns of one of a leaf's arrays that belong to a block."""

    ref: Any
    first: Any
    size: int
    end: int  # columns from here on are none of the plane's


def _parts(leaf_ref: Leaf, own: Cut, number: Any) -> list[_Part]:
    """Gives where a block's codes lie, then its scales of each scaled plane."""
    code = number * own.codes
    if not own.group:
        return [_Part(leaf_ref, code, own.codes, own.columns)]
    count, first = own.columns // own.group, 0 if own.group == own.columns else code // own.group
    scales = [
        _Part(leaf_ref.scales, first + plane * count, own.scales, (plane + 1) * count) for plane in range(own.scaled)
    ]
    return [_Part(leaf_ref.codes, code, own.codes, own.columns), *scales]


def _spread(scales: jax.Array, own: Cut) -> jax.Array:
    rows, count = scales.shape
    if count == 1:
        return scales
    return jnp.broadcast_to(scales[:, :, None], (rows, count, own.group)).reshape(rows, own.codes)


def _int4(code: jax.Array) -> jax.Array:
    bits = code.astype(jnp.uint32) | jnp.uint32(INT4_EXPONENT)
    return lax.bitcast_convert_type(bits, jnp.float32) - INT4_ZERO


def _fp4(code: jax.Array) -> jax.Array:
    wide = code.astype(jnp.uint16)
    bits = ((wide & jnp.uint16(8)) << 12) | ((wide & jnp.uint16(7)) << 9)
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _load(part: _Part, expert: Any, row: Any, rows: int, whole: bool) -> jax.Array:
    if whole:
        return part.ref[expert, pl.ds(row, rows), pl.ds(part.first, part.size)]
    place, mask = _places(part, expert, row, rows)
    return triton.load(part.ref.at[place], mask=mask, other=0)


def _store(part: _Part, expert: Any, row: Any, whole: bool, values: jax.Array) -> None:
    rows, size = values.shape
    if whole:
        part.ref[expert, pl.ds(row, rows), pl.ds(part.first, size)] = values
    else:
        place, mask = _places(part, expert, row, rows)
        triton.store(part.ref.at[place], values, mask=mask)


def _places(part: _Part, expert: Any, row: Any, rows: int) -> tuple[Any, jax.Array]:
    down = jnp.broadcast_to((row + jnp.arange(rows, dtype=jnp.int32))[:, None], (rows, part.size))
    along = jnp.broadcast_to((part.first + jnp.arange(part.size, dtype=jnp.int32))[None, :], (rows, part.size))
    return (expert, down, along), along < part.end
