"""The `adaptive` eviction policy: how soon each expert is used again, by `policies.adaptive`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from specmd_jax.policies import adaptive as predictor
from specmd_jax.policies.adaptive import SURE, Recent, Said, Seen, Weights
from specmd_jax.policies.base import Eviction, Pairs, Scorer, Start, Use
from specmd_jax.policies.by_score import by_score
from specmd_jax.policies.columns import full
from specmd_jax.policies.numbers import Share
from specmd_jax.policies.online import RATE, whole
from specmd_jax.policies.trained import load, scores
from specmd_jax.policies.use_history import History, blank, visited

NOBODY = "none"
"""In place of a checkpoint: no trained predictor."""


class Adaptive(NamedTuple):
    weights: Weights  # carried over a reset
    history: History  # [L, E] tables
    recent: Recent
    said: Said  # [L, ...] what the latest scores of each layer were worked out from, beside its history
    pairs: Int32[Array, "L E"]  # their part by pairs
    chance: Int32[Array, "L E"]  # their probability, SURE is 1; -1 before the first


def adaptive(fade: Share = 0.95, rate: Share = 0.2, checkpoint: str = NOBODY) -> Eviction:
    """A predictor of how soon each expert of the visited layer is used again, that adapts to the model; then recency.

    It learns ``fade ** (visits until the next use - 1)`` from one visit of a layer to the next: 1 for what is used,
    `fade` times its new value for the rest (temporal differences). `rate` is that of the pair weights. Both numbers are
    rounded to 1/1024. What it has learned outlasts a reset. A prefetched expert stays until its layer is visited.

    `checkpoint` names the trained predictor of `learned` that it begins with and corrects ("": the package's own), for
    which smaller rates do, such as 0.05; "none": it begins with nothing.
    """
    fade_units, rate_units = whole(fade), whole(rate)
    weights = None if checkpoint == NOBODY else load("evictor", checkpoint)
    trained = None if weights is None else lambda memory, layer: scores(weights, memory, layer[None])[0]

    def init(start: Start) -> Adaptive:
        layers, experts = shape = start.first_use.shape
        memory, recent = blank(*shape), predictor.nobody(*shape)
        nothing = jax.vmap(lambda layer: predictor.said(memory, recent, layer))(jnp.arange(layers, dtype=jnp.int32))
        return Adaptive(
            weights=predictor.begin(layers, experts, -1 if weights is None else 0),
            history=memory,
            recent=recent,
            said=nothing,
            pairs=full(0, jnp.int32)(start),
            chance=full(-1, jnp.int32)(start),
        )

    def observe(state: Adaptive, use: Use) -> tuple[Adaptive, Int32[Array, " E"]]:
        layer = use.now.layer
        told = state.chance[layer]
        before = Seen(
            predictor.inputs(state.history, layer), jax.tree.map(lambda table: table[layer], state.said)
        ).forgotten(told[0] < 0, state.weights)
        memory = visited(state.history, layer, use.demand, use.mass)
        recent = predictor.after(state.recent, layer, use.demand, use.mass)
        given = Seen(predictor.inputs(memory, layer), predictor.said(memory, recent, layer, trained=trained))
        now, then = predictor.read(state.weights, layer, given, before)
        found = predictor.scored(now, given)
        chance = predictor.chance(found.logit)
        target = jnp.where(use.demand, SURE, fade_units * chance // RATE)
        error = jnp.where(told < 0, 0, target - told)
        learned = predictor.corrected(state.weights, then, layer, before, state.pairs[layer], error, rate_units)
        after = Adaptive(
            learned,
            memory,
            recent,
            jax.tree.map(lambda table, new: table.at[layer].set(new), state.said, given.said),
            state.pairs.at[layer].set(found.pairs),
            state.chance.at[layer].set(chance),
        )
        return after, found.logit

    pairs = Pairs(rate_units, fade_units) if trained is None else None
    return by_score(Scorer(init, observe, lambda old, fresh: fresh._replace(weights=old.weights), pairs))
