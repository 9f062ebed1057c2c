"""One mechanism for every eviction policy: remove the lowest keep-scores among the unpinned until the budget holds.

The search never looks at the whole `[L, E]` table. `best` holds the lowest unpinned resident of each layer; only the rows that a visit
touches are searched again, so a visit costs rows of E plus the L winners rather than L * E. `Eviction.static_rows` says for which
policies that is sound; the others search every row again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.batching import anywhere
from specmd_jax.policies.eviction import Eviction, Keys, Now


class Cache(NamedTuple):
    """The contents of the cache."""

    level: jax.Array  # [L, E] int32: 0 absent, else precision level 1..Q
    used: jax.Array  # [L] int32 units
    best: jax.Array  # [L] int32: the layer's lowest keep-score among unpinned residents (-1: none)
    evicted_in: jax.Array  # [L, E] int32: pass of the last eviction


def lowest(keys: Keys, candidates: jax.Array) -> jax.Array:
    """Index of the candidate with the lowest keys, compared in order; the *highest* index among equals, -1 without candidates."""
    for key in keys:
        top = jnp.inf if jnp.issubdtype(key.dtype, jnp.floating) else jnp.iinfo(key.dtype).max
        candidates &= key == jnp.min(jnp.where(candidates, key, top))
    return jnp.max(jnp.where(candidates, jnp.arange(candidates.shape[0], dtype=jnp.int32), -1))


def evict(
    policy: Eviction,
    memory: Any,
    cache: Cache,
    *,
    now: Now,
    units: jax.Array,
    budget: jax.Array,
    pinned: Callable[[jax.Array], jax.Array],
    touched: jax.Array,
    pools: jax.Array,
    starts_pass: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Evicts down to the budget.

    Args:
      memory: the policy's state, leaves [L, E].
      units: [Q + 1, L] int32, what an expert takes at each level.
      budget: int32 units, a scalar for one pool or [L] for a pool a layer.
      pinned: layer -> [E] bool, the experts that must stay.
      touched: [W] int32, layers whose residents, pins or scores changed since the last call.
      pools: [L] bool, layers whose pool the visit copied into: only these are brought within the budget.
      starts_pass: whether this is the first visit of a pass.

    Returns:
      The cache and the evictions of each layer, [L] int32.
    """
    layers = jnp.arange(cache.level.shape[0], dtype=jnp.int32)

    def search(level: jax.Array, row: jax.Array) -> jax.Array:
        keys = policy.keep(jax.tree.map(lambda table: table[row], memory), now, row)
        return lowest(keys, (level[row] > 0) & ~pinned(row))

    def search_all(best: jax.Array) -> jax.Array:
        del best
        return jax.vmap(lambda row: search(cache.level, row))(layers)

    def search_touched(best: jax.Array) -> jax.Array:
        return best.at[touched].set(jax.vmap(lambda row: search(cache.level, row))(touched))

    if policy.static_rows:
        best = jax.lax.cond(starts_pass, search_all, search_touched, cache.best)
    else:
        best = search_all(cache.best)

    def candidates(cache: Cache) -> jax.Array:
        over = pools & (cache.used > budget) if budget.ndim else jnp.sum(cache.used) > budget
        return over & (cache.best >= 0)

    def remove(carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        cache, evictions = carry
        entries = jax.tree.map(lambda table: table[layers, cache.best], memory)
        row = lowest(policy.keep(entries, now, layers), candidates(cache))
        leaves = row >= 0  # False only for batch elements that are done: row -1 is then written back unchanged
        expert = cache.best[row]
        freed = jnp.where(leaves, units[cache.level[row, expert], row], 0)
        level = cache.level.at[row, expert].set(jnp.where(leaves, 0, cache.level[row, expert]))
        return (
            Cache(
                level=level,
                used=cache.used.at[row].add(-freed),
                best=cache.best.at[row].set(jnp.where(leaves, search(level, row), expert)),
                evicted_in=cache.evicted_in.at[row, expert].set(
                    jnp.where(leaves, now.pass_id, cache.evicted_in[row, expert])
                ),
            ),
            evictions.at[row].add(leaves.astype(jnp.int32)),
        )

    start = cache._replace(best=best), jnp.zeros_like(layers)
    return jax.lax.while_loop(lambda carry: anywhere(jnp.any(candidates(carry[0]))), remove, start)
