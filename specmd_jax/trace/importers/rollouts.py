"""``rollouts``: routed experts in the records of reinforcement learning: prime-rl and verifiers, NeMo-RL and NeMo Gym,
Dynamo.

JSON Lines, or one ``.json``: every object with ``routed_experts``, wherever it is in a record, is a request. They are
``{data, shape, dtype}`` (maybe with ``start``), NeMo's ``nrlre1:`` text, base64 of a ``.npy`` or nested lists. How many
tokens are prompt and how many generated is looked for in that object and those around it, the nearest first:
``prompt_ids``, ``prompt_token_ids`` or ``prompt_tokens``, and ``completion_ids``, ``generation_token_ids``,
``completion_token_ids``, ``token_ids`` or ``completion_tokens``. There must be P + G - 1 rows (or P + G, with one for
the last token), less ``start``. The order of the K ids is taken for falling gate.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import check_shape, read_records
from specmd_jax.trace.importers.counting import length, number, prompt_rows
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.payload import routed
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_ROUTED = "routed_experts"
_PROMPT_LISTS = ("prompt_ids", "prompt_token_ids")
_ANSWER_LISTS = ("completion_ids", "generation_token_ids", "completion_token_ids", "token_ids")
_DEEPEST = 16


def is_rollouts(peek: Peek) -> bool:
    named = not peek.has("meta_info") and not peek.has("sgl_ext") and (not peek.has("choices") or peek.has("nvext"))
    return named and peek.suffix != ".npz" and peek.has(_ROUTED) and not peek.has("prompt_routed_experts")


def import_rollouts(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads records of rollouts; see the module. Raises `SpecmdError` with the file, the record and the field."""
    path = Path(path)
    parts: list[Part] = []
    model = None
    for place, record in read_records(path):
        for where, chain in _owners(record, place):
            part = _part(where, chain)
            if parts:
                check_shape(part.ids, parts[0].ids, where)
            parts.append(part)
        model = model or (record["model"] if isinstance(record.get("model"), str) else None)
    if not parts:
        raise SpecmdError(f"{path}: no object with {_ROUTED}")
    meta = {"source": f"rollouts {path.name}", "capture": "ids in the order given"}
    return join(path, parts, sizes, meta, model, strip=strip)


def _owners(record: dict[str, Any], place: str) -> Iterator[tuple[str, Sequence[dict[str, Any]]]]:
    """Gives every object with routed experts: its place, and it with the objects around it, the nearest first."""
    waiting: list[tuple[str, Any, tuple[dict[str, Any], ...]]] = [(place, record, ())]
    while waiting:
        where, item, around = waiting.pop()
        if len(around) > _DEEPEST:
            continue
        inner: list[tuple[str, Any, tuple[dict[str, Any], ...]]] = []
        if isinstance(item, dict):
            chain = (item, *around)
            if item.get(_ROUTED) is not None:
                yield where, chain
            inner = [(f"{where}, {key}", one, chain) for key, one in item.items() if key != _ROUTED]
        elif isinstance(item, list) and item and isinstance(item[0], dict | list):
            inner = [(f"{where} {index}", one, around) for index, one in enumerate(item)]
        waiting.extend(reversed([entry for entry in inner if isinstance(entry[1], dict | list)]))


def _part(place: str, chain: Sequence[dict[str, Any]]) -> Part:
    found = routed(chain[0][_ROUTED], f"{place}: {_ROUTED}")
    assert found is not None
    prompt, generated = (
        _counted(chain, _PROMPT_LISTS, "prompt_tokens"),
        _counted(chain, _ANSWER_LISTS, "completion_tokens"),
    )
    if prompt is None:
        raise SpecmdError(f"{place}: how many tokens are prompt is not said, expected {' or '.join(_PROMPT_LISTS)}")
    count, missing = prompt_rows(place, len(found.ids), prompt, generated, found.start)
    return Part(found.ids, count, {"prompt_tokens": count} | ({"cached_tokens": missing} if missing else {}))


def _counted(chain: Sequence[dict[str, Any]], lists: tuple[str, ...], count: str) -> int | None:
    """Looks for a number of tokens in an object and those around it."""
    for one in chain:
        usage = one.get("usage")
        for value in (length(one, *lists), number(one, count), number(usage, count)):
            if value is not None:
                return value
    return None
