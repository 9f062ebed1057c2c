"""Reading of files that others wrote: plain ones, packed ones and JSON. Whatever is wrong with one is a `SpecmdError`.

What a file may ask for is bounded by its own size (`allowance`), so that no small file fills the memory.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from specmd_jax.errors import SpecmdError, shown

MOST_TIMES = 200
"""A file may unpack to so many times its size ..."""
FREE_BYTES = 64 << 20
"""... and so many bytes on top, so that small files may repeat themselves."""
MOST_JSON_BYTES = 1 << 30
"""No JSON is larger: parsed it would take some ten times as much."""

_READ_BYTES = 1 << 20
_XZ_BYTES = 256 << 20  # that unpacking may work with: `xz -9` asks for 65 MiB
_LONG_NUMBER = re.compile(r"\d{19}|[eE]\+?\d{3}")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def allowance(packed_bytes: int) -> int:
    """Gives the bytes that a file of this size may unpack to."""
    return FREE_BYTES + MOST_TIMES * packed_bytes


def require_file(path: str | os.PathLike[str], expected: str = "") -> int:
    """Gives the size of a file in bytes.

    Raises `SpecmdError` for what is not there or is none: a folder, a pipe (which would never end), a name that no
    file can have. `expected` says what should be there.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise SpecmdError(f"{shown_path(path)}: no such file") from None
    except OSError as error:
        raise SpecmdError(f"{shown_path(path)}: cannot read: {error.strerror or error}") from error
    except ValueError:  # a zero byte, half a character
        raise SpecmdError(f"{shown_path(path)}: no such file: no file can have this name") from None
    if not stat.S_ISREG(status.st_mode):
        raise SpecmdError(f"{shown_path(path)}: not a file" + (f", expected {expected}" if expected else ""))
    return status.st_size


def shown_path(path: str | os.PathLike[str]) -> str:
    """Gives a path as a message says it: whole, unless it is longer than any path may be."""
    text = os.fspath(path)
    return text if len(text) <= 500 else f"{text[:100]}...{text[-100:]}"


def read_bytes(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """Gives the bytes of a file, unpacked if its name ends in .gz or .xz.

    Raises `SpecmdError` for a file that cannot be read, is damaged, or is larger than `most` bytes (unpacked: than its
    `allowance`).
    """
    size = require_file(path)
    if most is not None and size > most:
        raise SpecmdError(f"{path}: {size} bytes, expected at most {most}")
    return _read(path, size)


def head_of(path: str | os.PathLike[str], count: int = 1 << 20) -> bytes:
    """Gives the first bytes of a file, unpacked if its name ends in .gz or .xz; else as `read_bytes`."""
    return _read(path, require_file(path), count)


def _read(path: str | os.PathLike[str], size: int, count: int = -1) -> bytes:
    """`count`: bytes that are wanted, about; -1: all."""
    unpack = {".gz": _gunzip, ".xz": _unxz}.get(Path(path).suffix)
    try:
        with open(path, "rb") as file:
            if unpack is None:
                return file.read(count)
            limit, parts, total = allowance(size), list[bytes](), 0
            for part in unpack(file):
                parts.append(part)
                total += len(part)
                if 0 <= count <= total:
                    break
                if total > limit:
                    raise SpecmdError(
                        f"{path}: unpacks to more than {limit} bytes, {MOST_TIMES} times its size: expected no more"
                    )
            whole = b"".join(parts)
            return whole if count < 0 else whole[:count]
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise SpecmdError(f"{path}: cannot read: {reason}") from error


def read_text(path: str | os.PathLike[str], most: int | None = None) -> str:
    """Gives the UTF-8 text of a file, with line ends as they come; else as `read_bytes`."""
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecmdError(f"{path}: cannot read: {error}, expected UTF-8 text") from error


def read_json(path: str | os.PathLike[str], most: int = MOST_JSON_BYTES) -> Any:
    """Gives what a file holds as JSON; see `read_text` and `parse_json`."""
    return parse_json(read_text(path, most), str(path))


def parse_json(text: str | bytes, place: str, *, constants: bool = True) -> Any:
    """Reads JSON from a place that messages name.

    Raises `SpecmdError` for what is none, and for what would be trouble later on: lists in lists without end, numbers
    beyond 64 bits (or, of floats, beyond any float), halves of characters, and NaN and infinities unless `constants`.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SpecmdError(f"{place}: {error}, expected JSON") from error
    checks: dict[str, Any] = {} if constants else {"parse_constant": _no_constant}
    if _LONG_NUMBER.search(text):
        checks |= {"parse_int": _integer, "parse_float": _float}
    try:
        value = json.loads(text, **checks)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise SpecmdError(f"{place}{line}: {error.msg}, expected JSON") from error
    except UnicodeEncodeError as error:
        raise SpecmdError(f"{place}: half a character ({shown(error.object[error.start])}), expected text") from error
    except (RecursionError, MemoryError) as error:
        raise SpecmdError(f"{place}: nested too deeply, expected plain JSON") from error
    except ValueError as error:
        raise SpecmdError(f"{place}: {error}, expected JSON") from error
    return value


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"the number {shown(digits)} is beyond 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {shown(digits)} is beyond any float")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    import gzip

    with gzip.GzipFile(fileobj=file) as packed:
        while part := packed.read(_READ_BYTES):
            yield part


def _unxz(file: BinaryIO) -> Iterator[bytes]:
    """Unpacks in bounded memory, whatever dictionary the file asks for; a file may be several, one after the other."""
    left = file.read()
    while left.strip(b"\0"):
        unpacker = lzma.LZMADecompressor(memlimit=_XZ_BYTES)
        while not unpacker.eof:
            part = unpacker.decompress(left, _READ_BYTES)
            left = b""
            if part:
                yield part
            elif unpacker.needs_input:
                raise EOFError("it ends before its end was marked")
        left = unpacker.unused_data
