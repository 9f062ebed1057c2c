"""Examples from a decode trace: what a learned policy sees at every visit, and what it should say.

The tables are those of `policies.use_history`, drawn over the tokens of each request from an empty history on. A
policy in the scan sees layer l after its visit: this token's demand in the layers up to l, and that of the token before
in the others. `Examples` keeps both tokens, and `learn.predictor` puts them together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.policies import use_history as history
from specmd_jax.trace import select_requests
from specmd_jax.types import Trace

Bytes = npt.NDArray[np.uint8]


class Examples(NamedTuple):
    """[N] decoded tokens of whole requests."""

    demand: npt.NDArray[np.bool_]  # [N, L, E]
    seen: Bytes  # [N, L, E, F] features of each expert after the token
    wave: Bytes  # [N, L * E] demand of the token
    topic: Bytes  # [N, L * E] slow shares of use after the token
    starts: npt.NDArray[np.bool_]  # [N] first token of its request
    request: npt.NDArray[np.int64]  # [N] number of the request in the trace


class Batch(NamedTuple):
    """Tokens as a predictor takes them; "before" is the token before, or nothing at a request's first."""

    seen: Bytes  # [B, L, E, F]
    wave: Bytes  # [B, L * E]
    wave_before: Bytes  # [B, L * E]
    topic: Bytes  # [B, L * E]
    topic_before: Bytes  # [B, L * E]
    label: npt.NDArray[np.float32]  # [B, L, E]


def decoded(trace: Trace, requests: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Demand [N, L, E] and gate mass [N, L, E] of the decoded tokens of some requests; without gates, equal shares."""
    part = select_requests(trace, requests)
    first = np.repeat(np.cumsum(part.lengths) - part.lengths, part.lengths)
    rows = np.arange(part.tokens) - first >= np.repeat(part.prompt_lengths, part.lengths)
    ids = part.expert_ids[rows].astype(np.int64)
    gates = np.full(ids.shape, 1 / part.top_k, np.float32) if part.gates is None else part.gates[rows]
    demand = np.zeros((*ids.shape[:2], part.experts + 1), np.bool_)
    mass = np.zeros(demand.shape, np.float32)
    np.put_along_axis(demand, ids, True, axis=-1)  # -1 goes to the last place, which is cut off
    np.put_along_axis(mass, ids, gates.astype(np.float32), axis=-1)
    return demand[..., :-1], mass[..., :-1]


def examples(trace: Trace, requests: npt.NDArray[np.int64]) -> Examples:
    """Gives the decoded tokens of some requests of a trace, prompts left out. Raises SpecmdError if there are none."""
    lengths = (trace.lengths - trace.prompt_lengths)[requests]
    if not lengths.sum():
        raise SpecmdError(f"{trace.model}: none of {len(requests)} requests has decoded tokens")
    demand, mass = decoded(trace, requests)
    starts = np.zeros(len(demand), np.bool_)
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    with jax.default_device(_host()):  # a scan of small steps, which an accelerator only makes wait
        seen, wave, topic = (np.asarray(x) for x in _draw(demand, mass, starts))
    return Examples(demand, seen, wave, topic, starts, np.repeat(requests, lengths))


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to do without
        return None


@jax.jit
def _draw(demand: jax.Array, mass: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    empty = history.blank(*demand.shape[1:])

    def token(memory: history.History, new: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[history.History, tuple]:
        memory = jax.tree.map(lambda old, fresh: jnp.where(new[2], fresh, old), memory, empty)
        memory = history.seen(memory, new[0], new[1])
        drawn = history.features(memory), history.wave(memory.last), history.topic(memory.use)
        return memory, tuple(x.astype(jnp.uint8) for x in drawn)

    return jax.lax.scan(token, empty, (demand, mass, starts))[1]


def batch(found: Examples, labels: npt.NDArray[np.floating], rows: npt.NDArray[np.int64], head: str) -> Batch:
    """Gives some tokens for a head.

    The evictor scores a layer right after its visit, from its own features after it. The prefetcher scores a layer
    before its visit, from its features after the token before.
    """
    before, starts = rows - 1, found.starts[rows]
    wave_before, topic_before, seen = found.wave[before], found.topic[before], found.seen[rows]
    wave_before[starts] = topic_before[starts] = 0
    if head == "prefetcher":
        seen = found.seen[before]
        seen[starts] = np.asarray(history.features(history.blank(*found.demand.shape[1:])))
    return Batch(seen, found.wave[rows], wave_before, found.topic[rows], topic_before, labels[rows].astype(np.float32))


def labels(found: Examples, head: str, fade: float) -> npt.NDArray[np.float16]:
    """Gives what a head should say [N, L, E] of each expert of each layer at each token, in 0..1.

    For the prefetcher, whether the token uses it. For the evictor, ``fade ** (visits until the next use - 1)`` within
    the request, 0 if there is none: what a cache gains by an expert is its next use, and the sooner, the surer it is
    still there.
    """
    if head == "prefetcher":
        return found.demand.astype(np.float16)
    soon = np.zeros(found.demand.shape, np.float16)
    value = np.zeros(found.demand.shape[1:], np.float32)
    ends = np.append(found.starts[1:], True)
    for n in range(len(soon) - 1, -1, -1):
        value = np.zeros_like(value) if ends[n] else value
        soon[n] = value
        value = np.where(found.demand[n], np.float32(1), value * np.float32(fade))
    return soon
