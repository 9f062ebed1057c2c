"""``vference``: ``vference.route-trace.v1``, the routing of one request in JSON.

``records`` have ``layer_id`` and ``expert_ids``, rows of experts, layer by layer in each pass of the model;
``prompt_tokens`` and ``output_tokens`` say how many tokens there were. The last output token was never run, so the rows
of each layer must be P + O - 1. The last O - 1 passes are decoding. The order of the ids is taken for falling gate.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, is_ids, parse_json, read_text, whole_number
from specmd_jax.trace.importers.counting import length
from specmd_jax.trace.importers.joining import UNSAID, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.passes import Rows, layers_of, part_of, passes_of, tokens_of
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_FORMAT = "vference.route-trace.v1"


def is_vference(peek: Peek) -> bool:
    return any("vference.route-trace" in line[:4096] for line in peek.first_lines)


def import_vference(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads a route trace of vference; see the module. Raises `SpecmdError` with the file and the record."""
    path = Path(path)
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise SpecmdError(f"{path}: format is {brief(found)}, expected {_FORMAT!r}")
    prompt, output = whole_number(content, "prompt_tokens", str(path)), length(content, "output_tokens")
    if output is None:
        raise SpecmdError(f"{path}: output_tokens is {brief(content.get('output_tokens'))}, expected a list")
    passes = passes_of(_visits(path, content.get("records")))
    layers = layers_of(passes)
    top_k = next(iter(passes[0].values())).shape[1]
    part = part_of(passes, len(passes) - max(output - 1, 0), layers, top_k, {})
    decoded = [tokens_of(one) for one in passes[len(passes) - max(output - 1, 0) :]]
    if len(part.ids) != prompt + max(output - 1, 0) or any(tokens != 1 for tokens in decoded):
        raise SpecmdError(
            f"{path}: {len(part.ids)} rows, expected {prompt + max(output - 1, 0)} ({prompt} prompt and {output} "
            "output tokens, the last without one)"
        )
    meta = {"source": f"vference route trace {path.name}", "capture": "ids in the order given"}
    known = Known(notes=layers.notes)
    return join(path, [part], sizes, meta | layers.meta, None, strip=strip, known=known)


def _visits(path: Path, records: Any) -> Iterator[tuple[int, Rows]]:
    if not isinstance(records, list) or not records:
        raise SpecmdError(f"{path}: records are {brief(records)}, expected a list of them")
    top_k = 0
    for index, record in enumerate(records):
        place = f"{path}, record {index}"
        rows = record.get("expert_ids") if isinstance(record, dict) else None
        if not isinstance(rows, list) or not rows or not all(is_ids(row) for row in rows):
            raise SpecmdError(f"{place}: {brief(record)}, expected layer_id and expert_ids [[...], ...]")
        top_k = top_k or len(rows[0])
        if any(len(row) != top_k for row in rows):
            raise SpecmdError(f"{place}: expert_ids are {brief(rows)}, expected rows of {top_k}")
        yield whole_number(record, "layer_id", place), np.array(rows, np.int64)
