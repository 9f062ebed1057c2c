"""``mer``: what MER writes with ``--trace-out``, JSON Lines with a row for each token and layer.

A row has ``token``, ``layer`` and ``experts``; what its cache hit and predicted (``cache_hit``, ``predicted``) is not
read, as it is of that cache. See `token_rows` for what becomes of the rows.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from specmd_jax.trace.importers.common import read_records
from specmd_jax.trace.importers.joining import UNSAID, Sizes
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.token_rows import Names, row_of, trace_of_rows
from specmd_jax.types import Trace

_NAMES = Names("token", "layer", "experts")


def is_mer(peek: Peek) -> bool:
    return peek.has("token", "layer", "experts") and not peek.has("record_type")


def import_mer(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads a trace of MER; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    rows = (row_of(place, record, _NAMES) for place, record in read_records(path))
    return trace_of_rows(path, rows, sizes, "MER --trace-out", strip)
