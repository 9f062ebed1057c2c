"""``vllm``: the routed experts that vLLM returns with ``--enable-return-routed-experts``.

It reads one record per request:

* JSON Lines (or one ``.json``) of ``/v1/completions`` or ``/v1/chat/completions`` responses as they come:
  ``prompt_routed_experts`` [P, L, K] beside ``choices[i].routed_experts`` [G, L, K], nested lists (vLLM 0.21) or
  base64 text of a ``.npy`` file (later versions). Both may also stand in a plain object without ``choices``.
* ``.npz`` with the same two arrays of the Python API, for several requests as ``0/prompt_routed_experts``,
  ``0/routed_experts``, ``1/...``.

A request is its prompt, then its generated tokens; of several choices the first has the prompt, as the engine ran it
once. -1 stays: no expert ran (a prompt token out of the prefix cache). Base64 text without ``prompt_routed_experts``
starts at the first prompt token; ``usage.prompt_tokens`` or ``prompt_token_ids`` then cuts it. The order of the K ids
is taken for falling gate. The responses do not say how many experts there are or how large; ``model`` may.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.archives import BROKEN, read_array
from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import UNSAID, Part, Sizes, check_shape, id_cells, join, read_records
from specmd_jax.types import Trace

_PROMPT, _ROUTED = "prompt_routed_experts", "routed_experts"


def import_vllm(path: str | os.PathLike[str], sizes: Sizes = UNSAID) -> Trace:
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
    if len(names) > 1:
        first, other = list(names)[:2]
        raise SpecmdError(f"{names[other]}: model is {other!r}, expected {first!r} as before")
    meta = {
        "source": f"vLLM routed experts {path.name}",
        "capture": "--enable-return-routed-experts; ids in the order given",
    }
    return join(path, parts, sizes, meta, next(iter(names), None))


def _requests(place: str, record: dict[str, Any]) -> list[Part]:
    """Makes one request of each choice; the first one's prompt is that of the record."""
    choices = record.get("choices", [record])
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise SpecmdError(f"{place}: choices are not a list of objects, expected those of a completion")
    prompt = _cells(record.get(_PROMPT), f"{place}: {_PROMPT}")
    parts = []
    for index, choice in enumerate(choices):
        where = f"{place}, choice {index}" if "choices" in record else place
        value = choice.get(_ROUTED)
        routed = _cells(value, f"{where}: {_ROUTED}")
        if prompt is None and isinstance(value, str):
            assert routed is not None
            count = _prompt_tokens(where, record, len(routed))
            # the prompt was run once, for all choices together
            routed, count = (routed, count) if index == 0 else (routed[count:], 0)
        else:
            before = prompt if index == 0 else None
            count = 0 if before is None else len(before)
            if before is not None and routed is not None and len(before) and len(routed):
                check_shape(routed, before, f"{where}: {_ROUTED}")
            blocks = [block for block in (before, routed) if block is not None and len(block)]
            routed = np.concatenate(blocks) if blocks else None
        if routed is None or not len(routed):
            raise SpecmdError(f"{where}: {_ROUTED} is missing (was --enable-return-routed-experts set?)")
        parts.append(Part(routed, count, {"prompt_tokens": count}))
    return parts


def _cells(value: Any, place: str) -> npt.NDArray[np.int64] | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
            value = read_array(io.BytesIO(content), len(content), "it", place)
        except (binascii.Error, *BROKEN) as error:
            raise SpecmdError(f"{place} is text, expected base64 of a .npy file: {error}") from error
    return id_cells(value, place)


def _prompt_tokens(place: str, record: dict[str, Any], rows: int) -> int:
    usage, ids = record.get("usage"), record.get("prompt_token_ids")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else len(ids) if isinstance(ids, list) else None
    if type(count) is not int or not 0 <= count <= rows:
        raise SpecmdError(
            f"{place}: {_ROUTED} covers prompt and answer and usage.prompt_tokens is {count}, expected 0 to {rows}"
        )
    return count
