"""moe-policylang's JSON Lines, a row for each token and layer.

A row has ``p`` (prompt), ``t`` (token), ``l`` (layer), ``e`` (experts) and optionally ``ph`` (phase); lines without
``e``, such as its header, are skipped. See `token_rows` for what becomes of the rows.
"""

from __future__ import annotations

import os
from pathlib import Path

from specmd_jax.trace.importers.common import UNSAID, Sizes, read_records
from specmd_jax.trace.importers.token_rows import row_of, trace_of_rows
from specmd_jax.types import Trace


def import_policylang(path: str | os.PathLike[str], sizes: Sizes = UNSAID) -> Trace:
    """Reads moe-policylang's JSON Lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    rows = (row_of(place, record, ("p", "ph", "t", "l", "e")) for place, record in read_records(path) if "e" in record)
    return trace_of_rows(path, rows, sizes, "moe-policylang")
