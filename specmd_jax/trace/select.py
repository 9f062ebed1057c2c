"""Parts of a trace: some of its requests, or its first tokens; and how often tokens use each expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.types import Trace

PER_REQUEST = ("requests", "accepted")
"""Keys of a trace's meta that have a row per request."""


def select_requests(trace: Trace, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Trace:
    """Gives the given requests in the given order, each whole."""
    chosen = np.asarray(indices)
    if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "iu":
        raise SpecmdError(f"requests to select are {indices!r}, expected a list of at least one index")
    for request in chosen[(chosen < 0) | (chosen >= trace.requests)][:1]:
        raise SpecmdError(f"request to select is {request}, expected 0 to {trace.requests - 1}")
    lengths = trace.lengths[chosen]
    starts = (np.cumsum(trace.lengths, dtype=np.int64) - trace.lengths)[chosen]
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    rows = np.repeat(starts - begins, lengths) + np.arange(lengths.sum(dtype=np.int64))
    meta = dict(trace.meta)
    for key in PER_REQUEST:
        if key in meta:
            meta[key] = [meta[key][request] for request in chosen]
    return dataclasses.replace(
        take_tokens(trace, rows), lengths=lengths, prompt_lengths=trace.prompt_lengths[chosen], meta=meta
    )


def first_tokens(trace: Trace, n: int) -> Trace:
    """Takes the first ``n`` tokens: whole requests, the last one cut. A trace with no more stays as it is."""
    if n < 1:
        raise SpecmdError(f"tokens to keep is {n}, expected at least 1")
    if n >= trace.tokens:
        return trace
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    requests = int(np.searchsorted(ends, n)) + 1
    lengths = trace.lengths[:requests].copy()
    lengths[-1] -= ends[requests - 1] - n
    meta = dict(trace.meta)
    for key in PER_REQUEST:
        if key in meta:
            meta[key] = meta[key][:requests]
    prompts = np.minimum(trace.prompt_lengths[:requests], lengths)
    return dataclasses.replace(take_tokens(trace, slice(0, n)), lengths=lengths, prompt_lengths=prompts, meta=meta)


def uses_of(expert_ids: npt.NDArray[np.integer[Any]], experts: int) -> npt.NDArray[np.int64]:
    """Gives the tokens that route to each expert, [L, E], of the ids of some tokens, [N, L, K] (-1: no expert)."""
    layers = range(expert_ids.shape[1])
    return np.stack([np.bincount(ids[ids >= 0], minlength=experts) for ids in (expert_ids[:, at] for at in layers)])


def take_tokens(trace: Trace, rows: slice | npt.NDArray[Any]) -> Trace:
    """Gives the rows ([N] mask, indices or slice) of every per-token array; lengths and meta stay as they are."""

    def cut(array: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        return None if array is None else array[rows]

    return dataclasses.replace(
        trace,
        expert_ids=trace.expert_ids[rows],
        gates=cut(trace.gates),
        logits=cut(trace.logits),
        ahead=cut(trace.ahead),
    )
