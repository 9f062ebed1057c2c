"""One visit of the cache's policy as XLA operations, by the simulator's own step: what `moe.kernels.policy` does in one
kernel, for every policy and every device, and what that is compared with.

`begin` and `visit` take and give what those of the kernel do, but for a `Decision` in place of a `Log`. Which of the
free slots an expert gets is each maker's own affair.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.moe.kernels.placed import Frame, Placed, Token, seen_of
from specmd_jax.moe.runtime.decider import Decision, Seen, decide
from specmd_jax.policies.choice import Mix
from specmd_jax.replay import state as replay
from specmd_jax.replay.prefetching import targets_of
from specmd_jax.replay.state import Numbers
from specmd_jax.replay.totals import FETCHED, PREFETCHED, REUSED, SUBSTITUTED


class State(NamedTuple):
    """What the next visit needs."""

    step: replay.State  # the simulator's
    owner: jax.Array  # [C + S] int32: flat id of what the slot holds, -1: nothing
    slot_of: jax.Array  # [L * E] int32, -1: not on the device


def begin(frame: Frame, numbers: Numbers, mix: Mix) -> State:
    """Gives an empty cache."""
    setup = frame.setup
    return State(
        step=replay.begin(setup, mix.build(), numbers),
        owner=jnp.full(frame.slots, -1, jnp.int32),
        slot_of=jnp.full(setup.layers * setup.experts, -1, jnp.int32),
    )


def resident(frame: Frame, state: State, layer: jax.Array) -> jax.Array:
    """Says which experts of a layer are resident, [E] bool."""
    del frame
    return state.step.cache.level[layer] > 0


def visit(frame: Frame, numbers: Numbers, mix: Mix, state: State, seen: Seen | Token) -> tuple[State, Placed, Decision]:
    """Decides one visit, to be traced: by the rules of one token for a `Token`, else by those of several."""
    one_token = isinstance(seen, Token)
    rows = seen_of(seen, frame.setup.experts) if one_token else seen
    before = state.step.cache.level > 0
    step, decision = decide(frame.setup, numbers, mix, state.step, rows)
    owner, slot_of, placed = _settle(frame, state, before, decision, rows.layer, one_token)
    return State(step, owner, slot_of), placed, decision


def _settle(
    frame: Frame,
    state: State,
    before: jax.Array,
    decision: Decision,
    layer: jax.Array,
    one_token: bool,
) -> tuple[jax.Array, jax.Array, Placed]:
    """Takes the slots of those that are gone and finds slots for those that come: also `State.owner` and `slot_of`."""
    setup, slots = frame.setup, frame.slots
    experts, count = setup.experts, setup.layers * setup.experts
    ids, own = jnp.arange(experts, dtype=jnp.int32), layer * experts
    after = decision.level > 0

    def holding(owner: jax.Array, here: jax.Array) -> jax.Array:
        """Gives the slots up whose experts are not ``here`` [L, E]."""
        return jnp.where((owner >= 0) & here.reshape(-1)[jnp.maximum(owner, 0)], owner, -1)

    owner = holding(state.owner, before)  # what only the visit before needed is gone
    held = jnp.where(before[layer], state.slot_of[own + ids], -1)
    outcome, stays = decision.outcome, after[layer]
    missing = outcome == FETCHED
    stand_in = jnp.any((outcome == SUBSTITUTED)[:, None] & (decision.instead[:, None] == ids[None]), axis=0)
    here = (outcome == REUSED) | (outcome == PREFETCHED) | stand_in
    runs = missing | here
    owner = holding(owner, after.at[layer].max(runs) if one_token else after)

    # the visited layer's by id, then the prefetched in their order
    takes = missing if one_token else missing & stays
    flat = (own + ids, (targets_of(setup, layer)[:, None] * experts + ids[None]).reshape(-1))
    number = decision.prefetched.reshape(-1)
    flat = jnp.concatenate(flat)
    comes = jnp.concatenate([takes, number > 0])
    rank = jnp.concatenate([jnp.cumsum(takes, dtype=jnp.int32) - 1, jnp.sum(takes, dtype=jnp.int32) + number - 1])

    # hits that leave a pass of several tokens are computed first: their slots are taken before all others
    free = owner < 0
    leaves = here & ~stays
    left = jnp.zeros(slots, bool).at[jnp.where(leaves, held, slots)].set(True, mode="drop") & free
    clean = free & ~left
    turn = jnp.where(left, jnp.cumsum(left, dtype=jnp.int32), jnp.sum(left, dtype=jnp.int32) + jnp.cumsum(clean)) - 1
    match = free[None] & (turn[None] == rank[:, None]) & comes[:, None]  # [comes, slots]
    slot = jnp.max(jnp.where(match, jnp.arange(slots, dtype=jnp.int32)[None], -1), axis=1)
    owner = owner.at[jnp.where(comes, slot, slots)].set(flat, mode="drop")
    slot_of = jnp.where(before.reshape(-1) & after.reshape(-1), state.slot_of, -1)
    slot_of = slot_of.at[jnp.where(comes, flat, count)].set(slot, mode="drop")

    place = jnp.where(number > 0, number - 1, frame.most_coming)
    nobody = jnp.full(frame.most_coming, -1, jnp.int32)
    spare = jnp.nonzero(clean & (owner < 0), size=frame.staging, fill_value=-1)[0]
    placed = Placed(
        slot=jnp.where(takes, slot[:experts], jnp.where(here, held, -1)),
        missing=missing.astype(jnp.int32),
        coming=nobody.at[place].set(flat[experts:], mode="drop"),
        coming_slot=nobody.at[place].set(slot[experts:], mode="drop"),
        spare=spare.astype(jnp.int32),
    )
    return owner, slot_of, placed
