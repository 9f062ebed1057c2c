"""Expert matrices at several precisions: encoding on the host, products on the device, exact bytes.

A matrix is ``[out, in]``. A *leaf* is a plain array (float32, bfloat16, float16) or one of the encoded forms below;
all are pytrees, so a stack of matrices is the same leaf with leading axes.

=========  ==============================================  ===================================
precision  codes                                           scales
=========  ==============================================  ===================================
int8       `Int8`: int8 in -127..127                       bfloat16, one per row or group
int4       `Int4`: -7..7 stored + 8, two per byte          bfloat16, one per group (default 32)
int2       `Int2`: -1.5, -0.5, 0.5, 1.5, four per byte     bfloat16, one per group (default 32)
mxfp4      `MXFP4`: 4-bit floats (e2m1), two per byte      8-bit exponents, one per block of 32
=========  ==============================================  ===================================

int8 and int4 are symmetric with the scale rounded *up* to bfloat16, so no value is clipped and each decoded entry lies
within half a scale of the original. int2 has no zero but that of a group of zeros, and clips: of the scales of
`INT2_SHARES` each group takes the one with the least squared error, the largest of equal ones. mxfp4 (OCP Microscaling
Formats 1.0) is only read from checkpoints that have it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
from jax import lax

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.moe.model.config import FLOATS

BITS: dict[str, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4, "mxfp4": 4, "int2": 2}
"""Precisions by name -> bits of one code (scales come on top: see `matrix_spec`)."""

INT4_GROUP = 32
INT2_GROUP = 32
INT2_SHARES = np.linspace(1.0, 0.3, 15, dtype=np.float32)
"""Of the scale that clips nothing, which is a group's largest entry over 1.5."""
MX_BLOCK = 32
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Int8(NamedTuple):
    codes: Any  # [.., out, in] int8
    scales: Any  # [.., out, groups] bfloat16


class Int4(NamedTuple):
    codes: Any  # [.., out, in / 2] uint8: low half-byte is entry i, high half-byte entry in / 2 + i
    scales: Any  # [.., out, groups] bfloat16


class Int2(NamedTuple):
    codes: Any  # [.., out, in / 4] uint8: entry 4 i + j in bits 2 j and 2 j + 1
    scales: Any  # [.., out, groups] bfloat16


class MXFP4(NamedTuple):
    codes: Any  # [.., out, in / 2] uint8: low half-byte is entry 2 i, high half-byte entry 2 i + 1
    scales: Any  # [.., out, in / 32] uint8: exponent + 127


Leaf = Any
"""A float array, `Int8`, `Int4`, `Int2` or `MXFP4`."""


def words(leaf: Leaf) -> Leaf:
    """Gives the same matrix (numpy leaves) with its codes as uint32 *words* of four bytes, the first one lowest, where
    a row's bytes are whole words: what kernels read. Everything here takes either."""
    if not isinstance(leaf, Int8 | Int4 | Int2 | MXFP4) or leaf.codes.shape[-1] % 4:
        return leaf
    return leaf._replace(codes=np.ascontiguousarray(leaf.codes).view("<u4"))


def is_words(leaf: Leaf) -> bool:
    """Says whether the codes of an encoded matrix (arrays or shapes) are words."""
    return leaf.codes.dtype == np.uint32


def _bytes(leaf: Leaf) -> jax.Array:
    """Gives the codes, a byte each."""
    if not is_words(leaf):
        return leaf.codes
    kind = jnp.int8 if isinstance(leaf, Int8) else jnp.uint8
    parts = lax.bitcast_convert_type(leaf.codes, kind)
    return parts.reshape(*parts.shape[:-2], -1)


