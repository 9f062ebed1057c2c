"""Routed experts as servers send them: arrays [T, L, K] in one of the ways that are in use.

* nested lists;
* base64 of a ``.npy`` file (vLLM);
* base64 of bare little-endian numbers, int32 unless their type is said, of a shape that is not (SGLang);
* an object ``{data, shape, dtype}`` with base64 of bare numbers, uint8 unless it says another type (prime-rl,
  verifiers, Dynamo), and ``start``, the first token that it has;
* ``nrlre1:<dtype>:<T>x<L>x<K>:<base64>`` (NeMo Gym).
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from specmd_jax.archives import BROKEN, read_array
from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, id_cells

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
_NPY, _ENVELOPE = b"\x93NUMPY", "nrlre1:"
_LARGEST = 1 << 31  # numbers of an array: a header that says more is no routing


class Routed(NamedTuple):
    """Ids [T, L, K], or bare [T * L * K] if nothing says the shape."""

    ids: npt.NDArray[np.int64]
    start: int = 0


def routed(value: Any, place: str, dtype: str | None = None) -> Routed | None:
    """Reads routed experts; None stays None.

    Args:
      dtype: of bare numbers; None: there must be none.
    Raises:
      SpecmdError: names `place` and what was expected.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        return _object(value, place)
    if not isinstance(value, str):
        return Routed(id_cells(value, place))
    if value.startswith(_ENVELOPE):
        return _envelope(value, place)
    content = from_base64(value, place, "" if dtype else " of a .npy file")
    if content.startswith(_NPY):
        return Routed(id_cells(_npy(content, place), place))
    if dtype is None:
        raise SpecmdError(f"{place} is text, expected base64 of a .npy file: found {len(content)} other bytes")
    kind = _dtype(dtype, f"{place}_dtype")
    if len(content) % kind.itemsize:
        raise SpecmdError(f"{place} has {len(content)} bytes, expected a multiple of {kind.itemsize} ({kind.name})")
    return Routed(np.frombuffer(content, kind).astype(np.int64))


def shaped(ids: npt.NDArray[np.int64], tokens: int, top_k: int, place: str) -> npt.NDArray[np.int64]:
    """Gives bare numbers the shape [T, L, K]."""
    if ids.ndim == 3:
        return ids
    if tokens < 1 or ids.size % (tokens * top_k) or not ids.size:
        raise SpecmdError(
            f"{place} has {ids.size} numbers, expected a multiple of {tokens} x {top_k} (tokens and top_k)"
        )
    return ids.reshape(tokens, -1, top_k)


def from_base64(text: str, place: str, of: str = "") -> bytes:
    """Gives the bytes of base64 text."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SpecmdError(f"{place} is text, expected base64{of}: {error}") from error


def _object(value: dict[str, Any], place: str) -> Routed:
    data, shape, start = value.get("data"), value.get("shape"), value.get("start", 0)
    if not is_shape(shape):
        raise SpecmdError(f"{place}: shape is {brief(shape)}, expected [tokens, layers, k]")
    if type(start) is not int or not 0 <= start < _LARGEST:
        raise SpecmdError(f"{place}: start is {brief(start)}, expected an integer >= 0")
    if isinstance(data, list):
        flat = np.array(data, np.int64) if all(type(one) is int and abs(one) < _LARGEST for one in data) else None
        if flat is None:
            raise SpecmdError(f"{place}: data is {brief(data)}, expected integers")
    elif isinstance(data, str):
        kind = _dtype(value.get("dtype", "uint8"), f"{place}: dtype")
        content = from_base64(data, f"{place}: data")
        if content.startswith(_NPY):
            return Routed(id_cells(_npy(content, place), place), start)
        if len(content) != math.prod(shape) * kind.itemsize:
            raise SpecmdError(
                f"{place}: data has {len(content)} bytes, expected {math.prod(shape) * kind.itemsize} "
                f"({kind.name} {shape})"
            )
        flat = np.frombuffer(content, kind).astype(np.int64)
    else:
        raise SpecmdError(f"{place}: data is {brief(data)}, expected base64 text or integers")
    if flat.size != math.prod(shape):
        raise SpecmdError(f"{place}: data has {flat.size} numbers, expected {math.prod(shape)} (shape {shape})")
    return Routed(flat.reshape(shape), start)


def is_shape(shape: Any) -> TypeGuard[list[int]]:
    """Whether it is [T, L, K] of sensible size."""
    return (
        isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(type(axis) is int and axis >= 1 for axis in shape)
        and math.prod(shape) < _LARGEST
    )


def _envelope(text: str, place: str) -> Routed:
    parts = text.split(":", 3)
    axes = parts[2].split("x") if len(parts) == 4 else []
    shape = [int(axis) for axis in axes if axis.isascii() and axis.isdecimal() and len(axis) < 12]
    if len(axes) != len(shape) or not is_shape(shape):
        raise SpecmdError(f"{place} is {brief(text)}, expected {_ENVELOPE}<dtype>:<T>x<L>x<K>:<base64>")
    return _object({"data": parts[3], "shape": shape, "dtype": parts[1]}, place)


def _dtype(name: Any, place: str) -> np.dtype[Any]:
    plain = name.removeprefix("torch.").removeprefix("np.").lower() if isinstance(name, str) else name
    if plain not in DTYPES:
        raise SpecmdError(f"{place} is {brief(name)}, expected one of {', '.join(DTYPES)}")
    return np.dtype(plain).newbyteorder("<")


def _npy(content: bytes, place: str) -> npt.NDArray[Any]:
    try:
        return read_array(io.BytesIO(content), len(content), "it", place)
    except BROKEN as error:
        raise SpecmdError(f"{place} is text, expected base64 of a .npy file: {' '.join(str(error).split())}") from error
