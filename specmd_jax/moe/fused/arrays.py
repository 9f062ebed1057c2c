"""What goes into a program of the fused engine and what comes out, as named tuples.

Shapes: T tokens of the pass, K experts per token, L routed layers of E experts, C + S slots for experts (`Frame`), B
requests decoded together. A pass is of one sequence, or it decodes a token of each of several: then T is B, and rows of
requests that have no token are routed to no expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from specmd_jax.moe.fused.pages import Pool
from specmd_jax.moe.kernels.decode import AttendRoute
from specmd_jax.moe.kernels.placed import Frame
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import LayerFns
from specmd_jax.moe.model.layers import LayerCache
from specmd_jax.policies.choice import Choice, Mix
from specmd_jax.replay.state import Numbers


class Kernels(NamedTuple):
    """Which parts of a pass are Pallas kernels; the others are XLA operations (hashable)."""

    policy: bool
    experts: bool
    dense: bool
    interpret: bool  # as plain operations, on any device


class Block(NamedTuple):
    """The functions of a layer."""

    fns: LayerFns
    attend_route: AttendRoute | None  # both at once; None: by `LayerFns`


class Segment(NamedTuple):
    """``repeats`` times the same layers, as stretches that end at a gate."""

    spans: tuple[tuple[Block, ...], ...]
    repeats: int


class Functions(NamedTuple):
    """A model's functions for a pass. Only the last segment is repeated."""

    segments: tuple[Segment, ...]
    tail: tuple[LayerFns, ...]  # layers behind the last gate
    head: Callable[..., jax.Array]
    stacked: bool  # whether a layer's functions take `decode.At`: they find it in the stacked arrays themselves


class Form(NamedTuple):
    """Static part of a pass."""

    cfg: MoEConfig
    frame: Frame
    kernels: Kernels
    one: Functions  # for a pass of one token
    many: Functions
    fetches_all: bool  # whether every miss is copied
    ahead: bool  # ask the next gate with this one's input
    reroutes: bool  # whether the policy chooses the experts
    reads_logits: bool  # whether the miss rule does
    logits: bool  # record the router's logits
    pool: Pool | None = None  # of experts at several precisions; None: at one, in slots


class Fixed(NamedTuple):
    """Arrays that a pass only reads."""

    embed: Any
    head: Any
    segments: tuple[Any, ...]  # [segment][span][layer] parameters, leaves [repeats, ...]
    tail: tuple[Any, ...]
    host: Any  # `Expert` [L * E, ...] in pinned host memory, or pages [L * E, ...] of each precision
    numbers: Numbers
    mix: Mix  # of a visit whose experts are chosen
    routing: Choice


class Live(NamedTuple):
    """Arrays that go from pass to pass, over requests."""

    cache: Any  # `kernels.policy.State`, `placing.State` or `pages.State`
    routing: Any  # what the routing policy remembers
    slots: Any  # `Expert` [C + S, ...], or pages [pages, words]
    pass_id: jax.Array  # int32


class Request(NamedTuple):
    """Arrays that go from pass to pass of one request, or of B in a batch."""

    start: jax.Array  # [B] int32 positions already cached
    caches: tuple[Any, ...]  # [segment][span][layer] of `LayerCache`, leaves [repeats, B, S, ...]
    tail: tuple[LayerCache, ...]


class Admission(NamedTuple):
    """Says that a pass is the prompt of a request that takes a place in a batch."""

    place: jax.Array  # [] int32 of the B
    fed: jax.Array  # [B, 1] int32: the tokens that the places are fed next


class Active(NamedTuple):
    """Says that a pass decodes a batch."""

    rows: jax.Array  # [B] bool: the places that have a token


Part = Admission | Active | None
"""Whose tokens a pass of a batch runs; None: of the only request."""


class ForcedRouting(NamedTuple):
    """Routing to use in place of the model's own."""

    ids: jax.Array  # [L, T, K] int32 by falling gate
    gates: jax.Array  # [L, T, K]
    ahead: jax.Array | None  # [L, T, E]
    logits: jax.Array | None  # [L, T, E] where the policy chooses by them


class Routed(NamedTuple):
    """What arrives at a gate."""

    h: jax.Array  # [T, D]
    ids: jax.Array  # [T, K] int32
    gates: jax.Array  # [T, K] that weigh the experts
    seen_gates: jax.Array  # [T, K] float32 as the policy sees them and the trace records them
    ahead: jax.Array | None  # [T, E]
    logits: jax.Array  # [T, E]
    in_order: bool  # whether ids are by falling gate
    real: jax.Array | None = None  # [T] bool: the rows that hold a token; None: all


class Record(NamedTuple):
    """What happened at each gate."""

    ids: jax.Array  # [L, T, K] int32
    gates: jax.Array  # [L, T, K]
    ahead: jax.Array | None  # [L, T, E]
    logits: jax.Array | None  # [L, T, E]
    note: Any  # leaves [L, ...] of a `Decision`, or of the policy kernel's `Log`


class Made(NamedTuple):
    """The end of a pass."""

    token: jax.Array  # [B, 1] int32, the most likely next ones: what is fed next
    # [M, 2] int32 in pinned host memory: the tokens that the pass made, one or B, and 1 where all logits and gates of
    # its row are finite
    packed: jax.Array
    logits: jax.Array  # [M, V] float32
    record: Record
