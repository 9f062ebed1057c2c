"""One mechanism for every eviction policy: it removes the lowest unpinned keep-scores until the budget holds.

The search never looks at the whole `[L, E]` table. `best` holds the lowest unpinned resident of each layer; only the
rows that a visit touches are searched again, so that a victim costs a row of E and the L winners rather than L * E.
`Eviction.static_rows` says for which policies that is sound; the others search every row again.

A loop iteration removes one expert, in every batch element of a `vmap` at once, and writes two entries of the table in
place; the winners' keys travel with them, so that only the victim's row is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int8, Int32, Integer, Shaped

from specmd_jax.loops import anywhere
from specmd_jax.policies.base import Eviction, Keys, Now

FEW = 4


class Cache(NamedTuple):
    """The contents of the cache."""

    level: Int8[Array, "L E"]  # 0 absent, else precision level 1..Q
    used: Int32[Array, " L"]  # units
    best: Int32[Array, " L"]  # the layer's lowest keep-score among unpinned residents (-1: none)
    evicted: Int32[Array, "L E"]  # the pass of the last eviction (-1: none)


class _Removal(NamedTuple):
    level: Int8[Array, "L E"]
    evicted: Int32[Array, "L E"]
    used: Int32[Array, " L"]
    best: Int32[Array, " L"]
    keys: Keys  # [L] each, of `best`
    size: Int32[Array, " L"]  # units of `best`
    evictions: Int32[Array, " L"]


def lowest(keys: tuple[Shaped[Array, " n"], ...], candidates: Bool[Array, " n"]) -> Int32[Array, ""]:
    """Finds the candidate with the lowest keys, compared in order; the *highest* index among equals, -1 without any."""
    for key in keys:
        top = jnp.inf if jnp.issubdtype(key.dtype, jnp.floating) else jnp.iinfo(key.dtype).max
        candidates &= key == jnp.min(jnp.where(candidates, key, top))
    return jnp.max(jnp.where(candidates, jnp.arange(candidates.shape[0], dtype=jnp.int32), -1))


def pick(table: Shaped[Array, " levels *row"], level: Integer[Array, " *at"]) -> Shaped[Array, "..."]:
    """Gives `table[level]` for a table of few levels, column by column if it has any: selects beat gathers."""
    found = jnp.where(level == 0, table[0], 0)
    for number in range(1, table.shape[0]):
        found = jnp.where(level == number, table[number], found)
    return found


def evict(
    policy: Eviction,
    memory: Any,
    cache: Cache,
    *,
    now: Now,
    units: Int32[Array, "levels L"],
    budget: Int32[Array, " *pools"],
    pinned: Callable[[Int32[Array, ""]], Bool[Array, " E"]],
    touched: Int32[Array, " touched"],
    also: Int32[Array, " also"],
    pools: Bool[Array, " L"],
    starts_pass: Bool[Array, ""],
) -> tuple[Cache, Int32[Array, " L"]]:
    """Evicts down to the budget.

    Args:
      memory: the policy's state, leaves [L, E].
      units: what an expert takes at each of the Q + 1 levels.
      budget: units, a scalar for one pool or [L] for a pool per layer.
      pinned: the experts of a layer that must stay.
      touched, also: layers whose residents, pins or scores changed since the last call; `also`
        those that differ between the elements of a batch, mostly named by `touched` as well.
      pools: layers whose pool the visit copied into: only these are brought within the budget.
      starts_pass: whether this is the first visit of a pass.

    Returns:
      The cache and the evictions of each layer.
    """
    layers = jnp.arange(cache.level.shape[0], dtype=jnp.int32)
    ids = jnp.arange(cache.level.shape[1], dtype=jnp.int32)

    def search(level: Int8[Array, "L E"], row: Int32[Array, ""]) -> tuple[Int32[Array, ""], Keys, Int8[Array, ""]]:
        """Gives the expert of a layer that would leave first (-1: none), its keys and its level."""
        keys, levels = policy.keep(jax.tree.map(lambda table: table[row], memory), now, row), level[row]
        expert = lowest(keys, (levels > 0) & ~pinned(row))

        def its(values: Shaped[Array, " E"]) -> Shaped[Array, ""]:
            return jnp.sum(jnp.where(ids == expert, values, 0), dtype=values.dtype)

        return expert, tuple(its(key) for key in keys), its(levels)

    def winners(best: Int32[Array, " L"], rows: Int32[Array, " rows"]) -> Int32[Array, " L"]:
        if rows.size > FEW:
            return best.at[rows].set(jax.vmap(lambda row: search(cache.level, row)[0])(rows))
        for row in rows:  # one by one a row is a slice, which is read faster than what several indices gather
            best = best.at[row].set(search(cache.level, row)[0])
        return best

    best = cache.best
    if policy.static_rows:
        best = jax.lax.cond(starts_pass, lambda best: winners(best, layers), lambda best: winners(best, touched), best)
        if also.size:
            apart = ~jnp.any(also[:, None] == touched[None, :], axis=1)
            best = jax.lax.cond(anywhere(jnp.any(apart)), lambda best: winners(best, also), lambda best: best, best)
    else:
        best = winners(best, layers)
    entries = jax.tree.map(lambda table: table[layers, best], memory)
    keys = tuple(jnp.broadcast_to(key, layers.shape) for key in policy.keep(entries, now, layers))
    size = units[1] if units.shape[0] == 2 else pick(units, cache.level[layers, best])

    def candidates(removal: _Removal) -> Bool[Array, " L"]:
        over = pools & (removal.used > budget) if budget.ndim else jnp.sum(removal.used) > budget
        return over & (removal.best >= 0)

    def remove(removal: _Removal) -> _Removal:
        row = lowest(removal.keys, candidates(removal))
        here = layers == row  # nowhere for batch elements that are done
        at = jnp.where(row < 0, layers.size, row), removal.best[row]
        level = removal.level.at[at].set(0, mode="drop")
        best, keys, next_level = search(level, row)
        return _Removal(
            level=level,
            evicted=removal.evicted.at[at].set(now.pass_id, mode="drop"),
            used=removal.used - jnp.where(here, removal.size, 0),
            best=jnp.where(here, best, removal.best),
            keys=tuple(jnp.where(here, new, old) for new, old in zip(keys, removal.keys, strict=True)),
            size=jnp.where(here, pick(units, next_level), removal.size),
            evictions=removal.evictions + here.astype(jnp.int32),
        )

    removal = _Removal(cache.level, cache.evicted, cache.used, best, keys, size, jnp.zeros_like(best))
    removal = jax.lax.while_loop(lambda removal: anywhere(jnp.any(candidates(removal))), remove, removal)
    return Cache(removal.level, removal.used, removal.best, removal.evicted), removal.evictions
