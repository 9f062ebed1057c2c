"""What goes into a program of the fused engine and what comes out, as named tuples.

Shapes: T tokens of the pass (one sequence), K experts per token, L routed layers of E experts, C slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import LayerFns
from specmd_jax.moe.model.layers import LayerCache
from specmd_jax.moe.runtime.decider import Decision
from specmd_jax.replay.state import Numbers, Setup, State


class Segment(NamedTuple):
    """``repeats`` times the same layers, as stretches that end at a gate."""

    spans: tuple[tuple[LayerFns, ...], ...]
    repeats: int


class Form(NamedTuple):
    """Static part of a pass. Only the last segment is repeated."""

    cfg: MoEConfig
    setup: Setup
    segments: tuple[Segment, ...]
    tail: tuple[LayerFns, ...]  # layers behind the last gate
    ahead: bool  # ask the next gate with this one's input
    logits: bool  # record the router's logits


class Fixed(NamedTuple):
    """Arrays that a pass only reads."""

    embed: Any
    head: Any
    segments: tuple[Any, ...]  # [segment][span][layer] parameters, leaves [repeats, ...]
    tail: tuple[Any, ...]
    host: Expert  # [L * E, ...] in pinned host memory
    numbers: Numbers
    traced: Any


class Live(NamedTuple):
    """Arrays that go from pass to pass, over requests."""

    state: State  # the simulator's
    slots: Expert  # [C, ...]
    owner: jax.Array  # [C - 1] int32: flat id of what the slot holds, -1: nothing. The last slot is nobody's
    slot_of: jax.Array  # [L * E] int32; -1: not on the device
    visit: jax.Array  # int32
    pass_id: jax.Array  # int32


class Request(NamedTuple):
    """Arrays that go from pass to pass of one request."""

    start: jax.Array  # [1] int32 positions already cached
    caches: tuple[Any, ...]  # [segment][span][layer] of `LayerCache`, leaves [repeats, 1, S, ...]
    tail: tuple[LayerCache, ...]


class ForcedRouting(NamedTuple):
    """Routing to use in place of the model's own."""

    ids: jax.Array  # [L, T, K] int32
    gates: jax.Array  # [L, T, K]
    ahead: jax.Array | None  # [L, T, E]


class Record(NamedTuple):
    """What happened at each gate."""

    ids: jax.Array  # [L, T, K] int32
    gates: jax.Array  # [L, T, K]
    ahead: jax.Array | None  # [L, T, E]
    logits: jax.Array | None  # [L, T, E]
    decision: Decision  # leaves [L, ...]
    held: jax.Array  # [L] int32: experts on the device while the visit was under way
    finite: jax.Array  # [L] bool: what the router gave, whether it was used or not


class Made(NamedTuple):
    """The end of a pass."""

    token: jax.Array  # [1, 1] int32, the most likely next one
    packed: jax.Array  # [2] int32 in pinned host memory: the token, and 1 where all logits and gates are finite
    logits: jax.Array  # [V] float32
    record: Record
