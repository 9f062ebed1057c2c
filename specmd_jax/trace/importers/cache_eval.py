"""``moe-cache-eval``: its event traces, a folder with ``manifest.json`` and a safetensors file.

The manifest (or its folder) is named. An event is one request's pass through one layer: which experts its tokens used,
how many tokens used each (``assignment_counts``) and their summed gates (``gate_mass``), one after the other with
``offsets`` between. So the experts, counts and gate sums of every pass are exact; which token of a prompt used which
expert is not in the file. The rows of a prompt are dealt: each has k different experts, with mean gates. Replays that
cut a prompt into chunks would see what no model did.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.files import file_sha256
from specmd_jax.safetensors import TensorFile
from specmd_jax.trace.importers.common import brief, parse_json, read_text, whole_number
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_EVENTS = ("request_indices", "scheduler_steps", "forward_cycles", "phases", "layer_ids", "token_counts")
_USES = ("expert_ids", "assignment_counts", "gate_mass")
_PREFILL = 0

Columns = dict[str, npt.NDArray[Any]]


class _Event(NamedTuple):
    place: str
    layer: int
    tokens: int
    experts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    mass: npt.NDArray[np.float64]


def is_cache_eval(peek: Peek) -> bool:
    path = peek.path / "manifest.json" if os.path.isdir(peek.path) else peek.path
    if path.name != "manifest.json" or not os.path.isfile(path):
        return False
    inner = peek if path == peek.path else Peek(path)
    return inner.has("artifacts", "events", "num_experts")


def import_cache_eval(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads an event trace of moe-cache-eval; see the module. Raises `SpecmdError` with the file and the event."""
    path = Path(path)
    manifest = path / "manifest.json" if os.path.isdir(path) else path
    head, experts = _manifest(manifest)
    columns = _columns(manifest, head)
    parts = [_part(passes, row) for row, passes in _requests(manifest, columns)]
    model = head["model"]
    name = next((model[key] for key in ("name", "id", "model_id", "model") if isinstance(model.get(key), str)), None)
    layers = np.unique(columns["layer_ids"])
    for part in parts:
        if part.ids.shape[1:] != (layers.size, parts[0].ids.shape[2]):
            raise SpecmdError(f"{manifest}: request {part.row['request']} has other layers or top-k than the first")
    order = columns["request_indices"]
    turns = int((np.diff(order) != 0).sum()) + 1
    meta: dict[str, Any] = {
        "source": f"moe-cache-eval events {manifest.parent.name}",
        "capture": "experts, counts and gate sums of each pass as recorded; rows of a prompt are dealt",
    }
    if layers.tolist() != list(range(layers.size)):
        meta["layer_numbers"] = layers.tolist()
    dealt = any(part.prompt > 1 for part in parts)
    notes = ("rows of prompts are dealt: which token used which expert is not in the file (exact for whole passes)",)
    known = Known(interleaved=turns > len(parts), notes=notes * dealt)
    return join(manifest, parts, sizes, meta, name, experts, strip=strip, known=known)


def _manifest(path: Path) -> tuple[dict[str, Any], int]:
    head = parse_json(read_text(path), str(path))
    model = head.get("model") if isinstance(head, dict) else None
    if not isinstance(model, dict):
        raise SpecmdError(f"{path}: model is {brief(model)}, expected an object with num_experts")
    if head.get("schema_version") != 1:
        raise SpecmdError(f"{path}: schema_version is {brief(head.get('schema_version'))}, expected 1")
    return head, whole_number(model, "num_experts", f"{path}: model", 1)


