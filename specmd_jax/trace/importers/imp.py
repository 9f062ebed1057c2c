"""``imp-json``: imp's ``moe_expert_trace``.

An object with ``top_k`` and ``moe_expert_trace`` (or ``trace``, ``entries``, ``data``): a flat list in which each
layer's number comes before its experts, or a list of such ``[layer, expert, ...]``. It is decode only, and a token
begins where the layer's number falls. See `token_rows` for what becomes of the entries.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, is_ids, parse_json, read_text, whole_number
from specmd_jax.trace.importers.joining import UNSAID, Sizes
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.token_rows import Row, trace_of_rows
from specmd_jax.types import Trace

_LISTS = ("moe_expert_trace", "trace", "entries", "data")


def is_imp(peek: Peek) -> bool:
    return peek.has("moe_expert_trace")


def import_imp(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads imp's ``moe_expert_trace``; see the module. Raises `SpecmdError` with the file and the entry."""
    path = Path(path)
    return trace_of_rows(path, _imp_rows(path), sizes, "imp moe_expert_trace", strip, known=Known(token_breaks=False))


def _imp_rows(path: Path) -> Iterator[Row]:
    content = parse_json(read_text(path), str(path))
    entries = content
    if isinstance(content, dict):
        entries = next((content[name] for name in _LISTS if name in content), None)
    if not isinstance(entries, list) or not entries:
        raise SpecmdError(f"{path}: no entries, expected a list 'moe_expert_trace'")
    if all(type(entry) is int for entry in entries):
        top_k = whole_number(content, "top_k", str(path), 1) if isinstance(content, dict) else 0
        if not top_k or len(entries) % (top_k + 1):
            raise SpecmdError(f"{path}: {len(entries)} numbers, expected a top_k and a multiple of top_k + 1 of them")
        entries = [entries[i : i + top_k + 1] for i in range(0, len(entries), top_k + 1)]
    token, last = 0, -1
    for index, entry in enumerate(entries):
        place = f"{path}, entry {index}"
        if not is_ids(entry) or len(entry) < 2 or entry[0] < 0:
            raise SpecmdError(f"{place}: {brief(entry)}, expected [layer, expert, ...]")
        token += entry[0] <= last
        last = entry[0]
        yield Row(place, 0, False, token, last, entry[1:])
