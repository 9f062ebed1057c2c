"""``moe-sim``: its JSON Lines, a row for each token and layer.

A row has ``request_id``, ``phase`` (prefill, decode or unknown), ``token_position``, ``layer_id`` and ``expert_ids``.
See `token_rows` for what becomes of them.
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

_NAMES = Names("token_position", "layer_id", "expert_ids", "request_id", "phase")


def is_moe_sim(peek: Peek) -> bool:
    return peek.has("request_id", "token_position", "layer_id", "expert_ids")


def import_moe_sim(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads moe-sim's JSON Lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    rows = (row_of(place, record, _NAMES) for place, record in read_records(path))
    return trace_of_rows(path, rows, sizes, "moe-sim", strip)
