"""Routing that looks at the cache: what a policy makes of the logits (CONTRACT.md section 2, step 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.demand import Found
from specmd_jax.replay.state import Cell, State, Visit


def route(cell: Cell, state: State, visit: Visit, found: Found) -> tuple[State, Visit, Bool[Array, " E"]]:
    """Lets the routing policy change the demand; also which experts are demanded only because of it."""
    setup, routing = cell.setup, cell.policies.routing
    if routing is None:
        return state, visit, jnp.zeros(setup.experts, bool)
    assert visit.logits is not None
    memory, adjusted = routing.adjust(state.routing, visit.layer, visit.logits, found.level > 0)
    valid = ~jnp.isnan(visit.logits[:, 0])  # [T]
    chosen = jax.lax.top_k(jnp.where(valid[:, None], adjusted, NO), setup.top_k)[1]  # [T, K]
    gates = jax.nn.softmax(jnp.take_along_axis(visit.logits, chosen, axis=1), axis=1)
    # a token's experts weigh by the original logits, so its gate order is that of the original logits too
    order = jnp.argsort(-gates, axis=1, stable=True)
    chosen, gates = jnp.take_along_axis(chosen, order, axis=1), jnp.take_along_axis(gates, order, axis=1)
    flat = jnp.where(valid[:, None], chosen, -1).reshape(-1)  # [T * K] token-major gate order
    routed = flat[:, None] == jnp.arange(setup.experts)[None]  # [T * K, E]
    count = jnp.sum(routed, axis=0, dtype=jnp.int32)
    mass = jnp.sum(jnp.where(routed, gates.reshape(-1)[:, None], 0.0), axis=0)
    position = jnp.max(jnp.where(routed, jnp.arange(flat.shape[0])[:, None], -1), axis=0)
    rank = jnp.sum((position[:, None] > position[None]) & (position >= 0)[None], axis=1, dtype=jnp.int32)
    by_mass = jnp.argsort(jnp.where(count > 0, -mass, jnp.inf), stable=True)[: visit.by_mass.shape[0]].astype(jnp.int32)
    by_mass = jnp.where(count[by_mass] > 0, by_mass, -1)
    rerouted = (count > 0) & ~visit.demand
    rank = jnp.where(count > 0, rank, -1)
    return state._replace(routing=memory), visit._replace(count=count, mass=mass, rank=rank, by_mass=by_mass), rerouted
