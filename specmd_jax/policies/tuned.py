"""A combinator of eviction policies: a policy's scores and the features of `weighted`, weighed together.

With the weights that it begins with it is the policy itself, event for event; `soft.search` finds better ones.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from specmd_jax.errors import SpecmdError
from specmd_jax.policies.base import Curve, Eviction, Keys, Now, Scorer
from specmd_jax.policies.by_score import SCORE, by_score, with_scorer
from specmd_jax.policies.choice import Choice, Chosen, choose
from specmd_jax.policies.columns import TOUCH, scored
from specmd_jax.policies.features import Features, whole
from specmd_jax.policies.numbers import Share, Weight
from specmd_jax.policies.trained import SURE
from specmd_jax.policies.weighted import feature_columns, features_sum

MOST = (1 << 20) - 1  # of a score in size: what is beyond counts as this much, and sums stay below 2^30
FIRST = 1 << 30  # above every sum


def tuned(policy: Chosen = "adaptive") -> Choice:
    """Weighs a policy's scores and six features together: ``trust * score + recency * r + ...``, ties by recency.

    Numbers are those of the policy, those of `weighted` (weights 0 unless they are given) and `trust`, the weight of
    the policy's score in 1/4096, from 0 to 1. A prefetched expert stays until its layer is visited, as by the policy.

    Raises:
      SpecmdError: no eviction policy, one that declares no scorer (`base.Rows`), or one whose settings have the names
        of weights.
    """
    inner = choose("eviction", policy)
    scorer_of(inner)
    assert inner.factory is not None  # something always happens on this axis
    made = _on(inner.factory)
    return Choice("eviction", f"tuned({inner.name})", made, inner.texts, inner.numbers)


def scorer_of(policy: Choice) -> Scorer:
    """Gives the scorer that an eviction policy declares. Raises SpecmdError if it has none."""
    rows = policy.build().rows
    if rows is None or rows.scorer is None:
        raise SpecmdError(
            f"eviction {policy.name!r} declares no scorer, expected a policy whose scores the routing alone decides, "
            "such as 'adaptive'"
        )
    return rows.scorer


def scored_alone(policy: Choice) -> Choice:
    """Gives the policy that keeps what an eviction policy's scorer scores highest, whatever else that one weighs.

    Raises SpecmdError if it declares no scorer.
    """
    scorer_of(policy)
    assert policy.factory is not None  # something always happens on this axis
    return Choice("eviction", policy.name, _alone(policy.factory), policy.texts, policy.numbers)


@functools.lru_cache(maxsize=256)
def _alone(inner: Callable[..., Eviction]) -> Callable[..., Eviction]:
    def made(**settings: Any) -> Eviction:
        rows = inner(**settings).rows
        assert rows is not None and rows.scorer is not None
        return by_score(rows.scorer)

    return made


@functools.lru_cache(maxsize=256)
def _on(inner: Callable[..., Eviction]) -> Callable[..., Eviction]:
    """Gives the function that builds the policy; the same one for the same argument, so that it is compiled once."""

    def made(
        trust: Share = 1.0,
        recency: Weight = 0.0,
        frequency: Weight = 0.0,
        fast: Weight = 0.0,
        slow: Weight = 0.0,
        mass: Weight = 0.0,
        distance: Weight = 0.0,
        fast_decay: Share = 0.7,
        slow_decay: Share = 0.95,
        **settings: Any,
    ) -> Eviction:
        rows = inner(**settings).rows
        assert rows is not None and rows.scorer is not None
        weights = Features(*map(whole, (recency, frequency, fast, slow, mass, distance)))
        return _policy(rows.scorer, whole(trust), weights, (fast_decay, slow_decay))

    own, mine = inspect.signature(inner).parameters, inspect.signature(made).parameters
    mine = {name: parameter for name, parameter in mine.items() if parameter.kind is not parameter.VAR_KEYWORD}
    if both := sorted(own.keys() & mine.keys()):
        raise SpecmdError(f"the policy has a setting {both[0]!r}, expected one without the names of weights")
    only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own.values(), *mine.values())]
    hints = get_type_hints(made, include_extras=True)
    # as for any policy: annotations that only a type checker can read declare no range
    with contextlib.suppress(NameError):
        hints |= get_type_hints(inner, include_extras=True) if inspect.isfunction(inner) else {}
    made.__signature__ = inspect.Signature(only)  # pyright: ignore[reportFunctionMemberAccess]
    made.__annotations__ = hints
    return made


def _policy(scorer: Scorer, weight: Int32[Array, ""], weights: Features, decays: tuple[Any, Any]) -> Eviction:
    def keep(now: Now, layer: jax.Array, score: jax.Array, touch: jax.Array, **tables: jax.Array) -> Keys:
        # a weight is in 1/1024 and a score in 1/4096: a quarter of their product is in the units of the other sum
        told = weight * jnp.clip(score, -MOST, MOST) >> 2
        total = told + features_sum(weights, decays, now, layer, tables)
        return (jnp.where(score >= SURE, FIRST, total), touch)

    columns = {"score": SCORE, "touch": TOUCH, **feature_columns(decays)}
    policy = with_scorer(scored(keep, curve=Curve("given_all"), **columns), scorer)  # pyright: ignore[reportArgumentType]
    return policy._replace(rows=None)  # no kernel has been held to it
