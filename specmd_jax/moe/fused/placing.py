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
    stepped = take_step(frame, numbers, mix, state.step, seen)
    owner, slot_of, placed = _settle(frame, state, stepped)
    return State(stepped.step, owner, slot_of), placed, stepped.decision


class Moves(NamedTuple):
    """Who runs at a visit, who stays, and who comes."""

    here: jax.Array  # [E] bool: runs, and was on the device
    missing: jax.Array  # [E] bool: runs, and is to be copied
    stays: jax.Array  # [E] bool: is resident behind the visit
    takes: jax.Array  # [E] bool: is missing, and gets a place of its own
    holds: jax.Array  # [L, E] bool: who may hold a place while the visit is under way
    ahead: jax.Array  # [H * E] int32 flat ids of those that may be prefetched
    number: jax.Array  # [H * E] int32 1, 2, ... in the order of their copies; 0: none


class Stepped(NamedTuple):
    """One step of the simulator, and who moves by it."""

    layer: jax.Array
    before: jax.Array  # [L, E] bool: resident when the visit begins
    step: replay.State
    decision: Decision
    move: Moves


def take_step(frame: Frame, numbers: Numbers, mix: Mix, state: replay.State, seen: Seen | Token) -> Stepped:
    """Takes one step of the simulator: by the rules of one token for a `Token`, else by those of several."""
    one_token = isinstance(seen, Token)
    rows = seen_of(seen, frame.setup.experts) if one_token else seen
    step, decision = decide(frame.setup, numbers, mix, state, rows)
    move = _moves(frame, decision, rows.layer, one_token)
    return Stepped(rows.layer, state.cache.level > 0, step, decision, move)


def _moves(frame: Frame, decision: Decision, layer: jax.Array, one_token: bool) -> Moves:
    """Reads who moves out of a decision."""
    setup = frame.setup
    ids = jnp.arange(setup.experts, dtype=jnp.int32)
    after, outcome = decision.level > 0, decision.outcome
    missing, stays = outcome == FETCHED, after[layer]
    stand_in = jnp.any((outcome == SUBSTITUTED)[:, None] & (decision.instead[:, None] == ids[None]), axis=0)
    here = (outcome == REUSED) | (outcome == PREFETCHED) | stand_in
    return Moves(
        here=here,
        missing=missing,
        stays=stays,
        takes=missing if one_token else missing & stays,
        holds=after.at[layer].max(missing | here) if one_token else after,
        ahead=(targets_of(setup, layer)[:, None] * setup.experts + ids[None]).reshape(-1),
        number=decision.prefetched.reshape(-1),
    )


def holding(owner: jax.Array, here: jax.Array) -> jax.Array:
    """Gives places up whose owners (flat ids, -1: free) are not ``here`` [L, E]."""
    return jnp.where((owner >= 0) & here.reshape(-1)[jnp.maximum(owner, 0)], owner, -1)


def prefetched(frame: Frame, move: Moves, values: jax.Array) -> jax.Array:
    """Gives ``values`` [H * E, ...] of those that are prefetched, in the order of their copies, [P, ...]; -1: none."""
    place = jnp.where(move.number > 0, move.number - 1, frame.most_coming)
    return jnp.full((frame.most_coming, *values.shape[1:]), -1, jnp.int32).at[place].set(values, mode="drop")


def _settle(frame: Frame, state: State, stepped: Stepped) -> tuple[jax.Array, jax.Array, Placed]:
    """Takes the slots of those that are gone and finds slots for those that come: also `State.owner` and `slot_of`."""
    setup, slots = frame.setup, frame.slots
    experts, count = setup.experts, setup.layers * setup.experts
    layer, before, move = stepped.layer, stepped.before, stepped.move
    own = layer * experts + jnp.arange(experts, dtype=jnp.int32)
    after = stepped.decision.level > 0
    held = jnp.where(before[layer], state.slot_of[own], -1)
    owner = holding(holding(state.owner, before), move.holds)  # what only the visit before needed is gone

    # the visited layer's by id, then the prefetched in their order
    takes, number = move.takes, move.number
    flat = jnp.concatenate([own, move.ahead])
    comes = jnp.concatenate([takes, number > 0])
    rank = jnp.concatenate([jnp.cumsum(takes, dtype=jnp.int32) - 1, jnp.sum(takes, dtype=jnp.int32) + number - 1])

    # hits that leave a pass of several tokens are computed first: their slots are taken before all others
    free = owner < 0
    leaves = move.here & ~move.stays
    left = jnp.zeros(slots, bool).at[jnp.where(leaves, held, slots)].set(True, mode="drop") & free
    clean = free & ~left
    turn = jnp.where(left, jnp.cumsum(left, dtype=jnp.int32), jnp.sum(left, dtype=jnp.int32) + jnp.cumsum(clean)) - 1
    match = free[None] & (turn[None] == rank[:, None]) & comes[:, None]  # [comes, slots]
    slot = jnp.max(jnp.where(match, jnp.arange(slots, dtype=jnp.int32)[None], -1), axis=1)
    owner = owner.at[jnp.where(comes, slot, slots)].set(flat, mode="drop")
    slot_of = jnp.where(before.reshape(-1) & after.reshape(-1), state.slot_of, -1)
    slot_of = slot_of.at[jnp.where(comes, flat, count)].set(slot, mode="drop")

    spare = jnp.nonzero(clean & (owner < 0), size=frame.staging, fill_value=-1)[0]
    placed = Placed(
        slot=jnp.where(takes, slot[:experts], jnp.where(move.here, held, -1)),
        missing=move.missing.astype(jnp.int32),
        coming=prefetched(frame, move, move.ahead),
        coming_slot=prefetched(frame, move, slot[experts:]),
        spare=spare.astype(jnp.int32),
    )
    return owner, slot_of, placed
