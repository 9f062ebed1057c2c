"""Speculative decoding: where the decode passes of requests begin (CONTRACT.md section 1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from specmd_jax.errors import SpecmdError
from specmd_jax.types import Trace


class Drafts(NamedTuple):
    """What is drafted, and how it is known what is accepted (hashable)."""

    tokens: int  # d, drafted for a pass
    acceptance: float | None = None  # of a draft whose predecessors were accepted; None: the trace has counts
    seed: int = 0
    draft_s: float = 0.0  # seconds of drafting before a pass


class Drafted(NamedTuple):
    """What the passes of some requests of N tokens need to know of it."""

    tokens: int
    opens: Bool[np.ndarray, " N"]  # a decode pass begins at this token


def check_drafts(drafts: Drafts | None) -> None:
    """Raises `SpecmdError` for numbers that no trace can serve."""
    if drafts is None:
        return
    for name, value in (("drafts", drafts.tokens), ("draft_seed", drafts.seed)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise SpecmdError(f"{name} is {value!r}, expected a whole number of at least 0")
    if drafts.acceptance is not None and not (_is_number(drafts.acceptance) and 0 <= drafts.acceptance <= 1):
        raise SpecmdError(f"acceptance is {drafts.acceptance!r}, expected 0 to 1")
    if not (_is_number(drafts.draft_s) and 0 <= drafts.draft_s < 1e6):
        raise SpecmdError(f"draft_s is {drafts.draft_s!r}, expected seconds from 0 to below 1e6")


def check_accepted(trace: Trace, drafts: Drafts | None) -> None:
    """Raises `SpecmdError` unless it is known, in one way, what is accepted of this trace (its head is enough)."""
    check_drafts(drafts)
    if drafts is None:
        return
    counts = trace.meta.get("accepted")
    if counts is None:
        if drafts.acceptance is None:
            raise SpecmdError(
                f"drafts is {drafts.tokens}, and the trace of {trace.model} has no accepted counts (meta key "
                "'accepted'): expected an acceptance from 0 to 1"
            )
        return
    if drafts.acceptance is not None:
        raise SpecmdError(
            f"acceptance is {drafts.acceptance}, and the trace of {trace.model} has accepted counts: expected None"
        )
    for request, row in enumerate(counts):
        for number, count in enumerate(row):
            if count > 1 + drafts.tokens:
                raise SpecmdError(
                    f"request {request}, decode pass {number}: {count} tokens accepted, expected 1 to "
                    f"{1 + drafts.tokens}: accepted counts above 1 + d (drafts is {drafts.tokens})"
                )
        decoded = int(trace.lengths[request] - trace.prompt_lengths[request])
        if sum(row) < decoded:
            raise SpecmdError(
                f"request {request}: its accepted counts sum to {sum(row)}, expected the {decoded} decoded tokens or "
                "more"
            )


def drafted(trace: Trace, drafts: Drafts | None, first_token: int = 0) -> Drafted | None:
    """Gives where decode passes begin; None without drafts, when each decoded token is a pass.

    Whether the draft of a token would be accepted is one draw per token of the trace, so that it depends neither on
    how many are drafted nor on how the trace is cut; a higher acceptance accepts what a lower one does, and more.

    Args:
      trace: a valid trace that passes `check_accepted`, or a stretch of a longer one.
      first_token: number of its first token in the longer one.
    """
    if drafts is None:
        return None
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    first = ends - trace.lengths + trace.prompt_lengths  # the first decoded token of each request
    place = np.arange(trace.tokens)
    decoding = place >= np.repeat(first, trace.lengths)
    opens = np.zeros(trace.tokens, np.bool_)
    opens[first[first < ends]] = True
    counts: list[list[int]] | None = trace.meta.get("accepted")
    if counts is not None:
        for begin, end, row in zip(first, ends, counts, strict=True):
            behind = begin + np.cumsum(row, dtype=np.int64)
            opens[behind[behind < end]] = True
        return Drafted(drafts.tokens, opens)
    assert drafts.acceptance is not None
    bits = np.random.PCG64(drafts.seed)
    bits.advance(first_token)
    rejected = np.random.Generator(bits).random(trace.tokens) >= drafts.acceptance
    # a pass begins behind a rejection, and behind every 1 + d tokens since
    last = np.maximum.accumulate(np.where(opens | (decoding & rejected), place, 0))
    return Drafted(drafts.tokens, decoding & ((place - last) % (1 + drafts.tokens) == 0))


def next_opening(opens: Bool[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """Gives the next token behind each that opens a pass, N where there is none."""
    found = np.where(opens, np.arange(opens.size), opens.size)
    behind = np.minimum.accumulate(found[::-1])[::-1]
    return np.append(behind[1:], opens.size).astype(np.int64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