def _columns(manifest: Path, head: dict[str, Any]) -> Columns:
    artifacts = head.get("artifacts")
    entry = artifacts.get("events") if isinstance(artifacts, dict) else None
    name = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise SpecmdError(f"{manifest}: artifacts.events.path is {brief(name)}, expected a file beside it")
    path = manifest.parent / name
    said = entry.get("sha256") if isinstance(entry, dict) else None
    if said is not None and said != file_sha256(path):
        raise SpecmdError(f"{path}: its sha256 is not {brief(said)}, which {manifest.name} says")
    file = TensorFile(path)
    for column in (*_EVENTS, "offsets", *_USES):
        if column not in file.tensors:
            raise SpecmdError(f"{path}: tensor {column!r} is missing (found: {', '.join(sorted(file.tensors))})")
    columns = {column: np.array(file.read(column)) for column in (*_EVENTS, "offsets", *_USES)}
    count, uses = columns["layer_ids"].size, columns["expert_ids"].size
    for column, values in columns.items():
        wanted = count + 1 if column == "offsets" else count if column in _EVENTS else uses
        kind = "f" if column == "gate_mass" else "iu"
        if values.shape != (wanted,) or values.dtype.kind not in kind:
            raise SpecmdError(f"{path}: {column} is {values.dtype} {list(values.shape)}, expected [{wanted}]")
    offsets = columns["offsets"]
    if not count or offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != uses:
        raise SpecmdError(f"{path}: offsets do not rise from 0 to {uses}, or there is no event")
    return columns


def _requests(path: Path, columns: Columns) -> Iterator[tuple[dict[str, Any], list[tuple[bool, list[_Event]]]]]:
    """Gives the meta row of each request and its passes, with whether a pass is prompt."""
    requests = columns["request_indices"]
    for request in dict.fromkeys(requests.tolist()):
        passes: dict[tuple[int, int], tuple[bool, list[_Event]]] = {}
        for index in np.flatnonzero(requests == request).tolist():
            key = int(columns["scheduler_steps"][index]), int(columns["forward_cycles"][index])
            start, stop = (int(at) for at in columns["offsets"][index : index + 2])
            event = _Event(
                f"{path}, event {index}",
                int(columns["layer_ids"][index]),
                int(columns["token_counts"][index]),
                columns["expert_ids"][start:stop].astype(np.int64),
                columns["assignment_counts"][start:stop].astype(np.int64),
                columns["gate_mass"][start:stop].astype(np.float64),
            )
            prompt, events = passes.setdefault(key, (bool(columns["phases"][index] == _PREFILL), []))
            if prompt != (columns["phases"][index] == _PREFILL):
                raise SpecmdError(f"{event.place}: another phase than in the layers before, expected one per pass")
            events.append(event)
        yield {"request": int(request)}, [passes[key] for key in sorted(passes)]


def _part(passes: list[tuple[bool, list[_Event]]], row: dict[str, Any]) -> Part:
    ids, gates, prompt, decoding = [], [], 0, False
    for is_prompt, events in passes:
        if is_prompt and decoding:
            raise SpecmdError(f"{events[0].place}: a prompt comes after decoding, expected prompts first")
        decoding = not is_prompt
        numbers = [event.layer for event in events]
        if sorted(set(numbers)) != numbers:
            raise SpecmdError(f"{events[0].place}: layers {numbers[:8]}, expected them to rise in a pass")
        dealt = [_deal(event, events[0]) for event in events]
        ids.append(np.stack([one for one, _ in dealt], axis=1))
        gates.append(np.stack([one for _, one in dealt], axis=1))
        if ids[-1].shape[1:] != ids[0].shape[1:]:
            raise SpecmdError(f"{events[0].place}: other layers or top-k than before")
        prompt += len(ids[-1]) if is_prompt else 0
    return Part(np.concatenate(ids), prompt, row | {"prompt_tokens": prompt}, np.concatenate(gates))


def _deal(event: _Event, first: _Event) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Deals the uses of a layer to rows [T, K], each with different experts, by falling mean gate."""
    tokens, uses = event.tokens, int(event.counts.sum())
    if tokens < 1 or tokens != first.tokens:
        raise SpecmdError(f"{event.place}: token_count is {tokens}, expected {max(first.tokens, 1)} as in its pass")
    if (event.counts < 1).any() or (event.counts > tokens).any() or not uses or uses % tokens:
        raise SpecmdError(f"{event.place}: {uses} assignments of {tokens} tokens, expected the same for each token")
    mean = event.mass / event.counts
    order = np.lexsort((event.experts, -mean))
    dealt, share = np.repeat(event.experts[order], event.counts[order]), np.repeat(mean[order], event.counts[order])
    # one expert's uses lie side by side, at most as many as there are tokens: none meets a row twice
    return dealt.reshape(-1, tokens).T, share.reshape(-1, tokens).T.astype(np.float32)
