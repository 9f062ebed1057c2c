"""``layer-lists``: expert ids by layer and token, in JSON; one object per request.

``layers`` holds, or the object itself is, ``{"0": [[...], ...], "1": ...}``: for each layer the rows of its tokens.
Names may also be ``layer_0``, ``layers.0`` and the like; they are put in the order of their numbers. ``prompt_tokens``
says how many rows are prompt. A layer with another number of rows than most is left out and named, as nobody says which
tokens it has. JSON Lines and lists of such objects are read, too. The order of the ids is taken for falling gate.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, id_cells, read_records
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_NAME = re.compile(r"(?:(?:model[._])?layers?[._ -]?)?(\d{1,6})(?:\D.*)?")
_FIRST = re.compile(
    r'\s*\[?\s*\{\s*"(?:layers"\s*:\s*\{\s*")?(?:(?:model[._])?layers?[._ -]?)?\d{1,6}[^"]*"\s*:\s*\[\s*\['
)


def is_layer_lists(peek: Peek) -> bool:
    return bool(_FIRST.match(peek.head[:4096].decode("utf-8", "replace")))


def import_layer_lists(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads expert ids by layer; see the module. Raises `SpecmdError` with the file, the layer and the token."""
    path = Path(path)
    found = [(place, record, _layers(place, record)) for place, record in read_records(path)]
    left_out = {number for _, _, layers in found for number in _uneven(layers)}
    numbers = sorted({number for _, _, layers in found for number in layers} - left_out)
    parts = []
    for place, record, layers in found:
        missing = [number for number in numbers if number not in layers]
        if missing:
            raise SpecmdError(f"{place}: layer {missing[0]} is missing, expected it as in the other records")
        blocks = [layers[number] for number in numbers]
        if len({block.shape[1] for block in blocks}) > 1:
            raise SpecmdError(f"{place}: layers with other numbers of experts, expected the same in all")
        prompt = record.get("prompt_tokens", 0)
        if type(prompt) is not int or not 0 <= prompt <= len(blocks[0]):
            raise SpecmdError(f"{place}: prompt_tokens is {brief(prompt)}, expected 0 to {len(blocks[0])} (its rows)")
        parts.append(Part(np.stack(blocks, axis=1), prompt, {"prompt_tokens": prompt}))
    for place, part in zip((place for place, _, _ in found), parts, strict=True):
        if part.ids.shape[2] != parts[0].ids.shape[2]:
            raise SpecmdError(f"{place}: {part.ids.shape[2]} experts, expected {parts[0].ids.shape[2]} as before")
    named = ", ".join(map(str, sorted(left_out)))
    notes = (f"layer {named} has another number of rows than most: left out",) * bool(left_out)
    meta: dict[str, Any] = {"source": f"lists of experts by layer {path.name}", "capture": "ids in the order given"}
    if numbers != list(range(len(numbers))):
        meta["layer_numbers"] = numbers
    phases = any("prompt_tokens" in record for _, record, _ in found)
    name = next((record["model"] for _, record, _ in found if isinstance(record.get("model"), str)), None)
    return join(path, parts, sizes, meta, name, strip=strip, known=Known(phases=phases, notes=notes))


def _layers(place: str, record: dict[str, Any]) -> dict[int, np.ndarray]:
    """Number -> ids [T, K], of each layer."""
    inner = record.get("layers", record)
    named = inner if isinstance(inner, dict) else {}
    layers: dict[int, np.ndarray] = {}
    for name, rows in named.items():
        match = _NAME.fullmatch(name)
        if not match:
            if inner is record:
                continue  # another field of the record
            raise SpecmdError(f"{place}: layer {name!r}, expected a number")
        if int(match[1]) in layers:
            raise SpecmdError(f"{place}: layer {int(match[1])} comes twice ({name!r})")
        cells = id_cells([rows], f"{place}, {name}", ("layer", "token"))
        layers[int(match[1])] = cells[0]
    if not layers:
        raise SpecmdError(f"{place}: {brief(record)}, expected layers by number")
    return layers


def _uneven(layers: dict[int, np.ndarray]) -> list[int]:
    """Layers with another number of rows than most."""
    (rows, _), *_ = Counter(len(block) for block in layers.values()).most_common(1)
    return [number for number, block in layers.items() if len(block) != rows]
