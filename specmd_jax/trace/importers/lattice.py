"""``lattice``: its JSON Lines, a row for each token and layer.

A row has ``token_idx``, ``layer_idx``, ``selected_ids`` and optionally ``gate_weights``; other fields are not read. No
field tells requests or prompts apart. See `token_rows` for what becomes of the rows.
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

_NAMES = Names("token_idx", "layer_idx", "selected_ids", gates="gate_weights")


def is_lattice(peek: Peek) -> bool:
    return peek.has("token_idx", "layer_idx", "selected_ids")


def import_lattice(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads lattice's JSON Lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    rows = (row_of(place, record, _NAMES) for place, record in read_records(path))
    return trace_of_rows(path, rows, sizes, "lattice", strip)
