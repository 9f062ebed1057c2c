"""The `adaptive` prefetch policy: what each layer uses next, by `policies.adaptive`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from specmd_jax.policies import adaptive as predictor
from specmd_jax.policies.adaptive import SURE, Recent, Weights
from specmd_jax.policies.base import Gate, Pairs, Prefetch, Size
from specmd_jax.policies.numbers import Share
from specmd_jax.policies.online import whole
from specmd_jax.policies.trained import odds
from specmd_jax.policies.use_history import History, blank, visited


class Adaptive(NamedTuple):
    weights: Weights  # carried over a reset
    history: History  # [L, E] tables
    recent: Recent


def adaptive(rate: Share = 0.4) -> Prefetch:
    """Wants every expert by the odds that a predictor gives it which adapts to the model (`policies.adaptive`).

    It learns from each visit whether it would have said what the layer uses. Its sources are the visits before, and
    the layer's own last ones; asked further ahead, it does without the layers in between. `rate` is that of the pair
    weights, rounded to 1/1024. What it has learned outlasts a reset.
    """
    rate_units = whole(rate)

    def observe(state: Adaptive, gate: Gate) -> Adaptive:
        layer = gate.now.layer
        given = predictor.seen(state.history, state.recent, layer)
        (known,) = predictor.read(state.weights, layer, given)
        found = predictor.scored(known, given)
        error = jnp.where(gate.demand, SURE, 0) - predictor.chance(found.logit)
        return Adaptive(
            predictor.corrected(state.weights, known, layer, given, found.pairs, error, rate_units),
            visited(state.history, layer, gate.demand, gate.mass),
            predictor.after(state.recent, layer, gate.demand, gate.mass),
        )

    def want(state: Adaptive, gate: Gate, size: Size) -> Float32[Array, "H E"]:
        ahead = jnp.arange(size.horizon, dtype=jnp.int32)

        def layer(skip: jax.Array) -> jax.Array:
            target = jnp.mod(gate.now.layer + 1 + skip, size.layers)
            given = predictor.seen(state.history, state.recent, target, skip)
            (known,) = predictor.read(state.weights, target, given)
            return predictor.scored(known, given).logit

        return odds(jax.vmap(layer)(ahead))

    return Prefetch(
        lambda size: Adaptive(
            predictor.begin(size.layers, size.experts, -2),
            blank(size.layers, size.experts),
            predictor.nobody(size.layers, size.experts),
        ),
        observe,
        want,
        pairs=Pairs(rate_units),
        carried=lambda old, fresh: fresh._replace(weights=old.weights),
    )
