"""Plain formats with a row for each token and layer.

``moe-sim``: JSON Lines of ``request_id``, ``phase`` (prefill, decode or unknown), ``token_position``, ``layer_id`` and
``expert_ids``. ``moe-policylang``: JSON Lines whose rows have ``p`` (prompt), ``t`` (token), ``l`` (layer), ``e``
(experts) and optionally ``ph`` (phase); lines without ``e``, such as its header, are skipped. ``imp-json``: an object
with ``top_k`` and ``moe_expert_trace``, a flat list in which each layer's number comes before its experts, or a list
of such ``[layer, expert, ...]``; decode only, a token begins where the layer's number falls.

Rows need not be in order: requests keep the order in which they first appear, tokens and layers go by number. A token
that lacks a layer has -1 there. An unknown phase counts as decode. The order of the ids is taken for falling gate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import (
    UNSAID,
    Part,
    Sizes,
    brief,
    is_ids,
    join,
    parse_json,
    read_records,
    read_text,
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


def import_moe_sim(path: str | os.PathLike[str], sizes: Sizes = UNSAID) -> Trace:
    """Reads moe-sim's JSON Lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    names = ("request_id", "phase", "token_position", "layer_id", "expert_ids")
    return _trace(path, (_row(place, record, names) for place, record in read_records(path)), sizes, "moe-sim")


def import_policylang(path: str | os.PathLike[str], sizes: Sizes = UNSAID) -> Trace:
    """Reads moe-policylang's JSON Lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    rows = (_row(place, record, ("p", "ph", "t", "l", "e")) for place, record in read_records(path) if "e" in record)
    return _trace(path, rows, sizes, "moe-policylang")


def import_imp(path: str | os.PathLike[str], sizes: Sizes = UNSAID) -> Trace:
    """Reads imp's ``moe_expert_trace``; see the module. Raises `SpecmdError` with the file and the entry."""
    path = Path(path)
    return _trace(path, _imp_rows(path), sizes, "imp moe_expert_trace")


def _row(place: str, record: dict[str, Any], names: tuple[str, str, str, str, str]) -> Row:
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


def _imp_rows(path: Path) -> Iterator[Row]:
    content = parse_json(read_text(path), str(path))
    entries = content.get("moe_expert_trace") if isinstance(content, dict) else content
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


def _trace(path: Path, rows: Iterable[Row], sizes: Sizes, source: str) -> Trace:
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
