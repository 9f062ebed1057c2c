"""``router-trace``: fitz-tec's binary router traces: the router's probabilities of every expert.

``RTRACE01``, then the number of experts and a version (int32 each, little-endian), then a record for each token and
layer: its numbers (int32 each) and a float32 per expert, the softmax. The k likeliest experts are the routed ones (K
is that of the model, or given; ties: the lower id), their gates add up to 1, and logits are the logarithms. A request
begins with each token and layer that comes a second time; prompts are not told apart.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import read_bytes
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join, top_k_of
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

MAGIC = b"RTRACE01"
_HEAD = len(MAGIC) + 8


def is_rtrace(peek: Peek) -> bool:
    return peek.head.startswith(MAGIC)


def import_rtrace(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads a binary router trace; see the module. Raises `SpecmdError` with the file and the record."""
    path = Path(path)
    content = read_bytes(path)
    if not content.startswith(MAGIC) or len(content) < _HEAD:
        raise SpecmdError(f"{path}: expected {MAGIC.decode()}, two numbers and records")
    top_k = top_k_of(path, sizes)
    experts = int(np.frombuffer(content, "<i4", 1, len(MAGIC))[0])
    if not top_k <= experts < 1 << 16:
        raise SpecmdError(f"{path}: {experts} experts, expected {top_k} (top_k) to 65535")
    record = np.dtype([("token", "<i4"), ("layer", "<i4"), ("share", "<f4", (experts,))])
    if (len(content) - _HEAD) % record.itemsize or len(content) == _HEAD:
        raise SpecmdError(f"{path}: {len(content) - _HEAD} bytes of records, expected a multiple of {record.itemsize}")
    rows = np.frombuffer(content, record, offset=_HEAD)
    for name in ("token", "layer"):
        for bad in np.flatnonzero((rows[name] < 0) | (rows[name] >= 1 << 20))[:1]:
            raise SpecmdError(f"{path}, record {bad}: {name} is {rows[name][bad]}, expected 0 to {(1 << 20) - 1}")
    share = rows["share"]
    for bad in np.flatnonzero(~(np.isfinite(share) & (share >= 0)).all(-1) | ~share.any(-1))[:1]:
        raise SpecmdError(f"{path}, record {bad}: expected probabilities, from 0 on and not all 0")
    numbers = np.unique(rows["layer"])
    parts = [_part(rows[start:stop], numbers, top_k) for start, stop in _requests(rows)]
    meta: dict[str, Any] = {
        "source": f"router trace {path.name}",
        "capture": f"softmax of experts; the {top_k} likeliest, gates scaled to a sum of 1; its logarithm is logits",
    }
    if numbers.tolist() != list(range(numbers.size)):
        meta["layer_numbers"] = numbers.tolist()
    return join(path, parts, sizes, meta, None, experts, strip=strip, known=Known(phases=False))


def _requests(rows: np.ndarray) -> list[tuple[int, int]]:
    """Cuts records where a token and layer come again."""
    edges, seen = [0], set[tuple[int, int]]()
    for index, cell in enumerate(zip(rows["token"].tolist(), rows["layer"].tolist(), strict=True)):
        if cell in seen:
            edges.append(index)
            seen = set()
        seen.add(cell)
    return list(zip(edges, [*edges[1:], len(rows)], strict=True))


def _part(rows: np.ndarray, numbers: np.ndarray, top_k: int) -> Part:
    tokens, token = np.unique(rows["token"], return_inverse=True)
    layer = np.searchsorted(numbers, rows["layer"])
    order = np.argsort(-rows["share"], axis=-1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(rows["share"], order, -1)
    ids = np.full((tokens.size, numbers.size, top_k), -1, np.int64)
    gates = np.zeros(ids.shape, np.float32)
    logits = np.zeros((tokens.size, numbers.size, rows["share"].shape[-1]), np.float32)
    ids[token, layer] = order
    gates[token, layer] = chosen / chosen.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):  # a probability of 0 is -inf
        logits[token, layer] = np.log(rows["share"])
    return Part(ids, 0, {"prompt_tokens": 0}, gates, logits)
