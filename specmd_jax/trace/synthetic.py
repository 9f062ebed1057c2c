"""Routing made up from five knobs, for tests, demonstrations and questions that no recorded trace answers.

The router's logits of token t at layer l are a sum of two parts, and the experts are their top k:

* popularity ``-skew * log(rank)``, the ranks being a random order of the experts for each (topic, layer): draws follow
  a Zipf-like law. A request has one topic at a time and changes it with probability ``drift`` per token.
* noise of unit variance (scaled like Gumbel noise) that is a separable autoregression: over layers with
  ``layer_correlation``, along a fixed random matching of each layer's experts to the next one's, then over tokens with
  ``stickiness``. A high logit tends to stay high at the next token, and to be high for the matched expert a layer on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.select import first_tokens, select_requests
from specmd_jax.types import Trace

NOISE_SCALE = np.float32(np.pi / np.sqrt(6))
"""Standard deviation of Gumbel noise: the argmax of ``log p`` + Gumbel noise draws from p."""

_BLOCK = 1 << 22  # logits made at once


def synthesize(
    *,
    layers: int,
    experts: int,
    top_k: int,
    tokens: int,
    requests: int = 1,
    prompt_tokens: int = 0,
    skew: float = 0.9,
    stickiness: float = 0.2,
    layer_correlation: float = 0.3,
    drift: float = 0.002,
    topics: int = 8,
    seed: int = 0,
    expert_bytes: int | Sequence[int] = 1 << 20,
    with_logits: bool = False,
    with_ahead: bool = False,
    ahead_noise: float = 0.5,
) -> Trace:
    """Gives a synthetic trace of ``requests`` requests with ``tokens`` tokens each.

    The same arguments give the same trace, and carrying logits or ahead scores does not change its routing. The
    defaults lie in the middle of what `specmd_jax.trace.locality` has for published models.

    Args:
      layers, experts, top_k: L, E and K.
      tokens: tokens of each request; the first ``prompt_tokens`` of them are its prompt.
      skew: exponent of the popularity, >= 0 (0: all experts alike).
      stickiness: correlation of the noise from a token to the next, 0 to 1.
      layer_correlation: correlation of the noise of matched experts of neighbouring layers, 0 to 1.
      drift: chance that a token changes its request's topic, 0 to 1.
      topics: number of topics; each has its own popular experts.
      seed: of `numpy.random.PCG64`.
      expert_bytes: bytes of an expert, one number or one per layer.
      with_logits: carry the logits [N, L, E] float32; their top k (ties: the lower id) are the experts in order.
      with_ahead: carry what a gate-ahead predictor would see [N, L, E] float32: the softmax of the next layer's logits
        plus noise. The last layer has no next one in its pass: zeros.
      ahead_noise: standard deviation of that noise, in units of the noise of the logits (0: a perfect predictor).

    Returns:
      A valid `Trace`; gates are the softmax over the chosen logits. ``meta`` records the knobs.

    Raises:
      SpecmdError: a number out of its range.
    """
    knobs: dict[str, Any] = {
        "skew": skew,
        "stickiness": stickiness,
        "layer_correlation": layer_correlation,
        "drift": drift,
        "topics": topics,
        "seed": seed,
        "ahead_noise": ahead_noise,
    }
    sizes = {"layers": layers, "experts": experts, "top_k": top_k, "tokens": tokens, "requests": requests}
    for name, value in (*sizes.items(), ("topics", topics)):
        if value < 1:
            raise SpecmdError(f"{name} is {value}, expected at least 1")
    if top_k > experts:
        raise SpecmdError(f"top_k is {top_k} with {experts} experts, expected no more")
    if not 0 <= prompt_tokens <= tokens:
        raise SpecmdError(f"prompt_tokens is {prompt_tokens}, expected 0 to the {tokens} tokens of a request")
    if seed < 0:
        raise SpecmdError(f"seed is {seed}, expected at least 0")
    for name in ("stickiness", "layer_correlation", "drift"):
        if not 0 <= knobs[name] <= 1:
            raise SpecmdError(f"{name} is {knobs[name]}, expected 0 to 1")
    for name in ("skew", "ahead_noise"):
        if not 0 <= knobs[name] < np.inf:
            raise SpecmdError(f"{name} is {knobs[name]}, expected a finite number >= 0")
    bytes_of_layer = np.array([expert_bytes] * layers if np.ndim(expert_bytes) == 0 else expert_bytes)
    if bytes_of_layer.shape != (layers,) or bytes_of_layer.dtype.kind not in "iu" or (bytes_of_layer < 1).any():
        raise SpecmdError(f"expert_bytes is {expert_bytes!r}, expected an integer >= 1, or {layers} of them")

    world, process, fog = (
        np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(3)
    )
    ranks = world.permuted(np.broadcast_to(np.arange(experts), (topics, layers, experts)), axis=-1)
    popularity = (-skew * np.log1p(ranks)).astype(np.float32)  # [topics, L, E]
    matching = world.permuted(np.broadcast_to(np.arange(experts), (layers, experts)), axis=-1)
    topic = _topics(world, tokens, requests, topics, drift)  # [T, R]

    id_type = np.uint8 if experts <= 256 else np.int16 if experts <= 1 << 15 else np.int32
    ids = np.empty((requests, tokens, layers, top_k), id_type)
    gates = np.empty(ids.shape, np.float32)
    full = (requests, tokens, layers, experts)
    kept = np.empty(full, np.float32) if with_logits else None
    ahead = np.zeros(full, np.float32) if with_ahead else None
    state: npt.NDArray[np.float32] | None = None  # [R, L, E] noise of the last token
    block = max(1, _BLOCK // (requests * layers * experts))
    for start in range(0, tokens, block):
        stop = min(tokens, start + block)
        noise = process.standard_normal((stop - start, requests, layers, experts), np.float32)
        _correlate_layers(noise, matching, layer_correlation)
        state = _correlate_tokens(noise, stickiness, state)
        logits = popularity[topic[start:stop]] + NOISE_SCALE * noise  # [block, R, L, E]
        chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
        ids[:, start:stop] = chosen.swapaxes(0, 1)
        gates[:, start:stop] = _softmax(np.take_along_axis(logits, chosen, -1)).swapaxes(0, 1)
        if kept is not None:
            kept[:, start:stop] = logits.swapaxes(0, 1)
        if ahead is not None:
            blur = fog.standard_normal(logits[:, :, 1:].shape, np.float32)
            seen = logits[:, :, 1:] + np.float32(ahead_noise) * NOISE_SCALE * blur
            ahead[:, start:stop, :-1] = _softmax(seen).swapaxes(0, 1)

    def rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.reshape(requests * tokens, layers, -1)

    return Trace(
        expert_ids=rows(ids),
        lengths=np.full(requests, tokens, np.int32),
        prompt_lengths=np.full(requests, prompt_tokens, np.int32),
        experts=experts,
        expert_bytes=bytes_of_layer.astype(np.int64),
        gates=rows(gates),
        logits=None if kept is None else rows(kept),
        ahead=None if ahead is None else rows(ahead),
        meta={
            "model": "synthetic",
            "source": "specmd_jax.trace.synthesize",
            "licence": "generated",
            "capture": "made up, not recorded",
            "knobs": knobs,
            "requests": [{"first_topic": int(first)} for first in topic[0]],
        },
    )


def relabelled(trace: Trace, tokens: int, seed: int = 0) -> Iterator[Trace]:
    """Yields copies of `trace` until there are `tokens` (the last is cut), for traces too long to be held.

    In each copy requests come in another order and the experts of every layer swap names, so that no copy can live on
    what the one before left in a cache. Logits and ahead scores are left out. Raises SpecmdError for a bad number.
    """
    if tokens < 1 or seed < 0:
        raise SpecmdError(f"tokens is {tokens} and seed {seed}, expected at least 1 and 0")
    bare = dataclasses.replace(trace, logits=None, ahead=None)
    rng = np.random.Generator(np.random.PCG64(seed))
    names = np.broadcast_to(np.arange(trace.experts), (trace.layers, trace.experts))
    while tokens > 0:
        copy = first_tokens(select_requests(bare, rng.permutation(trace.requests)), tokens)
        swapped = rng.permuted(names, axis=-1)
        ids = swapped[np.arange(trace.layers)[:, None], copy.expert_ids]
        ids = np.where(copy.expert_ids < 0, -1, ids).astype(trace.expert_ids.dtype)
        yield dataclasses.replace(copy, expert_ids=ids)
        tokens -= copy.tokens


def _topics(rng: np.random.Generator, tokens: int, requests: int, topics: int, drift: float) -> npt.NDArray[np.int64]:
    """Gives the topic of each token [T, R]: any at first, then another one with probability ``drift`` a token."""
    steps = rng.integers(0, topics, (tokens, requests))
    if topics > 1:
        changes = rng.random((tokens - 1, requests)) < drift
        steps[1:] = np.where(changes, rng.integers(1, topics, changes.shape), 0)
    return np.cumsum(steps, axis=0) % topics


def _correlate_layers(noise: npt.NDArray[np.float32], matching: npt.NDArray[np.int64], correlation: float) -> None:
    """Works in place on [T, R, L, E]; keeps unit variance."""
    fresh = np.float32(np.sqrt(1 - correlation**2))
    for layer in range(1, noise.shape[2]):
        carried = noise[:, :, layer - 1][..., matching[layer]]
        noise[:, :, layer] = np.float32(correlation) * carried + fresh * noise[:, :, layer]


def _correlate_tokens(
    noise: npt.NDArray[np.float32], stickiness: float, state: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """Works in place on [T, R, L, E], going on from the token before; returns the last token's."""
    fresh = np.float32(np.sqrt(1 - stickiness**2))
    for token in noise if stickiness else ():
        if state is not None:
            token *= fresh
            token += np.float32(stickiness) * state
        state = token
    return noise[-1].copy()


def _softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
