"""`by_score`: an eviction policy made of a predictor that scores the experts of each layer that is visited."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from specmd_jax.policies.base import Arrival, Column, Curve, Eviction, Rows, Scorer, Start, Use
from specmd_jax.policies.columns import TOUCH, full
from specmd_jax.policies.trained import SURE


def _scored(row: jax.Array, use: Use) -> jax.Array:
    assert use.score is not None
    return use.score


# of the layer's latest visit
SCORE = Column(
    full(0, jnp.int32),
    _scored,
    lambda rows, a: jnp.where(a.arrived, SURE, rows),
)


class Scored(NamedTuple):
    memory: Any  # the scorer's
    score: Int32[Array, "L E"]  # given at the layer's latest visit
    touch: Int32[Array, "L E"]


def by_score(scorer: Scorer) -> Eviction:
    """Gives a policy that scores each expert of the visited layer; ties by recency."""

    def init(start: Start) -> Scored:
        return Scored(scorer.init(start), SCORE.fill(start), TOUCH.fill(start))

    def observe(state: Scored, use: Use) -> Scored:
        layer = use.now.layer
        memory, score = scorer.observe(state.memory, use)
        return Scored(
            memory,
            state.score.at[layer].set(score),
            state.touch.at[layer].set(TOUCH.used(state.touch[layer], use)),
        )

    def carried(old: Scored, fresh: Scored) -> Scored:
        return fresh._replace(memory=scorer.carried(old.memory, fresh.memory))

    return Eviction(
        init,
        observe,
        _arrives_for_its_visit,
        lambda state, now, layer: (state.score, state.touch),
        rows=Rows({"score": SCORE, "touch": TOUCH}, lambda now, layer, score, touch: (score, touch), scorer),
        curve=Curve("given"),
        carried=carried,
    )


def _arrives_for_its_visit(state: Scored, arrival: Arrival) -> Scored:
    """Scores what was prefetched above all others, until its layer is visited and gives it one."""
    rows = arrival.rows
    return state._replace(
        score=state.score.at[rows].set(SCORE.arrived(state.score[rows], arrival)),
        touch=state.touch.at[rows].set(TOUCH.arrived(state.touch[rows], arrival)),
    )
