"""What formats with a row for each token and layer share: how rows become a trace.

Rows need not be in order: requests keep the order in which they first appear, tokens and layers go by number. A token
that lacks a layer has -1 there. An unknown phase counts as decode. Without gates the order of the ids is taken for
falling gate, with them the ids are put in that order. Where a format has no requests, one begins with each token and
layer that comes a second time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, check_cells, is_ids, whole_number
from specmd_jax.trace.importers.joining import Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.types import Trace

_PROMPTS: dict[Any, bool | None] = {
    "prefill": True, "prompt": True, "decode": False, "generated": False, "unknown": None, None: None
}  # fmt: skip


class Names(NamedTuple):
    """The fields of a format; None: it has none of that."""

    token: str
    layer: str
    experts: str
    request: str | None = None
    phase: str | None = None
    gates: str | None = None


class Row(NamedTuple):
    """The experts of one token at one layer."""

    place: str
    request: Any
    prompt: bool | None  # None: not known
    token: int
    layer: int
    experts: list[int]  # none: nothing ran
    gates: list[float] | None = None


def row_of(place: str, record: dict[str, Any], names: Names) -> Row:
    """The row that a JSON object is. Raises `SpecmdError`."""
    request = None if names.request is None else record.get(names.request)
    if names.request is not None and not isinstance(request, str | int):
        raise SpecmdError(f"{place}: {names.request} is {brief(request)}, expected a name or a number")
    stage = None if names.phase is None else record.get(names.phase)
    if not (stage is None or isinstance(stage, str)) or stage not in _PROMPTS:
        raise SpecmdError(f"{place}: {names.phase} is {brief(stage)}, expected prefill, decode or unknown")
    experts = record.get(names.experts)
    if not is_ids(experts):
        raise SpecmdError(f"{place}: {names.experts} is {brief(experts)}, expected a list of expert ids")
    gates = None if names.gates is None else record.get(names.gates)
    if gates is not None and gates != [] and not is_shares(gates, len(experts)):
        raise SpecmdError(f"{place}: {names.gates} is {brief(gates)}, expected {len(experts)} numbers >= 0")
    token, layer = whole_number(record, names.token, place), whole_number(record, names.layer, place)
    return Row(place, request, _PROMPTS[stage], token, layer, experts, gates or None)


def is_shares(values: Any, count: int) -> TypeGuard[list[float]]:
    """Whether it is a list of so many finite numbers from 0."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one < 1e30 for one in values)
    )


def trace_of_rows(
    path: Path,
    rows: Iterable[Row],
    sizes: Sizes,
    source: str,
    strip: Collection[str] = (),
    *,
    name: str | None = None,
    experts: int | None = None,
    known: Known | None = None,
) -> Trace:
    """Gives a validated trace of the rows of a file in the format `source`; `name` and `experts` are as in `join`.

    Raises:
      SpecmdError: names the row.
    """
    cells: dict[Any, dict[int, dict[int, Row]]] = {}  # request -> token -> layer
    top_k, turns, last, phases, gated, count = 0, 0, object(), False, 0, 0
    for row in _numbered(rows):
        if row.experts:
            top_k, count, gated = top_k or len(row.experts), count + 1, gated + (row.gates is not None)
            if len(row.experts) != top_k:
                raise SpecmdError(f"{row.place}: {len(row.experts)} experts, expected {top_k} as before")
        layers = cells.setdefault(row.request, {}).setdefault(row.token, {})
        if row.layer in layers:
            raise SpecmdError(f"{row.place}: token {row.token}, layer {row.layer} of {row.request!r} a second time")
        if layers and bool(next(iter(layers.values())).prompt) != bool(row.prompt):
            raise SpecmdError(f"{row.place}: token {row.token} of {row.request!r} is in two phases, expected one")
        layers[row.layer] = row
        turns, last, phases = turns + (row.request != last), row.request, phases or row.prompt is not None
    if not count:
        raise SpecmdError(f"{path}: no rows" + (" with experts" if cells else ""))
    numbers = sorted({layer for tokens in cells.values() for layers in tokens.values() for layer in layers})
    rows_read = sum(len(layers) for tokens in cells.values() for layers in tokens.values())
    check_cells(path, sum(map(len, cells.values())) * len(numbers) * top_k, rows_read * top_k)
    column = {layer: index for index, layer in enumerate(numbers)}
    parts = [_part(name, tokens, column, top_k, gated == count) for name, tokens in cells.items()]
    meta: dict[str, Any] = {"source": f"{source} {path.name}", "capture": "ids in the order given"}
    if gated == count:
        meta["capture"] = "ids by falling gate"
    if numbers != list(range(len(numbers))):
        meta["layer_numbers"] = numbers
    found = (known or Known())._replace(phases=phases, interleaved=turns > len(cells))
    return join(path, parts, sizes, meta, name, experts, strip=strip, known=found)


def _numbered(rows: Iterable[Row]) -> Iterable[Row]:
    """Rows without a request get its number: another begins where a cell comes again."""
    number, seen = 0, set[tuple[int, int]]()
    for row in rows:
        if row.request is not None:
            yield row
            continue
        if (row.token, row.layer) in seen:
            number, seen = number + 1, set()
        seen.add((row.token, row.layer))
        yield row._replace(request=number)


def _part(name: Any, tokens: dict[int, dict[int, Row]], column: dict[int, int], top_k: int, gated: bool) -> Part:
    ids = np.full((len(tokens), len(column), top_k), -1, np.int64)
    gates = np.zeros(ids.shape, np.float32) if gated else None
    prompts = []
    for index, token in enumerate(sorted(tokens)):
        for layer, row in tokens[token].items():
            if row.experts:
                ids[index, column[layer]] = row.experts
                if gates is not None:
                    gates[index, column[layer]] = row.gates
        row = next(iter(tokens[token].values()))
        prompts.append(bool(row.prompt))
        if row.prompt and not all(prompts):
            raise SpecmdError(f"{row.place}: prompt token {token} comes after a decoded one, expected prompts first")
    if gates is not None:
        order = np.argsort(-gates, axis=-1, kind="stable")
        ids, gates = np.take_along_axis(ids, order, -1), np.take_along_axis(gates, order, -1)
    return Part(ids, sum(prompts), {"request": name, "prompt_tokens": sum(prompts)}, gates)
