"""Reading the safetensors format without its library.

A file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the bytes
of the tensors. Files are mapped, not read: a tensor is a view of the page cache and costs no memory of its own.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError

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
        try:
            header = json.loads(self._bytes[_LENGTH_BYTES:data])
            header.pop("__metadata__", None)
            places = {
                name: _Place(entry["dtype"], tuple(entry["shape"]), *(data + int(at) for at in entry["data_offsets"]))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SpecmdError(f"{self.path}: not a safetensors file, its header is no table of tensors") from None
        for name, place in places.items():
            if place.end > size:
                raise SpecmdError(f"{self.path}: truncated, {name} ends at byte {place.end} but the file has {size}")
            dtype = DTYPES.get(place.dtype)
            if dtype is not None and int(np.prod(place.shape)) * dtype.itemsize != place.end - place.start:
                raise SpecmdError(
                    f"{self.path}: {name} has {place.end - place.start} bytes, "
                    f"which is not {place.dtype} {list(place.shape)}"
                )
        return places

    def read(self, name: str) -> npt.NDArray[Any]:
        """Gives a read-only view of a tensor; it stays valid as long as it is referenced."""
        place = self.tensors[name]
        dtype = DTYPES.get(place.dtype)
        if dtype is None:
            raise SpecmdError(f"{self.path}: {name} has type {place.dtype}, expected one of {', '.join(DTYPES)}")
        count = int(np.prod(place.shape))
        return np.frombuffer(self._bytes, dtype, count, place.start).reshape(place.shape)
