"""Arrays in ``.npz`` archives: every member is checked against what the archive and its header say before it is read.

Members are stored or deflated, as numpy writes them; their names lead nowhere, and no two are the same. What is read
into memory is bounded by `inputs.allowance`. Arrays of every ``.npy`` version and either order of axes are read.
"""

from __future__ import annotations

import ast
import contextlib
import lzma
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.inputs import allowance, require_file, shown_path

BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,  # a compression method or version that zipfile does not know
    OverflowError,
    RecursionError,
    RuntimeError,  # an encrypted member
    SyntaxError,  # an array header that is no literal
    TypeError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise on a damaged file."""

_MAGIC = b"\x93NUMPY"
_MOST_HEADER = 1 << 16
_READ_BYTES = 1 << 20


class Header(NamedTuple):
    """What an array says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool  # the first axis varies fastest

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    """Gives what numpy and zipfile raise on a damaged array one line."""
    try:
        yield
    except SpecmdError:
        raise
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpecmdError(f"{path}: damaged file: cannot read {name!r}: {reason}") from error


@contextlib.contextmanager
def open_archive(path: str | os.PathLike[str], expected: str, *, whole: bool = True) -> Iterator[zipfile.ZipFile]:
    """Opens a zip whose members can be trusted as far as they are named and sized.

    Args:
      expected: what should be there, for messages.
      whole: all of it will be read into memory, so that all of it must be within the file's `allowance`.

    Raises `SpecmdError` for a file that is not there, cannot be read or is no whole zip.
    """
    path = Path(path)
    size = require_file(path, expected)
    with reading(path, "its directory"):
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                starts_as_zip = file.read(4) == b"PK\x03\x04"
            why = "truncated zip" if starts_as_zip else f"not a zip, expected {expected}"
            raise SpecmdError(f"{shown_path(path)}: {why}")
        with zipfile.ZipFile(path) as archive:
            check_members(archive, path)
            if whole and (total := sum(entry.file_size for entry in archive.infolist())) > allowance(size):
                raise SpecmdError(
                    f"{path}: unpacks to {total} bytes, expected at most {allowance(size)} of a file of {size} bytes"
                )
            yield archive


def check_members(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises `SpecmdError` for names that lead elsewhere or come twice, and for members packed in another way."""
    seen = set[str]()
    for entry in archive.infolist():
        name = entry.filename
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise SpecmdError(f"{path}: member {name[:100]!r} leads out of the archive, expected plain names")
        if name in seen:
            raise SpecmdError(f"{path}: member {name[:100]!r} is there twice, expected each name once")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SpecmdError(
                f"{path}: member {name[:100]!r} is packed by method {entry.compress_type}, expected stored or deflated"
            )
        seen.add(name)


def arrays_of(path: str | os.PathLike[str], expected: str = "arrays of numpy (.npz)") -> dict[str, npt.NDArray[Any]]:
    """Reads a whole archive: name -> array, in its order. Raises `SpecmdError`, naming the array."""
    with open_archive(path, expected) as archive:
        return {entry.filename.removesuffix(".npy"): member_array(archive, entry, path) for entry in archive.infolist()}


def member_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Reads one array, up to its checksum."""
    name = entry.filename.removesuffix(".npy")
    with reading(path, name), archive.open(entry) as file:
        return read_array(file, entry.file_size, name, str(path))


def read_array(file: IO[bytes], size: int, name: str, place: str) -> npt.NDArray[Any]:
    """Reads the array that begins here, of `size` bytes with its header. Raises `SpecmdError` or one of `BROKEN`."""
    array = take(file, read_header(file, size, name, place))
    if file.read(1):  # the checksum is compared at the very end
        raise ValueError("bytes behind its end")
    return array


def read_header(file: IO[bytes], size: int, name: str, place: str) -> Header:
    """Reads what the array that begins here says of itself; `file` then stands at its first entry.

    Args:
      size: bytes of the header and the array.
    Raises:
      SpecmdError: pickled objects, another version, a shape that is none or does not take the bytes that there are.
        Of damaged bytes one of `BROKEN`.
    """
    start = file.read(8)
    if len(start) < 8 or start[:6] != _MAGIC:
        raise ValueError("not an array of numpy (.npy)")
    version = (start[6], start[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise SpecmdError(f"{place}: array {name!r} is of .npy version {version}, expected 1.0, 2.0 or 3.0")
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(file.read(width), "little")
    if length > min(_MOST_HEADER, size):
        raise ValueError(f"a header of {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise EOFError("it ends within its header")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser, about escapes and literals
        said = ast.literal_eval(text.decode("utf-8" if version == (3, 0) else "latin1").strip())
    if not isinstance(said, dict) or said.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("a header without descr, fortran_order and shape")
    shape, fortran, dtype = said["shape"], said["fortran_order"], np.lib.format.descr_to_dtype(said["descr"])
    if dtype.hasobject:
        raise SpecmdError(f"{place}: array {name!r} holds a pickled object, expected plain numbers")
    if type(fortran) is not bool:
        raise ValueError("fortran_order is neither True nor False")
    if not isinstance(shape, tuple) or not all(type(axis) is int and 0 <= axis < 1 << 62 for axis in shape):
        raise ValueError("its shape is no tuple of whole numbers")
    if len(shape) > 32 or not dtype.itemsize:
        raise ValueError("its type takes no bytes" if not dtype.itemsize else "more than 32 axes")
    header = Header(shape, dtype, fortran and len(shape) > 1)
    found = size - 8 - width - length
    if header.nbytes != found:
        raise ValueError(f"{found} bytes, and its header says {dtype} {list(shape)}")
    return header


def take(file: IO[bytes], header: Header) -> npt.NDArray[Any]:
    """Gives the next entries of an array, in the machine's byte order and C order. Raises EOFError if they lack."""
    array = np.empty(header.shape[::-1] if header.fortran else header.shape, header.dtype)
    flat = array.reshape(-1).view(np.uint8)
    at = 0
    while at < flat.size:
        part = file.read(min(_READ_BYTES, flat.size - at))
        if not part:
            raise EOFError("it ends before its last entry")
        flat[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    array = np.ascontiguousarray(array.T) if header.fortran else array
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
