"""``vllm``: the routed experts that vLLM returns with ``--enable-return-routed-experts``.

It reads one record per request:

* JSON Lines (or one ``.json``) of ``/v1/completions`` or ``/v1/chat/completions`` responses as they come:
  ``prompt_routed_experts`` [P, L, K] beside ``choices[i].routed_experts`` [G, L, K], nested lists (vLLM 0.21), or
  ``choices[i].routed_experts`` of prompt and answer together, nested lists or base64 text of a ``.npy`` file (later
  versions). A choice may have it under ``provider_specific_fields``; all may stand in an object without ``choices``.
* ``.npz`` with the same two arrays of the Python API, for several requests as ``0/prompt_routed_experts``,
  ``0/routed_experts``, ``1/...``.

A request is its prompt, then its generated tokens; of several choices the first has the prompt, as the engine ran it
once. -1 stays: no expert ran (a prompt token out of the prefix cache). Without ``prompt_routed_experts`` the rows begin
with the prompt, and ``usage.prompt_tokens`` or ``prompt_token_ids`` cuts them. Where ``usage.completion_tokens`` or
``token_ids`` says G there are P + G - 1 rows, as the last token was sampled and never run (or P + G, which some clients
make of it); prompt tokens that ``prompt_tokens_details.cached_tokens`` or ``routed_experts_prompt_start`` counts may
lack. Other numbers are refused. The order of the K ids is taken for falling gate. The responses do not say how many
experts there are or how large; ``model`` may.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import check_shape, read_records
from specmd_jax.trace.importers.counting import length, number, prompt_rows
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.payload import Routed, routed
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_PROMPT, _ROUTED = "prompt_routed_experts", "routed_experts"


def is_vllm(peek: Peek) -> bool:
    choices = peek.has("choices", _ROUTED) and not peek.has("sgl_ext") and not peek.has("nvext")
    return choices or peek.has(_PROMPT) or (peek.suffix == ".npz" and peek.has(_ROUTED))


def import_vllm(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads routed experts as vLLM returns them; see the module.

    Raises:
      SpecmdError: with the file, and the line or record, token and layer.
    """
    path = Path(path)
    parts: list[Part] = []
    names: dict[str, str] = {}
    for place, record in read_records(path):
        if isinstance(record.get("model"), str):
            names.setdefault(record["model"], place)
        for part in _requests(place, record):
            if parts:
                check_shape(part.ids, parts[0].ids, place)
            parts.append(part)
    meta = {
        "source": f"vLLM routed experts {path.name}",
        "capture": "--enable-return-routed-experts; ids in the order given",
    }
    return join(path, parts, sizes, meta, one_model(names), strip=strip)


def one_model(names: dict[str, str]) -> str | None:
    """Gives the model that all records name; `names` has the place of each first mention. Raises `SpecmdError`."""
    if len(names) > 1:
        first, other = list(names)[:2]
        raise SpecmdError(f"{names[other]}: model is {other!r}, expected {first!r} as before")
    return next(iter(names), None)


def _requests(place: str, record: dict[str, Any]) -> list[Part]:
    """Makes one request of each choice; the first one's prompt is that of the record."""
    choices = record.get("choices", [record])
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise SpecmdError(f"{place}: choices are not a list of objects, expected those of a completion")
    prompt = routed(record.get(_PROMPT), f"{place}: {_PROMPT}")
    parts = []
    for index, choice in enumerate(choices):
        where = f"{place}, choice {index}" if "choices" in record else place
        given = _given(choice)
        found = routed(given, f"{where}: {_ROUTED}")
        row: dict[str, Any] = {}
        if prompt is None and found is not None and len(found.ids):
            ids, count, cached = _cut(where, record, choice, found, isinstance(given, str | dict), len(choices))
            # the prompt was run once, for all choices together
            ids, count = (ids, count) if index == 0 else (ids[count:], 0)
            row = {"cached_tokens": cached} if cached else {}
        else:
            before = prompt.ids if prompt is not None and index == 0 else None
            count = 0 if before is None else len(before)
            if before is not None and found is not None and len(before) and len(found.ids):
                check_shape(found.ids, before, f"{where}: {_ROUTED}")
            blocks = [block for block in (before, found.ids if found else None) if block is not None and len(block)]
            ids = np.concatenate(blocks) if blocks else None
        if ids is None or not len(ids):
            raise SpecmdError(f"{where}: {_ROUTED} is missing (was --enable-return-routed-experts set?)")
        parts.append(Part(ids, count, {"prompt_tokens": count} | row))
    return parts


def _given(choice: dict[str, Any]) -> Any:
    """The routed experts of a choice, wherever they are."""
    message = choice.get("message")
    extra = [choice.get("provider_specific_fields")]
    extra += [message, message.get("provider_specific_fields")] if isinstance(message, dict) else []
    owners = [choice, *(one for one in extra if isinstance(one, dict))]
    return next((owner[_ROUTED] for owner in owners if owner.get(_ROUTED) is not None), None)


def _cut(
    place: str, record: dict[str, Any], choice: dict[str, Any], found: Routed, whole: bool, choices: int
) -> tuple[np.ndarray, int, int]:
    """Gives rows, how many of them are prompt, and prompt tokens without a row.

    Lists (not `whole`) of as many rows as there are generated tokens, or of a record without counts, are the answer's.
    """
    usage, rows = record.get("usage"), len(found.ids)
    prompt = number(usage, "prompt_tokens")
    prompt = length(record, "prompt_token_ids") if prompt is None else prompt
    prompt = length(choice, "prompt_token_ids") if prompt is None else prompt
    generated = length(choice, "token_ids")
    if generated is None and choices == 1:
        generated = number(usage, "completion_tokens")
    if not whole and (prompt is None or generated is None or (rows == generated and prompt != 1)):
        return found.ids, 0, 0
    if prompt is None or (generated is None and prompt > rows):
        raise SpecmdError(
            f"{place}: {_ROUTED} covers prompt and answer and usage.prompt_tokens is {prompt}, expected 0 to {rows}"
        )
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    start = found.start or number(record, "routed_experts_prompt_start") or 0
    count, missing = prompt_rows(place, rows, prompt, generated, start, number(details, "cached_tokens") or 0)
    return found.ids, count, missing
