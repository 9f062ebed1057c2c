"""A block of an expert's matrix inside a kernel: copied as it lies in memory, loaded, and decoded.

A matrix [out, in] of any form of `model.quant` is cut into blocks of rows x *codes*: entries of a plain matrix, 32-bit
words of an encoded one (`quant.words`). A word stands for several entries of its row; all first entries are one *plane*
of the matrix, all second ones another, and a plane is what can be multiplied without interleaving anything. What a
matrix is multiplied by lies plane by plane, too (`arrange`), so that neighbours in a plane are neighbours in memory.

Words are not only fewer to load than bytes: what lowers these kernels counts the places of arrays of up to 4 GiB in 32
bits with a sign, so that single bytes beyond the first 2 GiB are out of its reach.

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
from specmd_jax.moe.model.quant import MXFP4, Int2, Int4, Int8, Leaf, is_words

# an int4 code in the low bits of 2 ** 23 as a float32 is 2 ** 23 + code; the codes are stored + 8
INT4_EXPONENT, INT4_ZERO = 0x4B000000, 8388608.0 + 8.0
# a 4-bit float's bits are those of a float16 2 ** 14 times smaller
MXFP4_EXPONENT = 14

BYTES = range(4)  # of a word

LINE_BYTES = 128  # that memory is asked for at a time
COPIED, COPIED_FLAT = 4096, 512  # entries that a program copies at a time, in tiles and one behind the other


class Cut(NamedTuple):
    """How the rows of a matrix are cut (hashable)."""

    codes: int  # in a block, a power of two
    columns: int  # codes in a row
    stride: int  # columns of the matrix between neighbours of a plane
    offsets: tuple[int, ...]  # first column of each plane
    group: int  # codes that share a scale; 0: no scales
    scaled: tuple[int, ...]  # per plane: which row of scales is its

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
        return max(self.codes // self.group, 1) if self.group else 0

    @property
    def sums(self) -> int:
        """Sums that a row of a block adds to: see `weighed`."""
        return self.scales if self.scales > 1 else self.codes


class Block(NamedTuple):
    """A block as it lies in memory."""

    codes: jax.Array  # [rows, codes]
    scales: tuple[jax.Array, ...]  # [rows, `Cut.scales`] per row of scales


def serves(leaf: Leaf) -> str | None:
    """Gives None, or the reason why a matrix (arrays or shapes, [.., out, in]) cannot be cut."""
    if isinstance(leaf, Int2):
        return "codes of 2 bits, expected 4 or 8"
    if not isinstance(leaf, Int8 | Int4 | MXFP4):
        return None
    if not is_words(leaf):
        return f"rows of {leaf.codes.shape[-1]} bytes of codes, expected whole words of 4"
    columns, scales = leaf.codes.shape[-1], leaf.scales.shape[-1] // (2 if isinstance(leaf, Int4) else 1)
    group = columns // scales
    if columns % scales or (group & (group - 1) and scales > 1):
        return f"scales of {columns / scales:g} words of codes, expected a power of two or a whole row"
    return None


def cut(leaf: Leaf, codes: int) -> Cut:
    """Cuts the rows of a matrix (arrays, shapes or references, [.., out, in]) into blocks of at most so many codes."""
    if not isinstance(leaf, Int8 | Int4 | MXFP4):
        columns = leaf.shape[-1]
        return Cut(min(codes, next_power_of_two(columns)), columns, 1, (0,), 0, ())
    columns = leaf.codes.shape[-1]
    if isinstance(leaf, Int8):
        stride, offsets, scaled = 4, tuple(BYTES), (0, 0, 0, 0)
    elif isinstance(leaf, Int4):  # low half-bytes are the row's first half
        stride, offsets, scaled = 4, (*BYTES, *(4 * columns + byte for byte in BYTES)), (0, 0, 0, 0, 1, 1, 1, 1)
    else:  # a byte is two neighbours
        stride, offsets, scaled = 8, tuple(range(8)), (0,) * 8
    group = columns * (scaled[-1] + 1) // leaf.scales.shape[-1]
    return Cut(min(codes, next_power_of_two(columns)), columns, stride, offsets, group, scaled)


def arrange(leaf: Leaf, x: jax.Array) -> jax.Array:
    """Gives rows [n, in], which a matrix is to be multiplied by, plane by plane."""
    own = cut(leaf, 1)
    if own.stride == 1:
        return x
    return x.reshape(x.shape[0], -1, own.columns, own.stride).swapaxes(2, 3).reshape(x.shape)


def place(own: Cut, column: Any) -> Any:
    """Gives where `arrange` puts a column."""
    if own.stride == 1:
        return column
    half, inside = column // (own.stride * own.columns), column % (own.stride * own.columns)
    return (half * own.stride + inside % own.stride) * own.columns + inside // own.stride


def load(leaf_ref: Leaf, own: Cut, expert: Any, row: Any, rows: int, number: Any) -> Block:
    """Loads block ``number`` of ``rows`` rows from ``row`` of an expert; beyond the last column it is filled with 0."""
    codes, *scales = (_load(part, expert, row, rows, own.whole) for part in _parts(leaf_ref, own, number))
    return Block(codes, tuple(scales))


def copy(source_ref: Any, target_ref: Any, expert: Any, slot: Any, row: Any, rows: int) -> None:
    """Copies ``rows`` rows of an expert from ``row`` on, of its matrix and its biases (None: it has none). They lie one
    behind the other, and are read so, in whole lines: over the link, what begins within a line takes two requests."""
    for source, target in zip(jax.tree.leaves(source_ref), jax.tree.leaves(target_ref), strict=True):
        if len(source.shape) == 2:  # biases
            target[slot, pl.ds(row, rows)] = source[expert, pl.ds(row, rows)]
            continue
        columns = source.shape[-1]
        width = min(columns & -columns, max(COPIED // rows, 1))
        if width == columns or width * source.dtype.itemsize >= LINE_BYTES:
            _copy_tiles(source, target, (expert, slot), pl.ds(row, rows), width)
        else:
            _copy_flat(source, target, (expert, slot), row, rows)


def _copy_tiles(source_ref: Any, target_ref: Any, experts: tuple[Any, Any], rows: Any, width: int) -> None:
    def tile(number: Any, _: None) -> None:
        columns = pl.ds(number * width, width)
        target_ref[experts[1], rows, columns] = source_ref[experts[0], rows, columns]

    lax.fori_loop(0, source_ref.shape[-1] // width, tile, None)


def _copy_flat(source_ref: Any, target_ref: Any, experts: tuple[Any, Any], row: Any, rows: int) -> None:
    columns, step = source_ref.shape[-1], COPIED_FLAT

    def part(number: Any, _: None) -> None:
        at = number * step + jnp.arange(step, dtype=jnp.int32)
        real, down, along = at < rows * columns, row + at // columns, at % columns
        expert, slot = (jnp.broadcast_to(index, step) for index in experts)
        values = triton.load(source_ref.at[expert, down, along], mask=real, other=0)
        triton.store(target_ref.at[slot, down, along], values, mask=real)

    lax.fori_loop(0, -(-rows * columns // step), part, None)


def entries(x_ref: Any, own: Cut, row: Any, number: Any) -> list[jax.Array]:
    """Loads what block ``number`` of a matrix is multiplied by from ``x_ref`` [n, in], which is arranged: [codes]
    float32 per plane, 0 beyond the last column."""
    firsts = [plane * own.columns + number * own.codes for plane in range(len(own.offsets))]
    if own.whole:
        return [load_entries(x_ref, (row, pl.ds(first, own.codes))) for first in firsts]
    lane = jnp.arange(own.codes, dtype=jnp.int32)
    real = number * own.codes + lane < own.columns
    return [load_entries(x_ref, (row, first + lane), real) for first in firsts]


def weighed(leaf_ref: Leaf, own: Cut, block: Block, x: list[jax.Array]) -> jax.Array:
    """Multiplies a block by ``x`` (`entries`): [rows, `Cut.sums`] float32, which add up to each row's product. What
    shares a scale is added before it is scaled."""
    values, scales = _values(leaf_ref, block.codes), _scales(leaf_ref, block)
    if not scales:
        return values[0] * x[0][None, :]
    total = jnp.float32(0)
    for number, scale in enumerate(scales):
        mine = [value * one[None, :] for value, one, its in zip(values, x, own.scaled, strict=True) if its == number]
        sums = mine[0]
        for product in mine[1:]:
            sums = sums + product
        if own.scales > 1:
            sums = jnp.sum(sums.reshape(sums.shape[0], own.scales, own.group), axis=-1)
        total = total + sums * scale
    return jnp.asarray(total)


def decoded(leaf_ref: Leaf, own: Cut, block: Block) -> list[jax.Array]:
    """Gives what a block stands for, [rows, codes] float32 per plane."""
    values, scales = _values(leaf_ref, block.codes), _scales(leaf_ref, block)
    if not scales:
        return values
    wide = [_spread(scale, own) for scale in scales]
    return [value * wide[its] for value, its in zip(values, own.scaled, strict=True)]


def _values(leaf_ref: Leaf, codes: jax.Array) -> list[jax.Array]:
    """Gives what codes stand for before they are scaled, float32 per plane."""
    if isinstance(leaf_ref, Int8):
        signed = lax.bitcast_convert_type(codes, jnp.int32)
        return [((signed << (24 - 8 * byte)) >> 24).astype(jnp.float32) for byte in BYTES]
    if isinstance(leaf_ref, Int4):
        return [_int4(codes, 8 * byte + 4 * half) for half in range(2) for byte in BYTES]
    if isinstance(leaf_ref, MXFP4):
        return _fp4(codes)
    return [codes.astype(jnp.float32)]


def _scales(leaf_ref: Leaf, block: Block) -> list[jax.Array]:
    """Gives the scales as float32, per row of scales."""
    if isinstance(leaf_ref, MXFP4):
        # 2 ** (exponent - 127) by the bits of a float32; exponent 0, which is 2 ** -127, becomes zero. Beyond
        # 2 ** (127 - MXFP4_EXPONENT) there would be no number.
        bits = block.scales[0].astype(jnp.uint32)
        bits = jnp.where(bits == 0, jnp.uint32(0), (bits + jnp.uint32(MXFP4_EXPONENT)) << 23)
        return [lax.bitcast_convert_type(bits, jnp.float32)]
    return [scale.astype(jnp.float32) for scale in block.scales]


def _spread(scales: jax.Array, own: Cut) -> jax.Array:
    rows, count = scales.shape
    if count == 1:
        return scales
    return jnp.broadcast_to(scales[:, :, None], (rows, count, own.group)).reshape(rows, own.codes)


def _int4(codes: jax.Array, shift: int) -> jax.Array:
    bits = ((codes >> shift) & jnp.uint32(15)) | jnp.uint32(INT4_EXPONENT)
    return lax.bitcast_convert_type(bits, jnp.float32) - INT4_ZERO


def _fp4(codes: jax.Array) -> list[jax.Array]:
    """Gives the eight numbers of a word. What turns one into a float16 turns its neighbour four places on, too, which
    is the float16 in the word's other half: what is done to numbers, not the memory, takes this kernel's time."""
    low, high = [], []
    for shift in range(0, 16, 4):
        sign = _shifted(codes, shift + 3 - 15) & jnp.uint32(0x80008000)
        pair = sign | (_shifted(codes, shift - 9) & jnp.uint32(0x0E000E00))
        low.append(_half(pair))
        high.append(_half(pair >> 16))
    return low + high


def _half(bits: jax.Array) -> jax.Array:
    """Gives the float16 in the lower half of words, as float32."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


