"""The forward passes of requests in their order: which tokens run together (CONTRACT.md section 1).

Nothing but the lengths of the requests decides it, so a model that runs requests knows its passes before the first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from specmd_jax.types import DECODE, PREFILL


class Passes(NamedTuple):
    """The forward passes of a replay: p passes over N tokens of R requests."""

    order: Int64[np.ndarray, " N"]  # tokens in the order in which they run: by pass, in a pass by slot and position
    of_token: Int64[np.ndarray, " N"]  # pass of order[i]; never falls
    phase: Int8[np.ndarray, " p"]  # PREFILL or DECODE
    request: Int32[np.ndarray, " p"]  # request of the pass's first token
    begins: Bool[np.ndarray, " p"]  # first pass of its request (batch 1)
    slot: Int32[np.ndarray, " R"]  # the slot that each request takes, 0..batch-1


def passes_of(
    lengths: Int32[np.ndarray, " R"], prompt_lengths: Int32[np.ndarray, " R"], batch: int = 1, chunk: int | None = None
) -> Passes:
    """Gives the passes of requests.

    Args:
      lengths: tokens of each request.
      prompt_lengths: how many of them are its prompt.
      batch: requests decoded together.
      chunk: prompt tokens per prefill pass; None: the whole prompt in one.
    """
    if batch == 1:
        return one_by_one(lengths, prompt_lengths, chunk)
    return _continuous(lengths, prompt_lengths, batch, chunk)


def one_by_one(lengths: Int32[np.ndarray, " R"], prompt_lengths: Int32[np.ndarray, " R"], chunk: int | None) -> Passes:
    """Gives the passes of requests that run one after the other (no loop over tokens)."""
    requests, tokens = lengths.shape[0], int(lengths.sum())
    lengths, prompts = lengths.astype(np.int64), prompt_lengths.astype(np.int64)
    chunks = np.minimum(prompts, 1) if chunk is None else -(-prompts // chunk)  # [R] prefill passes
    per_request = chunks + lengths - prompts
    first_pass = np.cumsum(per_request) - per_request
    request = np.repeat(np.arange(requests), lengths)
    position = np.arange(tokens) - (np.cumsum(lengths) - lengths)[request]
    decoding = position - prompts[request]  # < 0: a prompt token
    prefilling = np.zeros_like(position) if chunk is None else position // chunk
    of_token = first_pass[request] + np.where(decoding < 0, prefilling, chunks[request] + decoding)
    request_of_pass = np.repeat(np.arange(requests), per_request)
    position_of_pass = np.arange(per_request.sum()) - first_pass[request_of_pass]
    return Passes(
        order=np.arange(tokens),
        of_token=of_token,
        phase=np.where(position_of_pass < chunks[request_of_pass], PREFILL, DECODE).astype(np.int8),
        request=request_of_pass.astype(np.int32),
        begins=position_of_pass == 0,
        slot=np.zeros(requests, np.int32),
    )


def _continuous(
    lengths: Int32[np.ndarray, " R"], prompt_lengths: Int32[np.ndarray, " R"], batch: int, chunk: int | None
) -> Passes:
    """Gives the passes of continuous batching: a loop over passes, not over tokens of a prompt."""
    ends, count = np.cumsum(lengths, dtype=np.int64), lengths.shape[0]
    slots: list[tuple[int, int] | None] = [None] * batch  # (request, its next token)
    waiting = 0
    blocks: list[Int64[np.ndarray, " _"]] = []
    phases: list[int] = []
    requests: list[int] = []
    taken = np.zeros(count, np.int32)
    while waiting < count or any(slots):
        for slot in range(batch):
            while slots[slot] is None and waiting < count:
                begin = int(ends[waiting]) - int(lengths[waiting])
                decode = begin + int(prompt_lengths[waiting])
                for start in range(begin, decode, chunk or int(ends[-1])):
                    blocks.append(np.arange(start, min(decode, start + (chunk or int(ends[-1])))))
                    phases.append(PREFILL)
                    requests.append(waiting)
                if decode < ends[waiting]:  # a request without decode leaves its slot free at once
                    slots[slot] = (waiting, decode)
                taken[waiting] = slot
                waiting += 1
        active = [slot for slot in slots if slot is not None]
        if active:
            blocks.append(np.array([token for _, token in active]))
            phases.append(DECODE)
            requests.append(active[0][0])
        slots = [(s[0], s[1] + 1) if s is not None and s[1] + 1 < ends[s[0]] else None for s in slots]
    sizes = [len(block) for block in blocks]
    return Passes(
        order=np.concatenate(blocks),
        of_token=np.repeat(np.arange(len(blocks)), sizes),
        phase=np.array(phases, np.int8),
        request=np.array(requests, np.int32),
        begins=np.zeros(len(blocks), np.bool_),
        slot=taken,
    )
