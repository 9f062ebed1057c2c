"""Tokens of a trace that may be no routing: masks [N] of them, one function a kind; `meaning` says what follows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Trace

Mask = npt.NDArray[np.bool_]

_RUN, _PROFILING = 3, 8  # alike tokens in a row from which on they are named
_UNLIKELY = -20.0  # log of a probability that is no accident


def padding(trace: Trace) -> Mask:
    """Tokens with one id k times in all layers (k > 1)."""
    if trace.top_k == 1:
        return np.zeros(trace.tokens, np.bool_)
    ids = trace.expert_ids
    none, same = (ids < 0).all(-1), (ids == ids[..., :1]).all(-1) & (ids[..., 0] >= 0)
    return (none | same).all(-1) & same.any(-1)


def nan(trace: Trace) -> Mask:
    """Tokens with experts 0 to k-1, in order, in all layers; two layers at least."""
    if trace.top_k == 1:
        return np.zeros(trace.tokens, np.bool_)
    none = (trace.expert_ids < 0).all(-1)
    first = (trace.expert_ids == np.arange(trace.top_k)).all(-1)
    return (none | first).all(-1) & (first.sum(-1) >= 2)


def ranking(trace: Trace) -> Mask:
    """Prompts whose first ids, over its tokens, are all different in every layer as no routing would make them."""
    mask = np.zeros(trace.tokens, np.bool_)
    starts = np.cumsum(trace.lengths) - trace.lengths
    logs = np.append(0.0, np.cumsum(np.log1p(-np.arange(trace.experts - 1) / trace.experts)))
    for start, prompt in zip(starts, trace.prompt_lengths, strict=True):
        block = trace.expert_ids[start : start + prompt]
        block = block[:, (block >= 0).all(axis=(0, 2))]
        rows = min(int(prompt), trace.experts // trace.top_k)
        if rows < 2 or not block.shape[1]:
            continue
        first = np.sort(block[:rows].swapaxes(0, 1).reshape(block.shape[1], -1), axis=-1)
        chance = block.shape[1] * (logs[min(first.shape[1], logs.size - 1)] - rows * logs[trace.top_k])
        if chance < _UNLIKELY and (np.diff(first, axis=-1) > 0).all():
            mask[start : start + prompt] = True
    return mask


def alike(trace: Trace) -> Mask:
    """Tokens that route as the one before in their request does, in all layers; two layers at least."""
    ids = trace.expert_ids
    alike = np.zeros(trace.tokens, np.bool_)
    if trace.layers > 1:
        alike[1:] = (ids[1:] == ids[:-1]).all(axis=(1, 2)) & ((ids[1:] >= 0).any(-1).sum(-1) > 1)
    alike[np.cumsum(trace.lengths) - trace.lengths] = False
    return alike


def leading(alike: Mask) -> Mask:
    """The run of alike tokens that the trace begins with, if it is long."""
    length = int(np.argmin(alike[1:])) if not alike[1:].all() else alike.size - 1
    mask = np.zeros_like(alike)
    if length + 1 >= _PROFILING:
        mask[: length + 1] = True
    return mask


def runs(mask: Mask) -> Mask:
    """Keeps runs of a mask of tokens like the one before, where enough tokens are alike."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.view(np.int8), [0]))))
    kept = np.zeros_like(mask)
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        kept[start:stop] = stop - start + 1 >= _RUN
    return kept


def with_first(mask: Mask) -> Mask:
    """A mask of tokens like the one before, with the first of each run."""
    return mask | np.append(mask[1:], False)


def decoded(trace: Trace) -> Mask:
    """Tokens behind the prompt of their request."""
    starts = np.cumsum(trace.lengths) - trace.lengths
    place = np.arange(trace.tokens) - np.repeat(starts, trace.lengths)
    return place >= np.repeat(trace.prompt_lengths, trace.lengths)
