"""Eviction policies that predict: `learned` by a trained network, `online` by a linear model that learns as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.loops import settled
from specmd_jax.policies import online as linear
from specmd_jax.policies.base import Arrival, Column, Curve, Eviction, Rows, Start, Use
from specmd_jax.policies.columns import TOUCH, full
from specmd_jax.policies.numbers import Share
from specmd_jax.policies.trained import SURE, load, scores
from specmd_jax.policies.use_history import DECAYS, History, blank, used, visited


def _scored(row: jax.Array, use: Use) -> jax.Array:
    assert use.score is not None
    return use.score


# of the layer's latest visit
SCORE = Column(
    full(0, jnp.int32),
    _scored,
    lambda rows, a: jnp.where(a.arrived, SURE, rows),
)
SCORED = Rows({"score": SCORE, "touch": TOUCH}, lambda now, layer, score, touch: (score, touch), scored=True)


def by_score(init: Callable[[Start], Any], observe: Callable[[Any, Use], Any]) -> Eviction:
    """Gives a policy that works out the score of each expert of the visited layer; ties by recency."""
    return Eviction(
        init,
        observe,
        _arrives_for_its_visit,
        lambda state, now, layer: (state.score, state.touch),
        rows=SCORED,
        curve=Curve("given"),
    )


def _arrives_for_its_visit(state: Any, arrival: Arrival) -> Any:
    """Scores what was prefetched above all others, until its layer is visited and gives it one."""
    rows = arrival.rows
    return state._replace(
        score=state.score.at[rows].set(SCORE.arrived(state.score[rows], arrival)),
        touch=state.touch.at[rows].set(TOUCH.arrived(state.touch[rows], arrival)),
    )


class Learned(NamedTuple):
    history: History  # [L, E] tables
    score: Int32[Array, "L E"]  # given at the layer's latest visit
    touch: Int32[Array, "L E"]


def learned(checkpoint: str = "") -> Eviction:
    """A trained predictor scores how soon each expert of the visited layer is used again; ties by recency.

    `checkpoint` is a file that `experiments.train` wrote, "" the one that comes with the package. A prefetched
    expert stays until its layer is visited, whatever its score.
    """
    weights = load("evictor", checkpoint)

    def init(start: Start) -> Learned:
        return Learned(blank(*start.first_use.shape), full(0, jnp.int32)(start), TOUCH.fill(start))

    def observe(state: Learned, use: Use) -> Learned:
        layer = use.now.layer
        history = visited(state.history, layer, use.demand, use.mass)
        return Learned(
            history,
            state.score.at[layer].set(scores(weights, history, layer[None])[0]),
            state.touch.at[layer].set(TOUCH.used(state.touch[layer], use)),
        )

    return by_score(init, observe)


class _Online(NamedTuple):
    weights: linear.Linear
    use: Float32[Array, "L E 7"]  # as `History.use`
    last: Bool[Array, "L E"]  # the layer's latest demand
    sources: Bool[Array, "L 2 E"]  # of the latest values: the layer's demand, and that of the layer before it
    value: Int32[Array, "L E"]  # given at the layer's latest visit, as a share; -1 before the first
    score: Int32[Array, "L E"]  # the same before it was clipped
    touch: Int32[Array, "L E"]


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
            score=full(0, jnp.int32)(start),
            touch=TOUCH.fill(start),
        )

    def observe(state: _Online, use: Use) -> _Online:
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
        return _Online(
            jax.tree.map(lambda table, new: table.at[layer].set(new), state.weights, weights),
            state.use.at[layer].set(row),
            last,
            state.sources.at[layer].set(sources),
            state.value.at[layer].set(linear.clipped(score)),
            state.score.at[layer].set(score),
            state.touch.at[layer].set(TOUCH.used(state.touch[layer], use)),
        )

    return by_score(init, observe)
