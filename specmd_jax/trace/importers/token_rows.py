"""What formats with a row for each token and layer share: how rows become a trace.

Rows need not be in order: requests keep the order in which they first appear, tokens and layers go by number. A token
that lacks a layer has -1 there. An unknown phase counts as decode. The order of the ids is taken for falling gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import (
    Part,
    Sizes,
    brief,
    check_cells,
    is_ids,
    join,
    whole_number,
)
from specmd_jax.types import Trace

_PHASES = {"prefill": True, "prompt": True, "decode": False, "generated": False, "unknown": False, None: False}


class Row(NamedTuple):
    """The experts of one token at one layer."""

    place: str
    request: Any
    prompt: bool
    token: int
    layer: int
    experts: list[int]


def row_of(place: str, record: dict[str, Any], names: tuple[str, str, str, str, str]) -> Row:
    """The row that a JSON object is; `names` of its request, phase, token, layer and experts. Raises `SpecmdError`."""
    request, phase, token, layer, experts = names
    name = record.get(request)
    if not isinstance(name, str | int):
        raise SpecmdError(f"{place}: {request} is {brief(name)}, expected a name or a number")
    stage = record.get(phase)
    if not (stage is None or isinstance(stage, str)) or stage not in _PHASES:
        raise SpecmdError(f"{place}: {phase} is {brief(stage)}, expected prefill, decode or unknown")
    if not is_ids(record.get(experts)):
        raise SpecmdError(f"{place}: {experts} is {brief(record.get(experts))}, expected a list of expert ids")
    return Row(
        place,
        name,
        _PHASES[stage],
        whole_number(record, token, place),
        whole_number(record, layer, place),
        record[experts],
    )


def trace_of_rows(path: Path, rows: Iterable[Row], sizes: Sizes, source: str) -> Trace:
    """Gives a validated trace of the rows of a file in the format `source`. Raises `SpecmdError` naming the row."""
    cells: dict[Any, dict[int, dict[int, Row]]] = {}  # request -> token -> layer
    top_k = 0
    for row in rows:
        top_k = top_k or len(row.experts)
        if len(row.experts) != top_k:
            raise SpecmdError(f"{row.place}: {len(row.experts)} experts, expected {top_k} as before")
        layers = cells.setdefault(row.request, {}).setdefault(row.token, {})
        if row.layer in layers:
            raise SpecmdError(f"{row.place}: token {row.token}, layer {row.layer} of {row.request!r} a second time")
        if layers and next(iter(layers.values())).prompt != row.prompt:
            raise SpecmdError(f"{row.place}: token {row.token} of {row.request!r} is in two phases, expected one")
        layers[row.layer] = row
    if not cells:
        raise SpecmdError(f"{path}: no rows")
    numbers = sorted({layer for tokens in cells.values() for layers in tokens.values() for layer in layers})
    rows_read = sum(len(layers) for tokens in cells.values() for layers in tokens.values())
    check_cells(path, sum(map(len, cells.values())) * len(numbers) * top_k, rows_read * top_k)
    column = {layer: index for index, layer in enumerate(numbers)}
    parts = []
    for name, tokens in cells.items():
        ids = np.full((len(tokens), len(numbers), top_k), -1, np.int64)
        prompts = []
        for index, token in enumerate(sorted(tokens)):
            for layer, row in tokens[token].items():
                ids[index, column[layer]] = row.experts
            row = next(iter(tokens[token].values()))
            prompts.append(row.prompt)
            if row.prompt and not all(prompts):
                raise SpecmdError(
                    f"{row.place}: prompt token {token} comes after a decoded one, expected prompts first"
                )
        parts.append(Part(ids, sum(prompts), {"request": name, "prompt_tokens": sum(prompts)}))
    meta: dict[str, Any] = {"source": f"{source} {path.name}", "capture": "ids in the order given"}
    if numbers != list(range(len(numbers))):
        meta["layer_numbers"] = numbers
    return join(path, parts, sizes, meta, None)
