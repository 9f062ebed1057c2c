"""`by_score`: an eviction policy made of a predictor that scores the experts of each layer that is visited.

`with_scorer` makes one that keeps other columns beside the scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.policies.base import Column, Curve, Eviction, Scorer, Use
from specmd_jax.policies.columns import TOUCH, full, scored
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
    tables: dict[str, jax.Array]  # [L, E] of each column


def by_score(scorer: Scorer) -> Eviction:
    """Gives a policy that scores each expert of the visited layer; ties by recency."""
    plain = scored(lambda now, layer, score, touch: (score, touch), curve=Curve("given"), score=SCORE, touch=TOUCH)
    return with_scorer(plain, scorer)


def with_scorer(policy: Eviction, scorer: Scorer) -> Eviction:
    """Gives a policy of columns (`columns.scored`) whose `Use.score` the scorer works out."""
    assert policy.rows is not None  # it has columns

    def observe(state: Scored, use: Use) -> Scored:
        memory, score = scorer.observe(state.memory, use)
        return Scored(memory, policy.observe(state.tables, use._replace(score=score)))

    return policy._replace(
        init=lambda start: Scored(scorer.init(start), policy.init(start)),
        observe=observe,
        arrive=lambda state, arrival: state._replace(tables=policy.arrive(state.tables, arrival)),
        keep=lambda state, now, layer: policy.keep(state.tables, now, layer),
        rows=policy.rows._replace(scorer=scorer),
        carried=lambda old, fresh: fresh._replace(memory=scorer.carried(old.memory, fresh.memory)),
    )
