"""What one visit of the fused engine is given and what it decides: slots, copies, and a log that the host reads later.

Axis letters as in `specmd_jax.types`; C experts fit the budget, and C + S slots are on the device.

A policy says who is resident after a visit; who needs a slot while it is under way depends on the pass:

- **One token**: all its experts are computed at once out of slots. A demanded expert that does not stay keeps its slot
  until the next visit begins, or gets one for as long: at most C residents and K <= S others.
- **Several tokens**, of a prompt or of requests decoded together: the experts that are here are computed first, then
  the missing ones are streamed. A hit that leaves gives its slot up at once, to the copies that come first; a missing
  expert that does not stay passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.runtime.decider import Decision, Seen
from specmd_jax.moe.runtime.policy import Policy, numbers_of, slots_of
from specmd_jax.replay.state import Setup
from specmd_jax.replay.totals import FETCHED


class Frame(NamedTuple):
    """Static sizes of a run (hashable)."""

    setup: Setup
    capacity: int  # C experts
    staging: int  # S slots beside them
    prefetches: bool

    @property
    def slots(self) -> int:
        """All slots on the device."""
        return self.capacity + self.staging

    @property
    def most_coming(self) -> int:
        """P, a power of two (or 0): no visit starts more prefetch copies."""
        setup = self.setup
        most = min(setup.horizon * setup.experts, self.capacity)
        return next_power_of_two(most) if self.prefetches else 0

    def most_leaving(self, demanded: int) -> int:
        """M, a power of two: no visit that demands so many experts evicts more: as many as come."""
        return next_power_of_two(demanded + self.most_coming)


class Token(NamedTuple):
    """The visit of a pass of one token (scalars, and what its router gave)."""

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layer: jax.Array
    pass_id: jax.Array
    ids: jax.Array  # [K] int32
    gates: jax.Array  # [K] float32
    ahead: jax.Array | None = None  # [E] float32
    logits: jax.Array | None = None  # [E] float32, for miss rules that read them


class Placed(NamedTuple):
    """Where the visited layer's experts are, and what has to be copied."""

    slot: jax.Array  # [E] int32 of an expert that runs: where it is, or where it is copied to; -1: it does not run, or
    # it passes through (only in passes of several tokens)
    missing: jax.Array  # [E] int32, 1: it is to be copied on demand
    coming: jax.Array  # [P] int32 flat ids of the prefetch copies in their order, -1: none
    coming_slot: jax.Array  # [P] int32
    spare: jax.Array  # [S] int32 slots that hold nothing that the visit needs; -1 in passes of one token that use them


class Log(NamedTuple):
    """What visits did, a row each; `decisions` makes the simulator's words of it. E' is a power of two."""

    outcome: Any  # [R, E'] int8, a constant of `specmd_jax.replay.totals`
    collision: Any  # [R, E'] int8, 0 or 1
    evicted: Any  # [R, M] int32 flat ids in their order, -1: none
    prefetched: Any  # [R, H, E'] int32 1, 2, ... in the order in which the copies start; 0: none. None: nothing
    # prefetches


class Book(NamedTuple):
    """What the visits of a pass of one token leave behind, a row each."""

    ids: Any  # [R, 1, K] int32
    gates: Any  # [R, 1, K] float32
    log: Log


def blank_log(frame: Frame, demanded: int, rows: int) -> Log:
    """Gives a log of so many visits that demand at most so many experts each."""
    setup = frame.setup
    wide = next_power_of_two(setup.experts)
    prefetched = jnp.zeros((rows, setup.horizon, wide), jnp.int32) if frame.prefetches else None
    row = jnp.zeros((rows, wide), jnp.int8)
    return Log(row, row, jnp.zeros((rows, frame.most_leaving(demanded)), jnp.int32), prefetched)


def make_frame(policy: Policy, top_k: int) -> Frame:
    """Gives the sizes of a run under a policy."""
    setup = policy.setup
    capacity = min(slots_of(policy, numbers_of(policy)), setup.layers * setup.experts)
    return Frame(setup, capacity, max(top_k, 2), policy.policies.prefetch is not None)


def seen_of(token: Token, experts: int) -> Seen:
    """Gives the same visit in rows of E."""
    chosen = token.ids[:, None] == jnp.arange(experts, dtype=jnp.int32)[None]  # [K, E]
    place = jnp.arange(token.ids.shape[0], dtype=jnp.int32)[:, None]
    count = jnp.sum(chosen, axis=0, dtype=jnp.int32)
    return Seen(
        index=token.index,
        layer=token.layer,
        pass_id=token.pass_id,
        tokens=jnp.int32(1),
        decode=jnp.int32(1),  # what is decided does not depend on it
        count=count,
        mass=jnp.sum(jnp.where(chosen, token.gates[:, None], 0.0), axis=0),
        rank=jnp.sum(jnp.where(chosen, place + 1, 0), axis=0, dtype=jnp.int32) - 1,
        ahead=jnp.zeros(experts, jnp.float32) if token.ahead is None else token.ahead,
        logits=token.logits,
    )


def decisions(setup: Setup, passes: Sequence[Log]) -> list[Decision]:
    """Gives what was decided at each visit of a run (numpy), from the first on an empty cache.

    Args:
        passes: logs (numpy) of one pass after the other, leaves [L, ...] by layer.
    """
    layers, experts = setup.layers, setup.experts
    level, found = np.zeros((layers, experts), np.int8), []
    for whole in passes:
        for layer in range(layers):
            log = Log(*(None if leaf is None else np.asarray(leaf[layer]) for leaf in whole))
            wide = {"outcome": log.outcome[:experts], "collision": log.collision[:experts]}
            if log.prefetched is not None:
                wide["prefetched"] = log.prefetched[:, :experts]
            log = log._replace(**wide)
            found.append(_decision(setup, level, layer, log))
            level = found[-1].level
    return found


def _decision(setup: Setup, before: Any, layer: int, log: Log) -> Decision:
    level = before.copy()
    level[layer] = np.where(log.outcome == FETCHED, 1, level[layer])
    row, prefetched = level[layer].copy(), log.prefetched
    if prefetched is None:
        prefetched = np.zeros((setup.horizon, setup.experts), np.int32)
    for ahead, copies in enumerate(prefetched):
        level[(layer + 1 + ahead) % setup.layers][copies > 0] = 1
    left = log.evicted[log.evicted >= 0]
    level.reshape(-1)[left] = 0
    evictions = np.bincount(left // setup.experts, minlength=setup.layers).astype(np.int32)
    nobody = np.full(setup.experts, -1, np.int32)
    return Decision(level, log.outcome, log.collision.astype(bool), evictions, prefetched, row, nobody)
