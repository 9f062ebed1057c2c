"""Prefetch: a predictor scores the experts of the next layers, a selection keeps some of them (CONTRACT.md section 4).

To add a predictor: write a function that returns a `Prefetch` and give it a line in `PREFETCH`; a selection likewise in
`SELECTION`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.policies import online as linear
from specmd_jax.policies.adaptive_prefetch import adaptive
from specmd_jax.policies.base import Gate, Prefetch, Selection, Size
from specmd_jax.policies.hashing import hash31
from specmd_jax.policies.numbers import Percentile, Positive, PositiveShare, Seed, Share
from specmd_jax.policies.trained import load, odds, scores
from specmd_jax.policies.use_history import DECAYS, History, blank, used, visited

NO = -jnp.inf
BINS = 160  # score histogram: eighths of an octave from 2^-16 to 2^4


def _targets(gate: Gate, size: Size) -> Int32[Array, " H"]:
    return jnp.mod(gate.now.layer + 1 + jnp.arange(size.horizon, dtype=jnp.int32), size.layers)


def _positive(scores: Float32[Array, " *n"]) -> Float32[Array, " *n"]:
    return jnp.where(scores > 0, scores, NO)


def _stateless(want: Callable[[Gate, Size], Float32[Array, "H E"]], **declared: Any) -> Prefetch:
    return Prefetch(lambda size: (), lambda state, gate: (), lambda state, gate, size: want(gate, size), **declared)


def previous() -> Prefetch:
    """The experts that the previous pass used at the target layer, by their gate mass then."""
    return Prefetch(
        lambda size: jnp.zeros((size.layers, size.experts), jnp.float32),
        lambda last, gate: last.at[gate.now.layer].set(jnp.where(gate.demand, gate.mass, 0.0)),
        lambda last, gate, size: _positive(last[_targets(gate, size)]),
    )


def popular() -> Prefetch:
    """The experts that most visits of the target layer have used so far."""
    return Prefetch(
        lambda size: jnp.zeros((size.layers, size.experts), jnp.int32),
        lambda count, gate: count.at[gate.now.layer].add(gate.demand.astype(jnp.int32)),
        lambda count, gate, size: _positive(count[_targets(gate, size)].astype(jnp.float32)),
    )


class _Pairs(NamedTuple):
    last: Bool[Array, "L E"]  # latest demand of each layer
    pair: Int32[Array, "L H E E"]  # (target layer, distance, source expert, target expert) seen together
    source: Int32[Array, "L H E"]  # times the source expert was there to be followed


def transition() -> Prefetch:
    """Co-activation learned online: P(expert at layer l+h | experts used at layer l), from passes so far."""

    def init(size: Size) -> _Pairs:
        layers, experts, horizon = size
        return _Pairs(
            jnp.zeros((layers, experts), bool),
            jnp.zeros((layers, horizon, experts, experts), jnp.int32),
            jnp.zeros((layers, horizon, experts), jnp.int32),
        )

    def observe(state: _Pairs, gate: Gate) -> _Pairs:
        layers, horizon = state.pair.shape[:2]
        layer = gate.now.layer
        sources = state.last[jnp.mod(layer - 1 - jnp.arange(horizon), layers)]  # [H, E]
        return _Pairs(
            state.last.at[layer].set(gate.demand),
            state.pair.at[layer].add((sources[:, :, None] & gate.demand[None, None]).astype(jnp.int32)),
            state.source.at[layer].add(sources.astype(jnp.int32)),
        )

    def want(state: _Pairs, gate: Gate, size: Size) -> Float32[Array, "H E"]:
        targets, distance = _targets(gate, size), jnp.arange(size.horizon)
        pair, source = state.pair[targets, distance], state.source[targets, distance]  # [H, E, E], [H, E]
        together = jnp.sum(jnp.where(gate.demand[None, :, None], pair, 0), axis=1)
        seen = jnp.sum(jnp.where(gate.demand[None], source, 0), axis=1, keepdims=True)
        return _positive(together.astype(jnp.float32) / jnp.maximum(seen, 1).astype(jnp.float32))

    return Prefetch(init, observe, want)


def learned(checkpoint: str = "") -> Prefetch:
    """Wants every expert by the odds that a trained predictor gives it in the next layers; it sees ids and gates alone.

    `checkpoint` is a file that `experiments.train` wrote, "" the one that comes with the package. It is
    trained one layer ahead; further ahead it sees what it would see there, less the layers in between.
    """
    weights = load("prefetcher", checkpoint)

    def observe(state: History, gate: Gate) -> History:
        return visited(state, gate.now.layer, gate.demand, gate.mass)

    return Prefetch(
        lambda size: blank(size.layers, size.experts),
        observe,
        lambda state, gate, size: odds(scores(weights, state, _targets(gate, size))),
    )


class _Online(NamedTuple):
    weights: linear.Linear
    use: Float32[Array, "L E 7"]  # as `History.use`
    last: jax.Array  # [L, E] bool: the layer's latest demand


def online(rate: Share = 0.0625) -> Prefetch:
    """Wants every expert by a linear predictor of each layer's next demand, learned on the way (`policies.online`).

    Its sources are the layer's latest demand and those of the three layers before it; for the next layer these are of
    this pass. Each step corrects a share `rate` (rounded to 1/1024) of the error by each source.
    """
    rate_units = linear.whole(rate)

    def values(
        state: _Online, layer: Int32[Array, ""]
    ) -> tuple[linear.Linear, Int32[Array, "E 8"], Bool[Array, "4 E"], Int32[Array, " E"]]:
        row = jax.tree.map(lambda table: table[layer], state.weights)
        seen, sources = (
            linear.inputs(state.use[layer]),
            state.last[jnp.mod(layer - jnp.arange(4, dtype=jnp.int32), len(state.last))],
        )
        return row, seen, sources, linear.value(row, seen, sources)

    def observe(state: _Online, gate: Gate) -> _Online:
        layer = gate.now.layer
        row, seen, sources, found = values(state, layer)
        error = jnp.where(gate.demand, linear.ONE, 0) - linear.clipped(found)
        row = linear.corrected(row, seen, sources, error, rate_units)
        return _Online(
            jax.tree.map(lambda table, new: table.at[layer].set(new), state.weights, row),
            state.use.at[layer].set(used(state.use[layer], gate.demand)),
            state.last.at[layer].set(gate.demand),
        )

    def want(state: _Online, gate: Gate, size: Size) -> Float32[Array, "H E"]:
        found = jax.vmap(lambda layer: values(state, layer)[3])(_targets(gate, size))
        return jnp.clip(found, 1, 4 * linear.ONE).astype(jnp.float32) / linear.ONE

    return Prefetch(
        lambda size: _Online(
            linear.blank(size.layers, size.experts, 4),
            jnp.zeros((size.layers, size.experts, len(DECAYS)), jnp.float32),
            jnp.zeros((size.layers, size.experts), bool),
        ),
        observe,
        want,
    )


def gate_ahead() -> Prefetch:
    """The next layer's gate on this layer's activations (the paper's predictor); needs the trace's `ahead` scores."""

    def want(gate: Gate, size: Size) -> Float32[Array, "H E"]:
        assert gate.ahead is not None
        last = gate.now.layer == size.layers - 1
        return jnp.where(last, NO, _positive(gate.ahead))[None, :]

    return _stateless(want, needs="ahead", most_horizon=1)


def perfect() -> Prefetch:
    """Oracle: exactly what the next H layers will use."""

    def want(gate: Gate, size: Size) -> Float32[Array, "H E"]:
        assert gate.future is not None
        return _positive(gate.future)

    return _stateless(want, needs="future", oracle=True)


def noisy(precision: PositiveShare = 0.8, recall: PositiveShare = 0.8, seed: Seed = 0) -> Prefetch:
    """Oracle made worse: finds needed experts with probability `recall`, adds wrong ones down to `precision`.

    What it says of a visit is drawn once for that visit: from one layer ahead it says what it said from two.
    """

    def want(gate: Gate, size: Size) -> Float32[Array, "H E"]:
        assert gate.future is not None
        needed = gate.future > 0
        n = jnp.sum(needed, axis=1, keepdims=True).astype(jnp.float32)
        wrong = recall * n * (1 - precision) / (precision * jnp.maximum(size.experts - n, 1))
        expert = jnp.arange(size.experts, dtype=jnp.int32)[None, :]
        target = gate.now.visit + jnp.arange(size.horizon, dtype=jnp.int32)[:, None]
        coin = hash31(jnp.asarray(seed), target, expert).astype(jnp.float32) / 2.0**31
        order = (hash31(jnp.asarray(seed) + 1, target, expert) >> 8).astype(jnp.float32) + 1.0
        return jnp.where(coin < jnp.where(needed, recall, wrong), order, NO)

    return _stateless(want, needs="future", oracle=True)


def shuffled() -> Prefetch:
    """Control: the oracle's predictions for a wrong token; as many copies as `perfect`, none of them informed."""
    return perfect()._replace(needs="shuffled")


PREFETCH: dict[str, Callable[..., Prefetch] | None] = {
    "none": None,
    "previous": previous,
    "popular": popular,
    "transition": transition,
    "learned": learned,
    "online": online,
    "adaptive": adaptive,
    "gate_ahead": gate_ahead,
    "perfect": perfect,
    "noisy": noisy,
    "shuffled": shuffled,
}


def topk(count: Positive = 1.0) -> Selection:
    """The `count` best of each target layer (top-k x overfetch); ties to the lower id."""

    def select(
        state: Any, want: Float32[Array, "H E"], rows: Int32[Array, " H"], active: Bool[Array, ""]
    ) -> tuple[Any, Bool[Array, "H E"]]:
        ids = jnp.arange(want.shape[1])
        ahead = (want[:, None, :] > want[:, :, None]) | (
            (want[:, None, :] == want[:, :, None]) & (ids[None, :] < ids[:, None])[None]
        )
        better = jnp.sum(ahead, axis=2).astype(jnp.float32)
        return state, (better < jnp.floor(count + 0.5)) & (want > NO) & active

    return Selection(lambda size: (), select)


def percentile(percentile: Percentile = 80.0) -> Selection:
    """Every expert that scores above a percentile of its layer's scores so far: the count adapts to the layer.

    The paper gives the percentile (80) but not its distribution; within one token it would be a constant count, so this
    is a running histogram of each layer, in bins of an eighth of an octave (integers: no drift, and the reference
    agrees to the bit).
    """

    def select(
        histogram: Int32[Array, "L bins"],
        want: Float32[Array, "H E"],
        rows: Int32[Array, " H"],
        active: Bool[Array, ""],
    ) -> tuple[Int32[Array, "L bins"], Bool[Array, "H E"]]:
        bits = jax.lax.bitcast_convert_type(want.astype(jnp.float32), jnp.int32)
        scored = want > 0
        bins = jnp.clip((bits >> 20) - ((127 - 16) << 3), 0, BINS - 1)
        seen = jnp.sum(
            (bins[:, :, None] == jnp.arange(BINS)[None, None]) & scored[:, :, None] & active, axis=1, dtype=jnp.int32
        )
        histogram = histogram.at[rows].add(seen)
        below = jnp.cumsum(histogram[rows], axis=1)  # [H, BINS]
        enough = below.astype(jnp.float32) * 100.0 >= percentile * below[:, -1:].astype(jnp.float32)
        threshold = jnp.argmax(enough, axis=1, keepdims=True)
        return histogram, scored & (bins > threshold) & active

    return Selection(lambda size: jnp.zeros((size.layers, BINS), jnp.int32), select)


SELECTION: dict[str, Callable[..., Selection]] = {"topk": topk, "percentile": percentile}