def matrix_spec(rows: int, columns: int, precision: str, group: int | None = None) -> Leaf:
    """Gives the leaf of a [rows, columns] matrix as `jax.ShapeDtypeStruct`: shapes and types, no memory.

    Args:
        precision: a key of `BITS`.
        group: columns that share a scale; None: a whole row for int8, 32 for int4 and int2.
    Raises:
        SpecmdError: unknown precision, or columns that do not divide into the groups.
    """

    def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

    if precision not in BITS:
        raise unknown("precision", precision, BITS)
    if precision in FLOATS:
        return spec((rows, columns), FLOATS[precision])
    group = _group(columns, precision, group)
    groups = columns // group
    if precision == "int8":
        return Int8(spec((rows, columns), np.int8), spec((rows, groups), _BFLOAT16))
    if precision == "int4":
        return Int4(spec((rows, columns // 2), np.uint8), spec((rows, groups), _BFLOAT16))
    if precision == "int2":
        return Int2(spec((rows, columns // 4), np.uint8), spec((rows, groups), _BFLOAT16))
    return MXFP4(spec((rows, columns // 2), np.uint8), spec((rows, groups), np.uint8))


def tree_bytes(tree: Any) -> int:
    """Gives the exact bytes of all arrays (or shape structs) of a pytree."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _group(columns: int, precision: str, group: int | None) -> int:
    if precision == "mxfp4":
        group = MX_BLOCK
    elif group is None:
        group = {"int8": columns, "int4": INT4_GROUP, "int2": INT2_GROUP}[precision]
    # int4 keeps the two halves of a row in the halves of a byte: a group must not straddle the middle
    whole = columns // 2 if precision == "int4" else columns
    if group < 1 or whole % group or columns % (4 if precision == "int2" else 2):
        raise SpecmdError(f"{precision} with groups of {group} does not divide a row of {columns} columns")
    return group


def quantize(matrix: npt.NDArray[Any], precision: str, group: int | None = None) -> Leaf:
    """Encodes a float matrix [out, in] on the host; numpy leaves.

    Raises:
        SpecmdError: as `matrix_spec`; mxfp4 (read from checkpoints only); a value that is not finite.
    """
    if precision == "mxfp4":
        raise SpecmdError("mxfp4 experts can only be read from a checkpoint that holds them (choose int4)")
    rows, columns = matrix.shape
    spec = matrix_spec(rows, columns, precision, group)
    if precision in FLOATS:
        return matrix.astype(FLOATS[precision])
    groups = spec.scales.shape[-1]
    grouped = matrix.astype(np.float32).reshape(rows, groups, columns // groups)
    largest = 127 if precision == "int8" else 7
    peak = np.abs(grouped).max(axis=-1)
    if not np.isfinite(peak).all():
        raise SpecmdError(f"cannot encode as {precision}: the matrix holds values that are not finite")
    if precision == "int2":
        return _int2(grouped, peak)
    scales = _round_up((peak / largest).astype(np.float32))
    divisor = np.where(scales == 0, 1, scales).astype(np.float32)[:, :, None]
    codes = np.rint(grouped / divisor).reshape(rows, columns)
    if precision == "int8":
        return Int8(codes.astype(np.int8), scales)
    nibbles = (codes + 8).astype(np.uint8)
    return Int4(nibbles[:, : columns // 2] | (nibbles[:, columns // 2 :] << 4), scales)


def _int2(grouped: npt.NDArray[np.float32], peak: npt.NDArray[np.float32]) -> Int2:
    """Encodes groups [out, groups, columns of a group] whose largest entries are ``peak``."""
    least = np.full(peak.shape, np.inf, np.float32)
    scales, codes = np.zeros(peak.shape, _BFLOAT16), np.zeros(grouped.shape, np.uint8)
    for share in INT2_SHARES:
        tried = _round_up((peak / np.float32(1.5) * share).astype(np.float32))
        scale = tried.astype(np.float32)[:, :, None]
        found = np.clip(np.rint(grouped / np.where(scale == 0, 1, scale) + 1.5), 0, 3).astype(np.float32)
        error = np.square((found - np.float32(1.5)) * scale - grouped).sum(axis=-1)
        better = error < least
        least, scales = np.where(better, error, least), np.where(better, tried, scales)
        codes = np.where(better[:, :, None], found.astype(np.uint8), codes)
    quads = codes.reshape(len(grouped), -1, 4)
    return Int2(quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6, scales)


def _round_up(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Rounds each (non-negative) value up to a bfloat16: bfloat16 is the upper half of a float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16).view(_BFLOAT16)


def matmul(x: jax.Array, leaf: Leaf) -> jax.Array:
    """Computes ``x @ matrix.T``: [n, in] by a leaf [out, in] -> [n, out] float32.

    One token (n = 1) is a multiply and a sum along rows, in float32, which an accelerator's compiler fuses with the
    decoding and with the indexing that picked the matrix: each weight is read once, nothing is written back. More
    tokens decode to ``x.dtype`` and use the matrix units.
    """
    parts = column_blocks(leaf)
    pieces = jnp.split(x, len(parts), axis=-1)
    total = _product(pieces[0], parts[0])
    for piece, part in zip(pieces[1:], parts[1:], strict=True):
        total = total + _product(piece, part)
    return total


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    if x.shape[0] == 1:
        return jnp.sum(matrix.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)[None, :]
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, matrix.astype(x.dtype), contract, preferred_element_type=jnp.float32)


def column_blocks(leaf: Leaf) -> list[jax.Array]:
    """The matrix [.., out, in] that a leaf stands for, as one or two blocks of columns: int4 decodes to two halves that
    need no interleaving."""
    if isinstance(leaf, Int8):
        return [_scaled(_bytes(leaf).astype(jnp.float32), leaf.scales)]
    if isinstance(leaf, Int4):
        codes = _bytes(leaf)
        low = (codes & jnp.uint8(15)).astype(jnp.float32) - 8.0
        high = (codes >> jnp.uint8(4)).astype(jnp.float32) - 8.0
        low_scales, high_scales = jnp.split(leaf.scales, 2, axis=-1)
        return [_scaled(low, low_scales), _scaled(high, high_scales)]
    if isinstance(leaf, Int2):
        codes = _bytes(leaf)
        quads = jnp.stack([codes >> jnp.uint8(shift) & jnp.uint8(3) for shift in (0, 2, 4, 6)], axis=-1)
        return [_scaled(quads.reshape(*codes.shape[:-1], -1).astype(jnp.float32) - 1.5, leaf.scales)]
    if isinstance(leaf, MXFP4):
        codes = _bytes(leaf)
        pair = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1)
        values = jnp.asarray(FP4_VALUES, jnp.float32)[pair.reshape(*codes.shape[:-1], -1)]
        # 2 ** (exponent - 127) by the bits of a float32; exponent 0, which is 2 ** -127, becomes zero
        bits = leaf.scales.astype(jnp.uint32) << jnp.uint32(23)
        return [_scaled(values, lax.bitcast_convert_type(bits, jnp.float32))]
    return [leaf]


def _scaled(values: jax.Array, scales: jax.Array) -> jax.Array:
    columns, groups = values.shape[-1], scales.shape[-1]
    grouped = values.reshape(*values.shape[:-1], groups, columns // groups)
    return (grouped * scales.astype(jnp.float32)[..., None]).reshape(values.shape)
