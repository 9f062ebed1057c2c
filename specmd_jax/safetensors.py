"""Reading and writing the safetensors format without its library.

A file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the bytes
of the tensors. Files are mapped, not read: a tensor is a view of the page cache and costs no memory of its own.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError, shown
from specmd_jax.files import whole_file
from specmd_jax.inputs import parse_json, require_file

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LENGTH_BYTES = 8
MOST_HEADER = 100 << 20
"""Bytes of a header: the format allows no more."""


class _Place(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


class TensorFile:
    """One mapped file; `tensors` says what is in it, `read` gives a view.

    Raises SpecmdError, naming the file, when it is no safetensors file or is shorter than its header says.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        require_file(self.path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < _LENGTH_BYTES:
                    raise SpecmdError(f"{self.path}: truncated, {size} bytes cannot hold a safetensors header")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SpecmdError(f"{self.path}: cannot be read ({error.strerror})") from None
        self.tensors: dict[str, _Place] = self._header(size)

    def _header(self, size: int) -> dict[str, _Place]:
        data = _LENGTH_BYTES + int.from_bytes(self._bytes[:_LENGTH_BYTES], "little")
        if data > size:
            raise SpecmdError(f"{self.path}: truncated, its header should end at byte {data} but the file has {size}")
        if data > MOST_HEADER:
            raise SpecmdError(f"{self.path}: a header of {data} bytes, expected at most {MOST_HEADER}")
        header = parse_json(self._bytes[_LENGTH_BYTES:data], f"{self.path}: not a safetensors file, its header")
        if not isinstance(header, dict):
            raise SpecmdError(f"{self.path}: not a safetensors file, its header is no table of tensors")
        header.pop("__metadata__", None)
        return {name: self._place(name, entry, data, size) for name, entry in header.items()}

    def _place(self, name: str, entry: Any, data: int, size: int) -> _Place:
        """Gives where a tensor lies, checked against the file, whose tensors begin at byte `data`."""
        entry = entry if isinstance(entry, dict) else {}
        kind, shape, at = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(kind, str) or not _are_counts(shape) or not _are_counts(at) or len(at) != 2:
            raise SpecmdError(
                f"{self.path}: not a safetensors file, its header has {shown(name)}: {shown(entry)}, "
                "expected dtype, shape and data_offsets"
            )
        place = _Place(kind, tuple(shape), data + at[0], data + at[1])
        if place.end > size:
            raise SpecmdError(f"{self.path}: truncated, {name} ends at byte {place.end} but the file has {size}")
        dtype = DTYPES.get(place.dtype)
        wrong = dtype is not None and math.prod(shape) * dtype.itemsize != place.end - place.start
        if place.start > place.end or wrong:
            raise SpecmdError(
                f"{self.path}: {name} has {place.end - place.start} bytes, "
                f"which is not {place.dtype} {list(place.shape)}"
            )
        return place

    def read(self, name: str) -> npt.NDArray[Any]:
        """Gives a read-only view of a tensor; it stays valid as long as it is referenced."""
        place = self.tensors[name]
        dtype = DTYPES.get(place.dtype)
        if dtype is None:
            raise SpecmdError(f"{self.path}: {name} has type {place.dtype}, expected one of {', '.join(DTYPES)}")
        count = math.prod(place.shape)
        return np.frombuffer(self._bytes, dtype, count, place.start).reshape(place.shape)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 62 for one in value)


def write(path: str | os.PathLike[str], tensors: Mapping[str, npt.NDArray[Any]], told: Mapping[str, str]) -> None:
    """Writes a file whole, tensors in order, ``told`` as its metadata. Raises SpecmdError as `whole_file`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(told)}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())
