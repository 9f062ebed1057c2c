"""Reading parquet, through pyarrow if it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import require_file

_ROWS = 1 << 14  # read at once


def parquet_file(path: Path) -> Any:
    """Opens a parquet file. Raises `SpecmdError` without pyarrow, or for another file."""
    require_file(path)
    try:
        library: Any = importlib.import_module("pyarrow.parquet")
        errors: Any = importlib.import_module("pyarrow.lib")
    except ImportError as error:
        raise SpecmdError(f"{path}: needs pyarrow to be read (pip install 'specmd-jax[parquet]')") from error
    try:
        return library.ParquetFile(path)
    except (OSError, ValueError, errors.ArrowException) as error:
        raise SpecmdError(f"{path}: cannot read: {' '.join(str(error).split())[:200]}") from error


def read_parquet(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Gives the rows of a parquet file as plain objects of these columns. Raises `SpecmdError`, naming what lacks."""
    file = parquet_file(path)
    there = file.schema_arrow.names
    for name in needed:
        if name not in there:
            raise SpecmdError(f"{path}: column {name!r} is missing (found: {', '.join(there)})")
    wanted = [name for name in (*needed, *optional) if name in there]
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are ValueError, too
        raise SpecmdError(f"{path}: cannot read: {' '.join(str(error).split())[:200]}") from error
