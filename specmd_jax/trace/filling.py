"""A trace whose cache is warm from the start: requests in front that ask for every expert once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.select import uses_of
from specmd_jax.types import Trace


def with_filling(trace: Trace, batch: int = 1, profile_tokens: int | None = None) -> tuple[Trace, int]:
    """Puts `batch` requests in front whose tokens route to every expert of every layer once, the popular ones last.

    What an engine does that fills its cache before it serves. Popularity is counted over the first `profile_tokens`
    tokens of `trace` (None: all), which should not be counted themselves. The gates are all alike, ahead scores are 0,
    and logits are left out. Also gives the number of tokens in front: the least `warmup_tokens` that leave them out.

    Raises SpecmdError if `batch` is less than 1.
    """
    if batch < 1:
        raise SpecmdError(f"batch is {batch}, expected at least 1")
    ids = _every_expert(trace, trace.tokens if profile_tokens is None else profile_tokens)  # [n, L, K]
    ids = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % batch, axis=0)])
    steps = len(ids) // batch
    # a decode pass takes one token of each request: request b has the tokens b, b + batch, ...
    ids = ids.reshape(steps, batch, *ids.shape[1:]).swapaxes(0, 1).reshape(ids.shape)

    def behind(array: npt.NDArray[Any] | None, value: float) -> npt.NDArray[Any] | None:
        if array is None:
            return None
        return np.concatenate([np.full((len(ids), *array.shape[1:]), value, array.dtype), array])

    meta = dict(trace.meta)
    if "requests" in meta:
        meta["requests"] = [{"filling": True}] * batch + list(meta["requests"])
    filled = dataclasses.replace(
        trace,
        expert_ids=np.concatenate([ids.astype(trace.expert_ids.dtype), trace.expert_ids]),
        lengths=np.concatenate([np.full(batch, steps, np.int32), trace.lengths]),
        prompt_lengths=np.concatenate([np.zeros(batch, np.int32), trace.prompt_lengths]),
        gates=behind(trace.gates, 1 / trace.top_k),
        ahead=behind(trace.ahead, 0.0),
        logits=None,
        meta=meta,
    )
    return filled, len(ids)


def _every_expert(trace: Trace, profile_tokens: int) -> npt.NDArray[np.int64]:
    """Gives tokens [n, L, K] that name every expert by rising popularity (ties: the higher id first); the last token
    has the K most popular.
    """
    steps = -(-trace.experts // trace.top_k)
    tokens = np.empty((steps, trace.layers, trace.top_k), np.int64)
    for layer, loads in enumerate(uses_of(trace.expert_ids[:profile_tokens], trace.experts)):
        falling = np.argsort(-loads, kind="stable")
        for step in range(steps):  # from the last token to the first
            start = min(step * trace.top_k, trace.experts - trace.top_k)
            tokens[steps - 1 - step, layer] = falling[start : start + trace.top_k]
    return tokens
