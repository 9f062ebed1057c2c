"""Examples from a decode trace: what a learned policy sees at every visit, and what it should say.

The tables are those of `policies.use_history`, drawn over the tokens of each request from an empty history on. A
policy in the scan sees layer l after its visit: this token's demand in the layers up to l, and that of the token before
in the others. `Examples` keeps both tokens, and `learn.predictor` puts them together.

A trace that is too long for all examples at once comes as `Windows`: some requests after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.learn import history_kernels
from specmd_jax.learn.threads import over
from specmd_jax.policies import use_history as history
from specmd_jax.trace import select_requests
from specmd_jax.types import Trace

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

EXAMPLE_BYTES = history.FEATURES + 5  # of one expert at one visit: features, wave, topic, demand, next use


class Examples(NamedTuple):
    """[N] decoded tokens of whole requests."""

    demand: npt.NDArray[np.bool_]  # [N, L, E]
    seen: Bytes  # [N, L, F, E] features of each expert after the token
    wave: Bytes  # [N, L * E] demand of the token
    topic: Bytes  # [N, L * E] slow shares of use after the token
    soon: npt.NDArray[np.uint16]  # [N, L, E] visits of the layer until the next use within the request, 0: none
    starts: npt.NDArray[np.bool_]  # [N] first token of its request
    request: Ids  # [N] number of the request in the trace


class Batch(NamedTuple):
    """Tokens as a predictor takes them; "before" is the token before, or nothing at a request's first."""

    seen: Bytes  # [B, L, E, F]
    wave: Bytes  # [B, L * E]
    wave_before: Bytes  # [B, L * E]
    topic: Bytes  # [B, L * E]
    topic_before: Bytes  # [B, L * E]
    label: npt.NDArray[np.float32]  # [B, L, E]


