"""moe-sim's JSON Lines, a row for each token and layer.

A row has ``request_id``, ``phase`` (prefill, decode or unknown), ``token_position``, ``layer_id`` and ``expert_ids``.
See `token_rows` for what becomes of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from specmd_jax.trace.importers.common import UNSAID, Sizes, read_records
from specmd_jax.trace.importers.token_rows import row_of, trace_of_rows
from specmd_jax.types import Trace


def import_moe_sim(path: str | os.PathLike[str], sizes: Sizes = UNSAID) -> Trace:
    """Reads moe-sim's JSON Lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    names = ("request_id", "phase", "token_position", "layer_id", "expert_ids")
    return trace_of_rows(path, (row_of(place, record, names) for place, record in read_records(path)), sizes, "moe-sim")
