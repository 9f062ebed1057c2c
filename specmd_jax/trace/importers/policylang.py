"""``moe-policylang``: its JSON Lines or parquet, a row for each token and layer.

A line has ``p`` (prompt), ``t`` (token), ``l`` (layer), ``e`` (experts) and optionally ``ph`` (phase) and ``s`` (scores
of the experts); lines without ``e``, such as its header, are skipped. Parquet (`pip install 'specmd-jax[parquet]'`)
has the same as ``prompt_id``, ``token_idx``, ``layer_idx``, ``selected_experts``, ``phase`` and ``router_scores``.
Scores are taken for gates where every row has one from 0 on for each of its experts. See `token_rows` for what becomes
of the rows.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from specmd_jax.trace.importers.common import read_records
from specmd_jax.trace.importers.joining import UNSAID, Sizes
from specmd_jax.trace.importers.parquet import read_parquet
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.token_rows import Names, Row, is_shares, row_of, trace_of_rows
from specmd_jax.types import Trace

_LINES = Names("t", "l", "e", "p", "ph", "s")
_PARQUET = Names("token_idx", "layer_idx", "selected_experts", "prompt_id", "phase", "router_scores")


def is_policylang(peek: Peek) -> bool:
    return peek.has("p", "t", "l", "e") or peek.has("prompt_id", "token_idx", "layer_idx", "selected_experts")


def import_policylang(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads a trace of moe-policylang; see the module. Raises `SpecmdError` with the file and the line or row."""
    path = Path(path)
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _line_rows(path)
    return trace_of_rows(path, rows, sizes, "moe-policylang", strip)


def _line_rows(path: Path) -> Iterator[Row]:
    for place, record in read_records(path):
        if "e" in record:
            yield _row(place, record, _LINES)


def _parquet_rows(path: Path) -> Iterator[Row]:
    wanted = [name for name in _PARQUET if name is not None]
    for index, record in enumerate(read_parquet(path, wanted[:4], wanted[4:])):
        yield _row(f"{path}, row {index}", record, _PARQUET)


def _row(place: str, record: dict[str, Any], names: Names) -> Row:
    experts, scores = record.get(names.experts), record.get(names.gates or "")
    scored = isinstance(experts, list) and is_shares(scores, len(experts))
    return row_of(place, record, names if scored else names._replace(gates=None))
