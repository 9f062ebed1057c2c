"""One visit of the cache's policy where the device holds experts at several precisions: who gets which pages.

What the slots are to `placing`, pages are here (`runtime.packing`): an expert takes as many as its precision needs, and
any free pages will do. A better copy replaces the one that is held of the same expert, whose pages are free before it
comes. In a pass of one token a demanded expert that does not stay keeps its pages until the next visit begins; in a
pass of several the experts that are here are computed before anything is copied, and a missing one that does not stay
passes through.

`Pool` has room for any contents that the budget allows, each expert in whole pages, and for one token's demand at the
highest precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specmd_jax.moe.fused.placing import Stepped, holding, prefetched, take_step
from specmd_jax.moe.kernels.placed import Frame, Token
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.runtime.decider import Decision, Seen
from specmd_jax.moe.runtime.memory import Beside
from specmd_jax.moe.runtime.packing import Layout
from specmd_jax.moe.runtime.policy import Policy
from specmd_jax.policies.choice import Mix
from specmd_jax.replay import state as replay
from specmd_jax.replay.state import Numbers


class Pool(NamedTuple):
    """Static sizes of the pages on the device (hashable)."""

    layout: Layout
    pages: int  # how many; as the number of a page it says "none"
    levels: tuple[int, ...]  # at which experts may be here, of 1..Q: all, or the highest alone


class State(NamedTuple):
    """What the next visit needs."""

    step: replay.State  # the simulator's
    owner: jax.Array  # [pages] int32: flat id of the expert that a page is part of, -1: free
    table: jax.Array  # [L * E, n] int32: the pages of an expert that is here, in order; n: of one at the highest level


class Placed(NamedTuple):
    """Where the visited layer's experts are, and what has to be copied. Behind an expert's last page come "none"."""

    level: jax.Array  # [E] int32 at which an expert runs, 1..Q; 0: it does not run
    missing: jax.Array  # [E] bool: it is to be copied on demand
    pages: jax.Array  # [E, n] int32 of an expert that runs: where it is, or is copied to; none: it passes through
    coming: jax.Array  # [P] int32 flat ids of the prefetch copies in their order, -1: none
    coming_pages: jax.Array  # [P, n] int32


def make_pool(layout: Layout, policy: Policy, staging: int) -> Pool:
    """Gives the pages of a run under a policy, with room for a demand of ``staging`` experts beside the budget."""
    setup, units = policy.setup, policy.sizes.units[1:, 0].tolist()
    top = len(layout.levels)
    levels = (top,) if policy.policies.miss.fetches_all else tuple(range(1, top + 1))
    budget = np.asarray(policy.sizes.budget(policy.budget))
    rows, every = (budget.tolist(), setup.experts) if budget.ndim else ([int(budget)], setup.layers * setup.experts)

    def most(own: int) -> int:
        """Gives the pages that a pool fills at most: with experts of the precision that takes most pages per byte."""
        pages = max(own * layout.levels[level - 1].pages // units[level - 1] for level in levels)
        return min(pages, every * layout.most_pages)

    return Pool(layout, sum(map(most, rows)) + staging * layout.most_pages, levels)


def place_bytes(layout: Layout, level_bytes: Sequence[int]) -> int:
    """Gives what the pages of a cache take at most for each expert at the highest precision that its budget holds.

    Args:
        level_bytes: [Q] of one expert.
    """
    most = max(Fraction(level.pages, size) for level, size in zip(layout.levels, level_bytes, strict=True))
    return math.ceil(most * level_bytes[-1] * layout.page_bytes)


def beside(plain: Beside, cfg: MoEConfig, layout: Layout) -> Beside:
    """Gives what the device holds beside the cache's experts (``plain``: at one precision), with a token's experts out
    of their pages, and the table that says where pages are."""
    table = 4 * len(cfg.moe_layers) * cfg.experts * layout.most_pages
    return plain._replace(experts=plain.experts + cfg.top_k, work_bytes=plain.work_bytes + table)


def begin(pool: Pool, frame: Frame, numbers: Numbers, mix: Mix) -> State:
    """Gives an empty cache."""
    setup = frame.setup
    return State(
        step=replay.begin(setup, mix.build(), numbers),
        owner=jnp.full(pool.pages, -1, jnp.int32),
        table=jnp.full((setup.layers * setup.experts, pool.layout.most_pages), pool.pages, jnp.int32),
    )


def blank(pool: Pool) -> jax.Array:
    """Gives the pages of an empty cache."""
    return jnp.zeros((pool.pages, pool.layout.page_words), jnp.uint32)


def visit(
    pool: Pool, frame: Frame, numbers: Numbers, mix: Mix, state: State, seen: Seen | Token
) -> tuple[State, Placed, Decision]:
    """Decides one visit, to be traced: by the rules of one token for a `Token`, else by those of several."""
    stepped = take_step(frame, numbers, mix, state.step, seen)
    owner, table, placed = _settle(pool, frame, state, stepped)
    return State(stepped.step, owner, table), placed, stepped.decision


def _settle(pool: Pool, frame: Frame, state: State, stepped: Stepped) -> tuple[jax.Array, jax.Array, Placed]:
    """Takes the pages of those that are gone and finds pages for those that come: also `State.owner` and `table`."""
    setup, layout, layer, move = frame.setup, pool.layout, stepped.layer, stepped.move
    experts, count, most = setup.experts, setup.layers * setup.experts, layout.most_pages
    own = layer * experts + jnp.arange(experts, dtype=jnp.int32)
    level = stepped.decision.row.astype(jnp.int32)
    # what only the visit before needed is gone, and so is what a better copy replaces
    owner = holding(holding(state.owner, stepped.before), move.holds.at[layer].min(~move.takes))

    free = jnp.nonzero(owner < 0, size=pool.pages, fill_value=pool.pages)[0].astype(jnp.int32)
    nth = jnp.arange(most, dtype=jnp.int32)

    def pages(first: jax.Array, size: jax.Array) -> jax.Array:
        """Gives ``size`` [n] of the free pages, from ``first`` [n] on: [n, most pages]."""
        found = free.at[first[:, None] + nth].get(mode="fill", fill_value=pool.pages)
        return jnp.where(nth < size[:, None], found, pool.pages)

    # the visited layer's by id, then the prefetched in their order
    size = jnp.where(move.takes, jnp.array([0, *(one.pages for one in layout.levels)], jnp.int32)[level], 0)
    taken = pages(jnp.cumsum(size) - size, size)
    coming = prefetched(frame, move, move.ahead)
    turn = jnp.arange(coming.shape[0], dtype=jnp.int32)
    ahead = pages(jnp.sum(size) + most * turn, jnp.where(coming >= 0, most, 0))
    table = state.table
    held = lax.dynamic_slice_in_dim(table, layer * experts, experts, 0)
    for comes, flat, where in ((move.takes, own, taken), (coming >= 0, coming, ahead)):
        owner = owner.at[where].set(jnp.broadcast_to(flat[:, None], where.shape), mode="drop")
        table = table.at[jnp.where(comes, flat, count)].set(where, mode="drop")
    placed = Placed(
        level=jnp.where(move.missing | move.here, level, 0),
        missing=move.missing,
        pages=jnp.where(move.here[:, None], held, taken),
        coming=coming,
        coming_pages=ahead,
    )
    return owner, table, placed
