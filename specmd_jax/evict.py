"""One mechanism for every eviction policy: remove the lowest keep-scores among the unpinned until the budget holds.

The search never looks at the whole `[L, E]` table. `best` holds the lowest unpinned resident of each layer; only the
rows that a visit touches are searched again, so that a victim costs a row of E and the L winners rather than L * E.
`Eviction.static_rows` says for which policies that is sound; the others search every row again.

Under `vmap` a write at a batched index becomes a loop over the batch, so the loop below carries a few numbers a layer
and writes nothing else: the victims of a layer are the candidates up to its last victim, and leave in one pass over the
table at the end.
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

    level: jax.Array  # [L, E] int8: 0 absent, else precision level 1..Q
    used: jax.Array  # [L] int32 units
    best: jax.Array  # [L] int32: the layer's lowest keep-score among unpinned residents (-1: none)
    evicted: jax.Array  # [L, E] bool: was evicted in this pass


class _Removal(NamedTuple):
    used: jax.Array  # [L]
    best: jax.Array  # [L]
    last: jax.Array  # [L] int32: the layer's last victim (-1: none)
    evictions: jax.Array  # [L]


def lowest(keys: Keys, candidates: jax.Array) -> jax.Array:
    """Index of the candidate with the lowest keys, compared in order; the *highest* among equals, -1 without any."""
    for key in keys:
        top = jnp.inf if jnp.issubdtype(key.dtype, jnp.floating) else jnp.iinfo(key.dtype).max
        candidates &= key == jnp.min(jnp.where(candidates, key, top))
    return jnp.max(jnp.where(candidates, jnp.arange(candidates.shape[0], dtype=jnp.int32), -1))


def leaves_by(keys: Keys, ids: jax.Array, last_keys: Keys, last: jax.Array) -> jax.Array:
    """Whether experts leave no later than the expert `last`: lower keys, or equal keys and an id that is not lower."""
    by = ids >= last
    for key, last_key in zip(reversed(keys), reversed(last_keys), strict=True):
        by = (key < last_key) | ((key == last_key) & by)
    return by


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
    ids = jnp.arange(cache.level.shape[1], dtype=jnp.int32)

    def keys_of(row: jax.Array) -> Keys:
        return policy.keep(jax.tree.map(lambda table: table[row], memory), now, row)

    def candidates_of(row: jax.Array) -> jax.Array:
        return (cache.level[row] > 0) & ~pinned(row)

    def search(row: jax.Array) -> jax.Array:
        return lowest(keys_of(row), candidates_of(row))

    def search_after(row: jax.Array, last: jax.Array) -> jax.Array:
        keys = keys_of(row)
        gone = leaves_by(keys, ids, tuple(key[last] for key in keys), last)
        return lowest(keys, candidates_of(row) & ~gone)

    if policy.static_rows:
        best = jax.lax.cond(
            starts_pass,
            lambda best: jax.vmap(search)(layers),
            lambda best: best.at[touched].set(jax.vmap(search)(touched)),
            cache.best,
        )
    else:
        best = jax.vmap(search)(layers)

    def candidates(removal: _Removal) -> jax.Array:
        over = pools & (removal.used > budget) if budget.ndim else jnp.sum(removal.used) > budget
        return over & (removal.best >= 0)

    def remove(removal: _Removal) -> _Removal:
        entries = jax.tree.map(lambda table: table[layers, removal.best], memory)
        row = lowest(policy.keep(entries, now, layers), candidates(removal))
        here = layers == row  # nowhere for batch elements that are done
        expert = removal.best[row]
        freed = units[cache.level[row, expert].astype(jnp.int32), row]
        return _Removal(
            used=removal.used - jnp.where(here, freed, 0),
            best=jnp.where(here, search_after(row, expert), removal.best),
            last=jnp.where(here, expert, removal.last),
            evictions=removal.evictions + here,
        )

    removal = _Removal(cache.used, best, jnp.full_like(best, -1), jnp.zeros_like(best))
    removal = jax.lax.while_loop(lambda removal: anywhere(jnp.any(candidates(removal))), remove, removal)

    keys = policy.keep(memory, now, layers[:, None])
    last_keys = tuple(jnp.take_along_axis(key, removal.last[:, None], axis=1) for key in keys)
    gone = leaves_by(keys, ids, last_keys, removal.last[:, None]) & (removal.last >= 0)[:, None]
    gone &= (cache.level > 0) & ~jax.vmap(pinned)(layers)
    cache = Cache(jnp.where(gone, 0, cache.level), removal.used, removal.best, cache.evicted | gone)
    return cache, removal.evictions
