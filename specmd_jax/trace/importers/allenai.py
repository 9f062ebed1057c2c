"""``allenai``: routing as in the data set allenai/analysis_mixtral, JSON Lines with a text each.

A line has ``input_ids`` (of one text, maybe in a list of its own), ``predicted_token_ids`` and ``exp_ids`` [tokens,
top-k, layers]. The model read each text at once and generated nothing: all tokens are prompt. The order of the K ids is
taken for falling gate.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, check_shape, id_cells, read_records
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace


def is_allenai(peek: Peek) -> bool:
    return peek.has("input_ids", "exp_ids")


def import_allenai(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads lines with exp_ids; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    parts: list[Part] = []
    for place, record in read_records(path):
        ids = id_cells(record.get("exp_ids"), f"{place}: exp_ids", ("token", "place")).swapaxes(1, 2)
        tokens = _tokens(record.get("input_ids"), place)
        if len(ids) != tokens or not tokens:
            raise SpecmdError(f"{place}: exp_ids has {len(ids)} rows, expected {tokens} (its input_ids)")
        if parts:
            check_shape(ids, parts[0].ids, place)
        parts.append(Part(ids, tokens, {"prompt_tokens": tokens}))
    meta = {
        "source": f"allenai routing analysis {path.name}",
        "capture": "texts read at once, all prompt; ids in the order given",
    }
    notes = ("texts were read at once and nothing was generated: there is no decoding in the file",)
    return join(path, parts, sizes, meta, None, strip=strip, known=Known(notes=notes))


def _tokens(value: Any, place: str) -> int:
    inner = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value
    if not isinstance(inner, list):
        raise SpecmdError(f"{place}: input_ids is {brief(value)}, expected a list of tokens")
    return len(inner)
