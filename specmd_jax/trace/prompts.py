"""Prompts for traces that recorded none, and requests cut short."""

from __future__ import annotations

import dataclasses

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.select import select_requests, take_tokens
from specmd_jax.types import Trace

PROMPT_NOTE = "prompts made from decode tokens"
"""What every number says that comes from a trace of `with_prompts`."""


def with_prompts(trace: Trace, prompt_tokens: int) -> Trace:
    """Makes each request's first `prompt_tokens` tokens its prompt; a shorter request keeps one token to decode.

    The routing is that of decoded tokens, which a real prompt's may differ from: ``meta["prompts"]`` says so. Accepted
    counts are left out: they are of other decode passes. Raises SpecmdError if `prompt_tokens` is less than 1, or if
    the trace has prompts of its own.
    """
    if prompt_tokens < 1:
        raise SpecmdError(f"prompt_tokens is {prompt_tokens}, expected at least 1")
    own = np.flatnonzero(trace.prompt_lengths)
    if own.size:
        raise SpecmdError(
            f"request {own[0]} has a prompt of {trace.prompt_lengths[own[0]]} tokens: expected a decode-only trace"
        )
    prompts = np.minimum(prompt_tokens, np.maximum(trace.lengths - 1, 0)).astype(np.int32)
    meta = {key: value for key, value in trace.meta.items() if key != "accepted"}
    return dataclasses.replace(trace, prompt_lengths=prompts, meta={**meta, "prompts": PROMPT_NOTE})


def clip_requests(trace: Trace, tokens: int) -> Trace:
    """Gives each request's first `tokens` tokens. Raises SpecmdError if that is less than 1."""
    if tokens < 1:
        raise SpecmdError(f"tokens of a request is {tokens}, expected at least 1")
    place = np.arange(trace.tokens) - np.repeat(np.cumsum(trace.lengths) - trace.lengths, trace.lengths)
    return dataclasses.replace(
        take_tokens(trace, place < tokens),
        lengths=np.minimum(trace.lengths, tokens).astype(np.int32),
        prompt_lengths=np.minimum(trace.prompt_lengths, tokens).astype(np.int32),
    )


def without_prompts(trace: Trace) -> Trace:
    """Gives what follows the prompts: decoded tokens alone. Raises SpecmdError if there are none.

    Requests that decoded none are left out.
    """
    decoded = trace.lengths - trace.prompt_lengths
    if not decoded.any():
        raise SpecmdError(f"{trace.model}: no request has decoded tokens")
    trace = select_requests(trace, np.flatnonzero(decoded))
    place = np.arange(trace.tokens) - np.repeat(np.cumsum(trace.lengths) - trace.lengths, trace.lengths)
    return dataclasses.replace(
        take_tokens(trace, place >= np.repeat(trace.prompt_lengths, trace.lengths)),
        lengths=trace.lengths - trace.prompt_lengths,
        prompt_lengths=np.zeros_like(trace.lengths),
    )


def longest_requests(trace: Trace, count: int) -> Trace:
    """Gives the first `count` of the longest requests, in the trace's order."""
    order = np.argsort(-trace.lengths, kind="stable")[:count]
    return select_requests(trace, np.sort(order))
