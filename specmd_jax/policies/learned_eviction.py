"""Eviction policies that predict: `learned` by a trained network, `online` by a linear model that learns as it runs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.loops import settled
from specmd_jax.policies import online as linear
from specmd_jax.policies.base import Eviction, Scorer, Start, Use
from specmd_jax.policies.by_score import by_score
from specmd_jax.policies.columns import full
from specmd_jax.policies.numbers import Share
from specmd_jax.policies.trained import load, scores
from specmd_jax.policies.use_history import DECAYS, History, blank, used, visited


def learned(checkpoint: str = "") -> Eviction:
    """A trained predictor scores how soon each expert of the visited layer is used again; ties by recency.

    `checkpoint` is a file that `experiments.train` wrote, "" the one that comes with the package. A prefetched
    expert stays until its layer is visited, whatever its score.
    """
    weights = load("evictor", checkpoint)

    def observe(memory: History, use: Use) -> tuple[History, Int32[Array, " E"]]:
        layer = use.now.layer
        memory = visited(memory, layer, use.demand, use.mass)
        return memory, scores(weights, memory, layer[None])[0]

    return by_score(Scorer(lambda start: blank(*start.first_use.shape), observe))


class _Online(NamedTuple):
    weights: linear.Linear
    use: Float32[Array, "L E 7"]  # as `History.use`
    last: Bool[Array, "L E"]  # the layer's latest demand
    sources: Bool[Array, "L 2 E"]  # of the latest values: the layer's demand, and that of the layer before it
    value: Int32[Array, "L E"]  # given at the layer's latest visit, as a share; -1 before the first


def online(fade: Share = 0.85, rate: Share = 0.0625) -> Eviction:
    """A linear predictor of how soon each expert of the visited layer is used again, learned on the way; then recency.

    It learns ``fade ** (visits until the next use - 1)`` from one visit of a layer to the next: 1 for what is used,
    `fade` times its new value for the rest (temporal differences, `policies.online`). Each step corrects a share `rate`
    of the error by either source. Both numbers are rounded to 1/1024. A prefetched expert stays until its layer is
    visited.
    """
    fade_units, rate_units = linear.whole(fade), linear.whole(rate)

    def init(start: Start) -> _Online:
        shape = start.first_use.shape
        nobody = jnp.zeros(shape, bool)
        return _Online(
            weights=linear.blank(shape[0], shape[1], 2),
            use=jnp.zeros((*shape, len(DECAYS)), jnp.float32),
            last=nobody,
            sources=jnp.stack([nobody, nobody], axis=1),
            value=full(-1, jnp.int32)(start),
        )

    def observe(state: _Online, use: Use) -> tuple[_Online, Int32[Array, " E"]]:
        layer = use.now.layer
        # the weights are the largest table of all: read after a write, they would be copied at every visit
        tables = state.weights, state.use, state.sources, state.value
        rows = settled(jax.tree.map(lambda table: table[layer], tables), use.now.visit >= 0)
        weights, before_use, before_sources, guess = rows
        before = linear.inputs(before_use)
        row = used(before_use, use.demand)
        last = state.last.at[layer].set(use.demand)
        sources = jnp.stack([use.demand, last[jnp.mod(layer - 1, use.now.layers)]])
        now = linear.inputs(row)
        later = fade_units * linear.clipped(linear.value(weights, now, sources)) // linear.RATE
        error = jnp.where(guess < 0, 0, jnp.where(use.demand, linear.ONE, later) - guess)
        weights = linear.corrected(weights, before, before_sources, error, rate_units)
        score = linear.value(weights, now, sources)
        memory = _Online(
            jax.tree.map(lambda table, new: table.at[layer].set(new), state.weights, weights),
            state.use.at[layer].set(row),
            last,
            state.sources.at[layer].set(sources),
            state.value.at[layer].set(linear.clipped(score)),
        )
        return memory, score

    return by_score(Scorer(init, observe))