def _shifted(codes: jax.Array, right: int) -> jax.Array:
    return codes >> right if right >= 0 else codes << -right


class _Part(NamedTuple):
    """Columns of one of a leaf's arrays that belong to a block."""

    ref: Any
    first: Any
    size: int
    end: int  # columns from here on are none of the plane's


def _parts(leaf_ref: Leaf, own: Cut, number: Any) -> list[_Part]:
    """Gives where a block's codes lie, then its scales of each row of scales."""
    code = number * own.codes
    if not own.group:
        return [_Part(leaf_ref, code, own.codes, own.columns)]
    count, first = own.columns // own.group, 0 if own.group == own.columns else code // own.group
    scales = [
        _Part(leaf_ref.scales, first + its * count, own.scales, (its + 1) * count) for its in range(own.scaled[-1] + 1)
    ]
    return [_Part(leaf_ref.codes, code, own.codes, own.columns), *scales]


def _load(part: _Part, expert: Any, row: Any, rows: int, whole: bool) -> jax.Array:
    if whole:
        return part.ref[expert, pl.ds(row, rows), pl.ds(part.first, part.size)]
    place, mask = _places(part, expert, row, rows)
    return triton.load(part.ref.at[place], mask=mask, other=0)


def _places(part: _Part, expert: Any, row: Any, rows: int) -> tuple[Any, jax.Array]:
    down = jnp.broadcast_to((row + jnp.arange(rows, dtype=jnp.int32))[:, None], (rows, part.size))
    along = jnp.broadcast_to((part.first + jnp.arange(part.size, dtype=jnp.int32))[None, :], (rows, part.size))
    return (expert, down, along), along < part.end
