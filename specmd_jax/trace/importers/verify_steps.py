"""``verify-steps``: passes of speculative decoding, with the rows that were verified and how many were kept.

An object with ``steps``, of one request: each has ``rows``, ``accepted`` and, per layer, ``experts_layer<n>`` with a
list of expert ids for each row. All rows are tokens of the trace, and ``meta["rejected"]`` tells those apart that were
not kept. With ``--strip drafts`` only what was kept is left, and ``meta["accepted"]`` has the counts, with which a
replay verifies drafts (`drafts` of `Setting`). Prompt tokens are not in such files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, id_cells, parse_json, read_text, whole_number
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_LAYER = re.compile(r"experts_layer_?(\d{1,6})")


def is_verify_steps(peek: Peek) -> bool:
    return peek.has("steps", "accepted", "rows") and any(_LAYER.fullmatch(key) for key in peek.keys)


def import_verify_steps(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads steps of speculative decoding; see the module. Raises `SpecmdError` with the file and the step."""
    path = Path(path)
    content = parse_json(read_text(path), str(path))
    steps = content.get("steps") if isinstance(content, dict) else None
    if not isinstance(steps, list) or not steps:
        raise SpecmdError(f"{path}: steps are {brief(steps)}, expected a list of them")
    blocks, rejected, accepted, numbers = [], [], [], None
    for index, step in enumerate(steps):
        place = f"{path}, step {index}"
        if not isinstance(step, dict):
            raise SpecmdError(f"{place}: {brief(step)}, expected an object")
        rows, kept = whole_number(step, "rows", place, 1), whole_number(step, "accepted", place, 1)
        if kept > rows:
            raise SpecmdError(f"{place}: accepted is {kept}, expected 1 to {rows} (its rows)")
        layers = {int(match[1]): key for key in step if (match := _LAYER.fullmatch(key))}
        numbers = numbers or sorted(layers)
        if sorted(layers) != numbers or not numbers:
            raise SpecmdError(f"{place}: layers {sorted(layers)}, expected {numbers or 'experts_layer<n>'}")
        ids = id_cells([step[layers[number]] for number in numbers], f"{place}: experts", ("layer", "row"))
        if ids.shape[1] != rows or (blocks and ids.shape[2] != blocks[0].shape[2]):
            wanted = f"{rows} of {blocks[0].shape[2] if blocks else ids.shape[2]}"
            raise SpecmdError(f"{place}: {ids.shape[1]} rows of {ids.shape[2]} experts, expected {wanted}")
        blocks.append(ids.swapaxes(0, 1))
        rejected.append(np.arange(rows) >= kept)
        accepted.append(kept)
    part = Part(np.concatenate(blocks), 0, {"prompt_tokens": 0})
    meta: dict[str, Any] = {"source": f"verified drafts {path.name}", "capture": "ids in the order given"}
    if numbers != list(range(len(numbers or ()))):
        meta["layer_numbers"] = numbers
    known = Known(rejected=np.concatenate(rejected))
    return join(path, [part], sizes, meta | {"accepted": [accepted]}, None, strip=strip, known=known)
