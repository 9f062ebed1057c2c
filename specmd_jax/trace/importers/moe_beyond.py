"""``moe-beyond``: MoE-Beyond's CSV, a file per prompt, or a folder of them.

Columns ``Layer ID``, ``Batch Number``, ``Token`` and ``Activated Expert IDs`` ("[8, 26, ...]"), layer by layer. Rows of
a layer are tokens in the order of the file. Where only the first batch has several tokens, batches are the passes of
one request and the first is its prompt; batches of several tokens each are requests of their own, whose prompts are not
told from what they decoded. A layer with another number of rows than most is left out and named. The order of the ids
is taken for falling gate.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, check_shape, is_ids, parse_json, read_text
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_LAYER, _BATCH, _EXPERTS = "Layer ID", "Batch Number", "Activated Expert IDs"

Table = dict[int, dict[int, list[list[int]]]]  # batch -> layer -> rows of experts


def is_moe_beyond(peek: Peek) -> bool:
    if os.path.isdir(peek.path):
        files = peek.files("*.csv")
        return bool(files) and is_moe_beyond(Peek(files[0]))
    return bool(peek.first_lines) and {_LAYER, _BATCH, _EXPERTS} <= _fields(peek.first_lines[0])


def import_moe_beyond(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads MoE-Beyond's CSV; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    files = sorted(path.rglob("*.csv")) if os.path.isdir(path) else [path]
    if not files:
        raise SpecmdError(f"{path}: no .csv in this folder")
    tables = [(file, _table(file)) for file in files]
    left_out = {layer for _, table in tables for layer in _uneven(table)}
    numbers = sorted({layer for _, table in tables for rows in table.values() for layer in rows} - left_out)
    parts: list[Part] = []
    for file, table in tables:
        for part in _parts(file, table, numbers):
            if parts:
                check_shape(part.ids, parts[0].ids, str(file))
            parts.append(part)
    meta: dict[str, Any] = {"source": f"MoE-Beyond trace {path.name}", "capture": "ids in the order given"}
    if numbers != list(range(len(numbers))):
        meta["layer_numbers"] = numbers
    named = ", ".join(map(str, sorted(left_out)))
    notes = (f"layer {named} has another number of rows than most: left out",) * bool(left_out)
    phases = any(part.prompt for part in parts)
    return join(path, parts, sizes, meta, None, strip=strip, known=Known(phases=phases, notes=notes))


def _fields(line: str) -> set[str]:
    return {field.strip() for field in next(csv.reader([line]), [])}


def _table(path: Path) -> Table:
    reader = csv.DictReader(io.StringIO(read_text(path)), skipinitialspace=True)
    names = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = names
    for name in (_LAYER, _BATCH, _EXPERTS):
        if name not in names:
            raise SpecmdError(f"{path}, line 1: column {name!r} is missing (found: {', '.join(names)})")
    table: Table = {}
    top_k = 0
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            layer, batch = (_number(row[name], name, place) for name in (_LAYER, _BATCH))
            experts = _ids(row[_EXPERTS])
            top_k = top_k or len(experts)
            if not experts or len(experts) != top_k:
                wanted = f"a list of {top_k or 'expert'} ids"
                raise SpecmdError(f"{place}: {_EXPERTS} is {brief(row[_EXPERTS])}, expected {wanted}")
            table.setdefault(batch, {}).setdefault(layer, []).append(experts)
    except csv.Error as error:
        raise SpecmdError(f"{path}, line {reader.line_num}: {error}, expected CSV") from error
    if not table:
        raise SpecmdError(f"{path}: no rows after the header")
    return table


def _number(text: str | None, name: str, place: str) -> int:
    plain = (text or "").strip().removesuffix(".0")
    if not plain.isdecimal() or not plain.isascii() or len(plain) > 9:
        raise SpecmdError(f"{place}: {name} is {brief(text)}, expected a whole number")
    return int(plain)


def _ids(text: str | None) -> list[int]:
    try:
        found = parse_json(text or "", "")
    except SpecmdError:
        return []
    return found if is_ids(found) else []


def _uneven(table: Table) -> list[int]:
    """Layers with another number of rows than most, in all batches together."""
    rows: Counter[int] = Counter()
    for layers in table.values():
        rows.update({layer: len(found) for layer, found in layers.items()})
    (most, _), *_ = Counter(rows.values()).most_common(1)
    return [layer for layer, count in rows.items() if count != most]


def _parts(path: Path, table: Table, numbers: list[int]) -> list[Part]:
    blocks = []
    for batch in sorted(table):
        rows = [np.array(table[batch].get(layer, ()), np.int64) for layer in numbers]
        if len({block.shape for block in rows}) > 1:
            raise SpecmdError(
                f"{path}: batch {batch} has other numbers of rows in its layers, expected the same in all"
            )
        blocks.append(np.stack(rows, axis=1))
    if len(blocks) > 1 and all(len(block) == 1 for block in blocks[1:]):
        prompt = len(blocks[0]) if len(blocks[0]) > 1 else 0
        return [Part(np.concatenate(blocks), prompt, {"file": path.name, "prompt_tokens": prompt})]
    return [
        Part(block, 0, {"file": path.name, "batch": batch}) for batch, block in zip(sorted(table), blocks, strict=True)
    ]