class Windows:
    """The decoded tokens of some requests, as examples of some requests after the other: all of them, in little memory.

    A window has as many requests as `window_bytes` of examples hold, in an order drawn by `seed`, and at least one. A
    single window is drawn once and kept, several are drawn anew whenever they are gone through, unless `keep`.
    """

    def __init__(self, trace: Trace, requests: Ids, window_bytes: int, seed: int = 0, keep: bool = False) -> None:
        """Deals out the requests; those without decoded tokens teach nothing. Raises SpecmdError if none has any."""
        length = trace.lengths - trace.prompt_lengths
        self.requests = requests[length[requests] > 0]
        if not len(self.requests):
            raise SpecmdError(f"{trace.model}: none of {len(requests)} requests has decoded tokens")
        most = window_bytes // (trace.layers * trace.experts * EXAMPLE_BYTES)
        self.parts = [self.requests]
        if length[self.requests].sum() > most:
            drawn = np.random.default_rng([seed, len(self.requests)]).permutation(self.requests)
            cuts, held = [], 0
            for nth, request in enumerate(drawn):
                if held and held + length[request] > most:
                    cuts.append(nth)
                    held = 0
                held += int(length[request])
            self.parts = [np.sort(part) for part in np.split(drawn, cuts)]
        self.tokens = [int(length[part].sum()) for part in self.parts]  # of each window
        self._trace, self._keep = trace, keep or len(self.parts) == 1
        self._kept: dict[int, Examples] = {}

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, window: int) -> Examples:
        found = self._kept.get(window)
        if found is None:
            found = examples(self._trace, self.parts[window])
            if self._keep:
                self._kept[window] = found
        return found

    def steps(self, batch: int) -> int:
        """Gives the number of batches of one time through, all of `batch` tokens."""
        return sum(-(-tokens // batch) for tokens in self.tokens)

    def shuffled(self, batch: int, seed: int, epoch: int) -> Iterator[tuple[Examples, Ids]]:
        """Gives a window and some rows of it for each batch of an epoch; a window's last is filled up from its first.

        Neither the order of the windows nor that of their tokens depends on what is kept.
        """
        order = np.random.default_rng([seed, epoch])
        for window in order.permutation(len(self)):
            rows, found = order.permutation(self.tokens[window]), self[int(window)]
            for start in range(0, len(rows), batch):
                yield found, np.take(rows, np.arange(start, start + batch), mode="wrap")

    def in_turn(self, batch: int) -> Iterator[tuple[Examples, Ids, int]]:
        """Gives every token once: a window, `batch` rows of it, and how many of them are new; the rest repeats them."""
        for window, tokens in enumerate(self.tokens):
            found = self[window]
            for start in range(0, tokens, batch):
                rows = np.arange(start, min(start + batch, tokens))
                yield found, np.resize(rows, batch), len(rows)


def decoded(trace: Trace, requests: Ids) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
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


def examples(trace: Trace, requests: Ids) -> Examples:
    """Gives the decoded tokens of some requests of a trace, prompts left out. Raises SpecmdError if there are none."""
    lengths = (trace.lengths - trace.prompt_lengths)[requests]
    if not lengths.sum():
        raise SpecmdError(f"{trace.model}: none of {len(requests)} requests has decoded tokens")
    demand, mass = decoded(trace, requests)
    demand, mass = np.ascontiguousarray(demand), np.ascontiguousarray(mass)
    starts = np.zeros(len(demand), np.bool_)
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    seen, wave, topic = _draw(demand, mass, starts)
    soon = np.empty(demand.shape, np.uint16)
    history_kernels.until_next(demand, starts, soon)
    flat = (len(demand), -1)
    return Examples(demand, seen, wave.reshape(flat), topic.reshape(flat), soon, starts, np.repeat(requests, lengths))


def _draw(
    demand: npt.NDArray[np.bool_], mass: npt.NDArray[np.float32], starts: npt.NDArray[np.bool_]
) -> tuple[Bytes, Bytes, Bytes]:
    layers, experts = demand.shape[1:]
    seen = np.empty((len(demand), layers, history.FEATURES, experts), np.uint8)
    wave, topic = np.empty(demand.shape, np.uint8), np.empty(demand.shape, np.uint8)
    every = (*history.DECAYS, *history.MASS_DECAYS)
    decays, parts = np.array(every, np.float32), np.array([(1 - d) / d for d in every], np.float32)

    octaves = np.array(
        [0, *(32 * (n.bit_length() - 1) + 32 * n // (1 << n.bit_length() - 1) - 32 for n in range(1, 257))]
    )

    def some(first: int, last: int) -> None:
        share = np.zeros(experts, np.float32)
        history_kernels.draw(
            first, last, demand, mass, starts, decays, parts, history.TOPIC, history.NEVER_USED,
            np.minimum(octaves, history.TOP).astype(np.uint8), np.zeros((len(every), experts), np.float32),
            np.zeros((3, experts), np.int32), np.zeros((2, experts), np.float32), share, share.view(np.int32),
            seen, wave, topic,
        )  # fmt: skip

    over(layers, some)
    return seen, wave, topic


def blank() -> Bytes:
    """Gives the features [F] of an expert before the first visit."""
    return np.asarray(history.features(history.blank(1))[0]).astype(np.uint8)


def batch(found: Examples, labels: npt.NDArray[np.floating], rows: Ids, head: str) -> Batch:
    """Gives some tokens for a head.

    The evictor scores a layer right after its visit, from its own features after it. The prefetcher scores a layer
    before its visit, from its features after the token before.
    """
    before, starts = rows - 1, found.starts[rows]
    wave_before, topic_before, seen = found.wave[before], found.topic[before], found.seen[rows]
    wave_before[starts] = topic_before[starts] = 0
    if head == "prefetcher":
        seen = found.seen[before]
        seen[starts] = blank()[:, None]
    seen = np.ascontiguousarray(np.swapaxes(seen, -1, -2))
    return Batch(seen, found.wave[rows], wave_before, found.topic[rows], topic_before, labels[rows].astype(np.float32))


def codes(found: Examples, head: str) -> npt.NDArray[np.uint16]:
    """Gives the place [N, L, E] of each label in `values`."""
    return found.demand.astype(np.uint16) if head == "prefetcher" else found.soon


def values(head: str, fade: float) -> npt.NDArray[np.float32]:
    """Gives what a head should say, in 0..1, for each of the `codes`.

    For the prefetcher, whether the token uses the expert. For the evictor, ``fade ** (visits until the next use - 1)``
    within the request, 0 if there is none: what a cache gains by an expert is its next use, and the sooner, the surer
    it is still there.
    """
    if head == "prefetcher":
        return np.array([0, 1], np.float32)
    later = np.power(np.float64(fade), np.arange(np.iinfo(np.uint16).max))
    return np.concatenate([[0.0], later]).astype(np.float32)


def labels(found: Examples, head: str, fade: float) -> npt.NDArray[np.float32]:
    """Gives what a head should say [N, L, E] of each expert of each layer at each token, in 0..1 (`values`)."""
    return values(head, fade)[codes(found, head)]
