"""Routing that looks at the cache before it chooses the experts (CONTRACT.md section 2, step 1).

A running model chooses by the same `choose`, on the logits that it records: so its experts are the simulator's.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from specmd_jax.loops import in_order
from specmd_jax.policies.base import Routing
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.demand import Found
from specmd_jax.replay.state import Cell, State, Visit


class Chosen(NamedTuple):
    """The experts of each token of a pass, as the policies see them."""

    ids: Int32[Array, "t K"]  # by falling logit (ties: lower id); -1: there is no token
    gates: Float32[Array, "t K"]  # the softmax of a token's own logits over its experts; 0 without a token


class Demanded(NamedTuple):
    """What a visit demands."""

    count: Int32[Array, " E"]  # tokens  # pyright: ignore[reportIncompatibleMethodOverride]
    mass: Float32[Array, " E"]
    rank: Int32[Array, " E"]  # by last position in token-major gate order; -1: not demanded


def route(cell: Cell, state: State, visit: Visit, found: Found) -> tuple[State, Visit, Bool[Array, " E"]]:
    """Lets the routing policy change the demand; also which experts are demanded only because of it."""
    setup, routing = cell.setup, cell.policies.routing
    if routing is None:
        return state, visit, jnp.zeros(setup.experts, bool)
    assert visit.logits is not None
    memory, chosen = choose(routing, state.routing, visit.layer, visit.logits, found.level > 0, setup.top_k)
    count, mass, rank = demanded(chosen.ids, chosen.gates, setup.experts)
    by_mass = jnp.argsort(jnp.where(count > 0, -mass, jnp.inf), stable=True)[: visit.by_mass.shape[0]].astype(jnp.int32)
    by_mass = jnp.where(count[by_mass] > 0, by_mass, -1)
    rerouted = (count > 0) & ~visit.demand
    return state._replace(routing=memory), visit._replace(count=count, mass=mass, rank=rank, by_mass=by_mass), rerouted


def choose(
    routing: Routing,
    memory: Any,
    layer: Int32[Array, ""],
    logits: Float32[Array, "t E"],
    resident: Bool[Array, " E"],
    top_k: int,
) -> tuple[Any, Chosen]:
    """Chooses K experts for each token by the policy's own logits; also what it remembers then.

    The choice takes additions, products and comparisons in a fixed order alone: it is the same in every program. So are
    the gates, to the bit, wherever the exponential function is.

    Args:
      memory: what the policy remembers, from its `Routing.init`.
      logits: the router's; a row of NaN is no token.
      resident: which experts of the layer are resident before the visit.
    """
    memory, adjusted = routing.adjust(memory, layer, logits, resident)
    valid = ~jnp.isnan(logits[:, :1])  # [t, 1]
    ids = jnp.sort(jax.lax.top_k(jnp.where(valid, adjusted, NO), top_k)[1], axis=1)  # [t, K]
    # a token's experts weigh by the original logits, so its gate order is that of the original logits too
    own = jnp.take_along_axis(logits, ids, axis=1)
    order = jnp.argsort(-own, axis=1, stable=True)
    ids, own = jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(own, order, axis=1)
    powers = jnp.exp(own - own[:, :1])
    total = functools.reduce(operator.add, [powers[:, k : k + 1] for k in range(top_k)])
    return memory, Chosen(jnp.where(valid, ids, -1), jnp.where(valid, powers / total, 0.0))


def demanded(ids: Int32[Array, "t K"], gates: Float32[Array, "t K"], experts: int) -> Demanded:
    """Gives the demand of a pass whose tokens use these experts, each by falling gate; -1: none."""
    chosen = ids[:, :, None] == jnp.arange(experts, dtype=jnp.int32)[None, None]  # [t, K, E]
    count = jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)
    place = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)  # in token-major gate order
    last = jnp.max(jnp.where(chosen, place[:, :, None], -1), axis=(0, 1))
    before = (last[None] < last[:, None]) & (last >= 0)[None]
    mass = in_order(jnp.sum(jnp.where(chosen, gates[:, :, None], 0.0), axis=1), jnp.zeros(experts, jnp.float32))
    return Demanded(count, mass, jnp.where(count > 0, jnp.sum(before, axis=1, dtype=jnp.int32), -1))
