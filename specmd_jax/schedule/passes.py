"""The forward passes of requests in their order: which tokens run together (CONTRACT.md section 1).

Nothing but the lengths of the requests decides it, so a model that runs requests knows its passes before the first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from specmd_jax.schedule.drafts import Drafted, next_opening
from specmd_jax.types import DECODE, PREFILL


class Passes(NamedTuple):
    """The forward passes of a replay: p passes over rows, which are the tokens of R requests.

    Without drafts every token is a row of one pass. With them, a token whose draft was rejected is a row of further
    passes.
    """

    order: Int64[np.ndarray, " rows"]  # tokens in the order in which they run: by pass, in a pass by slot and position
    of_token: Int64[np.ndarray, " rows"]  # pass of order[i]; never falls
    phase: Int8[np.ndarray, " p"]  # PREFILL or DECODE
    request: Int32[np.ndarray, " p"]  # request of the pass's first token
    begins: Bool[np.ndarray, " p"]  # first pass of its request (batch 1)
    slot: Int32[np.ndarray, " R"]  # the slot that each request takes, 0..batch-1
    kept: Int32[np.ndarray, " p"]  # tokens of the pass that are kept: all but those whose draft was rejected
    turns: Int32[np.ndarray, " p"]  # requests that take part


def passes_of(
    lengths: Int32[np.ndarray, " R"],
    prompt_lengths: Int32[np.ndarray, " R"],
    batch: int = 1,
    chunk: int | None = None,
    drafted: Drafted | None = None,
) -> Passes:
    """Gives the passes of requests.

    Args:
      lengths: tokens of each request.
      prompt_lengths: how many of them are its prompt.
      batch: requests decoded together.
      chunk: prompt tokens per prefill pass; None: the whole prompt in one.
      drafted: where decode passes begin, with drafts; None: each decoded token is one.
    """
    if batch == 1:
        return one_by_one(lengths, prompt_lengths, chunk, drafted)
    return _continuous(lengths, prompt_lengths, batch, chunk, drafted)


def one_by_one(
    lengths: Int32[np.ndarray, " R"],
    prompt_lengths: Int32[np.ndarray, " R"],
    chunk: int | None,
    drafted: Drafted | None = None,
) -> Passes:
    """Gives the passes of requests that run one after the other (no loop over tokens)."""
    requests, tokens = lengths.shape[0], int(lengths.sum())
    lengths, prompts = lengths.astype(np.int64), prompt_lengths.astype(np.int64)
    chunks = np.minimum(prompts, 1) if chunk is None else -(-prompts // chunk)  # [R] prefill passes
    request = np.repeat(np.arange(requests), lengths)
    position = np.arange(tokens) - (np.cumsum(lengths) - lengths)[request]
    decoding = position - prompts[request]  # < 0: a prompt token
    decodes = lengths - prompts  # [R] decode passes
    if drafted is not None:
        decodes = np.bincount(request[drafted.opens], minlength=requests)
        begun = np.cumsum(drafted.opens)
        decoding = np.where(decoding < 0, decoding, begun - 1 - (np.cumsum(decodes) - decodes)[request])
    per_request = chunks + decodes
    first_pass = np.cumsum(per_request) - per_request
    prefilling = np.zeros_like(position) if chunk is None else position // chunk
    of_token = first_pass[request] + np.where(decoding < 0, prefilling, chunks[request] + decoding)
    request_of_pass = np.repeat(np.arange(requests), per_request)
    position_of_pass = np.arange(per_request.sum()) - first_pass[request_of_pass]
    phase = np.where(position_of_pass < chunks[request_of_pass], PREFILL, DECODE).astype(np.int8)
    kept, order = np.bincount(of_token, minlength=phase.size), np.arange(tokens)
    if drafted is not None:
        first = np.cumsum(kept) - kept
        verified = np.minimum(1 + drafted.tokens, np.cumsum(lengths)[request_of_pass] - first)
        rows = np.where(phase == DECODE, verified, kept)
        of_token = np.repeat(np.arange(phase.size), rows)
        order = np.arange(rows.sum()) - (np.cumsum(rows) - rows - first)[of_token]
    return Passes(
        order=order,
        of_token=of_token,
        phase=phase,
        request=request_of_pass.astype(np.int32),
        begins=position_of_pass == 0,
        slot=np.zeros(requests, np.int32),
        kept=kept.astype(np.int32),
        turns=np.ones(phase.size, np.int32),
    )


def _continuous(
    lengths: Int32[np.ndarray, " R"],
    prompt_lengths: Int32[np.ndarray, " R"],
    batch: int,
    chunk: int | None,
    drafted: Drafted | None,
) -> Passes:
    """Gives the passes of continuous batching: a loop over passes, not over tokens of a prompt."""
    ends, count = np.cumsum(lengths, dtype=np.int64), lengths.shape[0]
    rows = 1 if drafted is None else 1 + drafted.tokens
    opening = None if drafted is None else next_opening(drafted.opens)
    slots: list[tuple[int, int] | None] = [None] * batch  # (request, its next token)
    waiting = 0
    blocks: list[Int64[np.ndarray, " _"]] = []
    phases: list[int] = []
    requests: list[int] = []
    kept: list[int] = []
    turns: list[int] = []
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
                    kept.append(blocks[-1].size)
                    turns.append(1)
                if decode < ends[waiting]:  # a request without decode leaves its slot free at once
                    slots[slot] = (waiting, decode)
                taken[waiting] = slot
                waiting += 1
        active = [slot for slot in slots if slot is not None]
        after = [None if s is None else (s[0], _next(s[1], int(ends[s[0]]), opening)) for s in slots]
        if active:
            blocks.append(np.concatenate([np.arange(t, min(t + rows, ends[request])) for request, t in active]))
            phases.append(DECODE)
            requests.append(active[0][0])
            kept.append(sum(new[1] - old[1] for old, new in zip(slots, after, strict=True) if old and new))
            turns.append(len(active))
        slots = [s if s is not None and s[1] < ends[s[0]] else None for s in after]
    sizes = [len(block) for block in blocks]
    return Passes(
        order=np.concatenate(blocks),
        of_token=np.repeat(np.arange(len(blocks)), sizes),
        phase=np.array(phases, np.int8),
        request=np.array(requests, np.int32),
        begins=np.zeros(len(blocks), np.bool_),
        slot=taken,
        kept=np.array(kept, np.int32),
        turns=np.array(turns, np.int32),
    )


def _next(token: int, end: int, opening: Int64[np.ndarray, " N"] | None) -> int:
    """Gives the first token that the pass beginning at `token` does not keep; `end` is the request's."""
    return token + 1 if opening is None else min(end, int(opening[token]))
