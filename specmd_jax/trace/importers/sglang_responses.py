"""``sglang-responses``: routed experts in the responses of SGLang, sglang-jax and LMDeploy.

JSON Lines, or one ``.json`` (an object or a list of them), of ``/generate`` responses, which have them under
``meta_info.routed_experts``, or of OpenAI-like ones, under ``choices[i].sgl_ext``. They are base64 of bare int32 of the
shape [T, L, K], which is not sent: K is that of the model, or given. ``routed_experts_dtype`` beside them may say
another type (uint8, uint16: there -1 has become 255 or 65535). LMDeploy sends nested lists.

T is P + G - 1, of ``prompt_tokens`` and ``completion_tokens`` in ``meta_info`` or ``usage`` (P + G, if the last token
was run, too), less ``routed_experts_start_len`` or the ``cached_tokens`` of a prefix cache. Other numbers are refused.
Layers without experts hold -1: left out. The order of the K ids is taken for falling gate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, check_shape, read_records
from specmd_jax.trace.importers.counting import length, number, prompt_rows
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join, top_k_of
from specmd_jax.trace.importers.payload import routed, shaped
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.vllm import one_model
from specmd_jax.types import Trace

_ROUTED = "routed_experts"


def is_sglang_responses(peek: Peek) -> bool:
    return peek.has(_ROUTED) and (peek.has("meta_info") or peek.has("sgl_ext"))


def import_sglang_responses(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads responses of SGLang; see the module. Raises `SpecmdError` with the file and the line or record."""
    path = Path(path)
    parts: list[Part] = []
    names: dict[str, str] = {}
    for place, record in read_records(path):
        if isinstance(record.get("model"), str):
            names.setdefault(record["model"], place)
        for where, owner, counts, output in _owners(place, record):
            layers = parts[0].ids.shape[1] if parts else None
            part = _part(where, owner, counts, output, layers, lambda: top_k_of(path, sizes, next(iter(names), None)))
            if parts:
                check_shape(part.ids, parts[0].ids, where)
            parts.append(part)
    meta = {"source": f"SGLang routed experts {path.name}", "capture": "return_routed_experts; ids in the order given"}
    return join(path, parts, sizes, meta, one_model(names), strip=strip)


def _owners(place: str, record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Any, dict[str, Any]]]:
    """Gives place, the object with the routed experts, the one with the counts, and the one with the output."""
    choices = record.get("choices")
    if isinstance(choices, list) and choices:
        for index, choice in enumerate(choices):
            where = f"{place}, choice {index}"
            owner = choice.get("sgl_ext") if isinstance(choice, dict) else None
            if not isinstance(owner, dict):
                raise SpecmdError(f"{where}: {brief(choice)}, expected an object with sgl_ext")
            yield where, owner, record.get("usage"), choice
        return
    owner = record.get("meta_info")
    if not isinstance(owner, dict):
        raise SpecmdError(f"{place}: meta_info is {brief(owner)}, expected an object with {_ROUTED}")
    yield place, owner, owner, record


def _part(
    place: str,
    owner: dict[str, Any],
    counts: Any,
    output: dict[str, Any],
    layers: int | None,
    top_k: Callable[[], int],
) -> Part:
    """Makes a request; bare numbers that fit several numbers of tokens are as many as gives the `layers` of before."""
    if owner.get(_ROUTED) is None:
        raise SpecmdError(f"{place}: {_ROUTED} is missing (was return_routed_experts set, and the server's flag?)")
    kind = owner.get("routed_experts_dtype", "int32")
    found = routed(owner[_ROUTED], f"{place}: {_ROUTED}", kind if isinstance(kind, str) else "unknown")
    assert found is not None
    prompt, generated = number(counts, "prompt_tokens"), number(counts, "completion_tokens")
    generated = length(output, "output_ids") if generated is None else generated
    if prompt is None:
        raise SpecmdError(f"{place}: prompt_tokens is missing, expected it in meta_info or usage")
    start = found.start or number(owner, "routed_experts_start_len") or 0
    cached = number(owner, "cached_tokens") or 0
    ids = found.ids
    if ids.ndim == 1:
        k, said = top_k(), list(_lengths(prompt, generated, start, cached))
        whole = [tokens for tokens in said if ids.size % (tokens * k) == 0]
        fits = [tokens for tokens in whole if layers in (None, ids.size // (tokens * k))]
        tokens = next(iter([*fits, *whole, *said]), 1)
        ids = shaped(ids, tokens, k, f"{place}: {_ROUTED} of {prompt} prompt and {generated} generated tokens")
    count, missing = prompt_rows(place, len(ids), prompt, generated, start, cached)
    return Part(ids, count, {"prompt_tokens": count} | ({"cached_tokens": missing} if missing else {}))


def _lengths(prompt: int, generated: int | None, start: int, cached: int) -> Iterator[int]:
    """Tokens that the rows may be of, the likeliest first; of a request that counts no answer, its prompt."""
    whole = prompt if generated is None else prompt + generated - 1
    for missing in (start,) if start else dict.fromkeys((0, cached)):
        for tokens in (whole - missing, whole + 1 - missing):
            if tokens > 0:
                yield tokens
