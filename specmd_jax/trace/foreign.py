"""What the importers of foreign formats share."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.store import BROKEN

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_text(path: Path) -> str:
    """Text of a file, unpacked if its name ends in .gz or .xz."""
    require_file(path)
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, *BROKEN) as error:
        raise SpecmdError(f"{path}: cannot read: {' '.join(str(error).split())}") from error


def require_file(path: Path) -> None:
    """Raises `SpecmdError` unless `path` is a file."""
    if not path.exists():
        raise SpecmdError(f"{path}: no such file")
    if not path.is_file():
        raise SpecmdError(f"{path}: not a file")


def brief(value: Any) -> str:
    """`value` on one line, short enough for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
