"""The experts of a visit where the device holds them at several precisions, as XLA operations: what `streaming` does,
out of pages (`fused.pages`).

A precision is a level, from 1 for the fewest bits. Of one token the missing experts of each level are copied, then the
prefetched ones, then the choices of each level that occurs are computed. Of several tokens the experts on the device
are computed level by level, and then the missing ones of each level as they come. No output depends on how the choices
are parted.

All choices of a token are computed side by side, those at another level for nothing: in loops over the choices of a
level XLA makes sums in another order, and `fetch` would not have the bits that it has at one precision.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.fused.pages import Placed, Pool
from specmd_jax.moe.fused.streaming import Shelf, compact, copy_all, in_front, stream
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.runtime.packing import Level, unpack


def run(
    cfg: MoEConfig,
    pool: Pool,
    layer: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    placed: Placed,
    host: tuple[jax.Array, ...],
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gives the output of every (token, choice) pair [T, K, D] float32, and the pages with all that was copied.

    Args:
        h, ids: [T, D], and [T, K] int32, which experts run; -1: none.
        host: [Q] of pages [L * E, pages, words] in pinned host memory.
        slots: the pages on the device [pages, words].
    """
    h, ids = lax.optimization_barrier((h, ids))
    one = ids.shape[0] == 1
    out = jnp.zeros((*ids.shape, cfg.width), jnp.float32)
    own = layer * cfg.experts + jnp.arange(cfg.experts, dtype=jnp.int32)
    shelves = {level: _shelf(pool, level, host[level - 1]) for level in pool.levels}
    nowhere = jnp.full(pool.layout.most_pages, pool.pages, jnp.int32)
    ahead = in_front(placed.coming, placed.coming_pages)

    def missing(level: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return placed.missing & (placed.level == level), own, placed.pages

    if one:
        for level, shelf in shelves.items():
            slots = copy_all(shelf, slots, compact(*missing(level)))
        slots = copy_all(shelves[pool.levels[-1]], slots, ahead)
        for level in pool.levels:
            out = _choices(cfg, pool, level, h, ids, placed, slots, out)
        return out, slots
    for level in pool.levels:
        held = (placed.level == level) & ~placed.missing
        out = moe_experts.pair_outputs(cfg, h, ids, _lookup(pool, level, placed, slots), held, out)
    for level, shelf in shelves.items():
        out, slots = stream(cfg, layer, h, ids, compact(*missing(level)), nowhere, shelf, slots, out)
    return out, copy_all(shelves[pool.levels[-1]], slots, ahead)


def _choices(
    cfg: MoEConfig,
    pool: Pool,
    level: int,
    h: jax.Array,
    ids: jax.Array,
    placed: Placed,
    slots: jax.Array,
    out: jax.Array,
) -> jax.Array:
    """Fills in the outputs [1, K, D] of one token's choices whose experts are at a level; the other places compute the
    first of these once more, which is read already."""
    lookup, own = _lookup(pool, level, placed, slots), ids[0]
    here = (own >= 0) & (placed.level[jnp.maximum(own, 0)] == level)

    def run() -> jax.Array:
        rows = moe_experts.pair_outputs(cfg, h, jnp.where(here, own, own[jnp.argmax(here)])[None], lookup)
        return jnp.where(here[None, :, None], rows, out)

    return lax.cond(jnp.any(here), run, lambda: out)


def _lookup(pool: Pool, level: int, placed: Placed, slots: jax.Array) -> moe_experts.Lookup:
    """Gives the lookup of experts that are here at a level."""
    form = pool.layout.levels[level - 1]

    def lookup(expert: jax.Array) -> Expert:
        own = lax.dynamic_index_in_dim(placed.pages, expert, 0, keepdims=False)[: form.pages]
        return _weights(form, slots.at[own].get(mode="clip"))

    return lookup


def _shelf(pool: Pool, level: int, host: jax.Array) -> Shelf:
    form = pool.layout.levels[level - 1]

    def put(slots: jax.Array, expert: jax.Array, pages: jax.Array) -> jax.Array:
        return slots.at[pages[: form.pages]].set(expert[0], mode="drop")

    return Shelf(host, lambda expert: _weights(form, expert[0]), put)


def _weights(form: Level, pages: jax.Array) -> Expert:
    """Gives an expert out of its pages. It is then computed as one that never lay in pages, and has its bits: the
    barrier keeps compilers that heed it from unpacking and decoding in one."""
    return lax.optimization_barrier(unpack(form, pages))
