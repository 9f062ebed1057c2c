"""Files that are written whole or not at all, and their checksums. Knows nothing of JAX."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from specmd_jax.errors import SpecmdError
from specmd_jax.inputs import read_json


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under `path` only when the block ends without an exception.

    The bytes go to a temporary name beside it, reach the disk and then move into place, so a reader sees the old file
    or the new one, never a part. If the block raises, what `path` held before is still there.

    Raises `SpecmdError` naming `path` if the file cannot be written.
    """
    path = Path(path)
    if "\0" in str(path) or not path.name:
        raise SpecmdError(f"{path}: cannot write: no file can have this name")
    beside = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise SpecmdError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def require_name(path: str | os.PathLike[str]) -> None:
    """Raises `SpecmdError` for a path that the system does not take, such as one that is too long."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise SpecmdError(f"{path}: cannot write: {told}") from error


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Raises `SpecmdError` for a folder that cannot be made or written to, before any work is done for it."""
    require_name(folder)
    place = Path(folder)
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise SpecmdError(f"{folder}: cannot write: {place} is read-only, expected another folder")


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole text file at once as UTF-8, as `whole_file` does."""
    with whole_file(path) as file:
        file.write(text.encode())


def claim(path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
    """Writes as JSON what the run of a folder is, or raises `SpecmdError` if the file says that it is another."""
    path = Path(path)
    if os.path.exists(path):
        found = read_json(path)
        for name, value in run.items():
            if not isinstance(found, dict) or found.get(name) != value:
                before = found.get(name) if isinstance(found, dict) else None
                raise SpecmdError(f"{path}: {name} is {value!r} here but {before!r} there; choose another folder")
        return
    replace_text(path, json.dumps(run, indent=2) + "\n")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Gives the SHA-256 of a file's bytes, in hexadecimal. Raises `SpecmdError` naming a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SpecmdError(f"{path}: cannot read: {error.strerror or error}") from error
