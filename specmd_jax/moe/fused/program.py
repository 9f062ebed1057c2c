"""One compiled program a pass, for a model whose experts are copied from pinned host memory inside it; see `fused`.

The order within a layer: router, the simulator's step, slots given up and taken (`_settle`), copies, experts. Copies
are loops over what is missing, not a `lax.cond` each: compilers follow arrays in host memory into loops only.

Shapes: T tokens of the pass (one sequence), K experts a token, L routed layers of E experts, C slots, H the
prefetching horizon.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.engines.prepared import Choice
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert, uncontracted
from specmd_jax.moe.model.forward import LayerFns, build, finish
from specmd_jax.moe.model.layers import LayerCache
from specmd_jax.moe.runtime.policy import Decision, Seen, decide
from specmd_jax.moe.runtime.store import DEVICE, PINNED, sharding
from specmd_jax.replay.step import Numbers, Setup, State


class Segment(NamedTuple):
    """``repeats`` times the same layers, as stretches that end at a gate."""

    spans: tuple[tuple[LayerFns, ...], ...]
    repeats: int


class Form(NamedTuple):
    """Static part of a pass. Only the last segment is repeated."""

    cfg: MoEConfig
    setup: Setup
    choices: tuple[Choice, ...]
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


class Routing(NamedTuple):
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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def run(
    form: Form, fixed: Fixed, live: Live, request: Request, tokens: jax.Array, forced: Routing | None
) -> tuple[Live, Request, Made]:
    """One pass over ``tokens`` [1, T]: a prefill if nothing is cached yet, else a decode step."""
    cfg, start, base = form.cfg, request.start, 0
    x, records, caches = build(cfg).embed(fixed.embed, tokens), [], []
    for number, segment in enumerate(form.segments):
        behind = fixed.segments[number + 1][0][-1] if number + 1 < len(form.segments) else None
        body = functools.partial(_repeat, form, fixed, number, behind, base, start, forced)
        carry = live, request.caches[number], x
        (live, cache, x), record = lax.scan(body, carry, jnp.arange(segment.repeats, dtype=jnp.int32))
        caches.append(cache)
        records.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), record))
        base += len(segment.spans) * segment.repeats
    tail = []
    for fns, params, cache in zip(form.tail, fixed.tail, request.tail, strict=True):
        x, h, cache = fns.attend(params, x, cache, start)
        tail.append(cache)
        assert fns.mlp is not None
        x = finish(x, fns.mlp(params, h))
    record = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *records)
    logits = build(cfg).head(fixed.head, x[:, -1])[0]
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(1, 1)
    good = jnp.isfinite(logits).all() & record.finite.all()
    packed = jax.device_put(jnp.stack([token[0, 0], good.astype(jnp.int32)]), sharding(PINNED))
    request = Request(start + tokens.shape[1], tuple(caches), tuple(tail))
    return live._replace(pass_id=live.pass_id + 1), request, Made(token, packed, logits, record)


def _repeat(
    form: Form,
    fixed: Fixed,
    number: int,
    behind: Any,
    base: int,
    start: jax.Array,
    forced: Routing | None,
    carry: tuple[Live, Any, jax.Array],
    index: jax.Array,
) -> tuple[tuple[Live, Any, jax.Array], Record]:
    """One repeat of a segment: its spans one after the other. ``behind``: parameters of the layer with the first gate
    of the next segment, None at the last."""
    (live, caches, x), segment, stacks = carry, form.segments[number], fixed.segments[number]
    caches, records = [list(row) for row in caches], []
    for at, span in enumerate(segment.spans):
        h, routing = x, None
        params: Any = None
        for place, fns in enumerate(span):
            params = _row(stacks[at][place], index)
            x, h, cache = fns.attend(params, x, _row(caches[at][place], index), start)
            caches[at][place] = jax.tree.map(
                lambda whole, row: lax.dynamic_update_index_in_dim(whole, row, index, 0), caches[at][place], cache
            )
            if fns.route is None:
                assert fns.mlp is not None
                x = finish(x, fns.mlp(params, h))
            else:
                routing = fns.route(params, h)
        assert routing is not None
        (ids, gates, logits), layer = routing, base + index * len(segment.spans) + at
        ids, seen_gates, ahead = ids.astype(jnp.int32), uncontracted(gates.astype(jnp.float32)), None
        if form.ahead:
            ahead = _ask_ahead(segment, stacks, at, index, behind, h)
        finite = jnp.isfinite(gates).all()
        if ahead is not None:
            finite &= jnp.isfinite(ahead).all()
        if forced is not None:
            ids, gates = _row(forced.ids, layer), _row(forced.gates, layer)
            seen_gates = gates
            if ahead is not None and forced.ahead is not None:
                ahead = _row(forced.ahead, layer)
        live, y, record = _visit(form, fixed, live, layer, start[0] > 0, h, ids, gates, seen_gates, ahead)
        records.append(record._replace(logits=logits if form.logits else None, finite=finite))
        shared = span[-1].shared
        x = finish(x, y) if shared is None else finish(x, y, shared(params, h))
    carry = live, tuple(tuple(row) for row in caches), x
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)


def _row(stack: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), stack)


def _ask_ahead(segment: Segment, stacks: Any, at: int, index: jax.Array, behind: Any, h: jax.Array) -> jax.Array:
    """What the next gate makes of this one's input, as probabilities [T, E]; 0 at the last gate."""
    last = index == segment.repeats - 1
    if at + 1 < len(segment.spans):
        fns, params, known = segment.spans[at + 1][-1], _row(stacks[at + 1][-1], index), jnp.asarray(True)
    elif behind is not None:
        fns, params, known = segment.spans[at][-1], _row(behind, jnp.int32(0)), jnp.asarray(True)
    else:
        fns, params, known = segment.spans[0][-1], _row(stacks[0][-1], jnp.where(last, index, index + 1)), ~last
    assert fns.route is not None
    return jnp.where(known, uncontracted(jax.nn.softmax(fns.route(params, h)[2], axis=-1)), 0.0)


# ---- one visit -------------------------------------------------------------------------------------------------------


def _visit(
    form: Form,
    fixed: Fixed,
    live: Live,
    layer: jax.Array,
    decode: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    gates: jax.Array,
    seen_gates: jax.Array,
    ahead: jax.Array | None,
) -> tuple[Live, jax.Array, Record]:
    """Decides, copies and computes one layer's experts: also [T, D]."""
    cfg, horizon = form.cfg, form.setup.horizon
    seen = _seen(cfg, live, layer, decode, ids, seen_gates, ahead)
    state, decision = decide(form.setup, form.choices, fixed.numbers, fixed.traced, live.state, seen)
    demand = seen.count > 0
    here = decision.level > 0  # [L, E]
    if ids.shape[0] == 1:
        here = here.at[layer].max(demand)  # all of a token's experts are computed out of slots
    rows = jnp.mod(layer + jnp.arange(1 + horizon, dtype=jnp.int32), form.setup.layers)
    # the order of copies: this layer's by id, then the prefetched as they were asked for
    order = jnp.concatenate([jnp.arange(cfg.experts, dtype=jnp.int32)[None], cfg.experts + decision.prefetched])
    old = lax.dynamic_slice_in_dim(live.slot_of, layer * cfg.experts, cfg.experts)  # [E]
    owner, slot_of, copies = _settle(live, here, rows, order)
    live = live._replace(state=state, owner=owner, slot_of=slot_of, visit=live.visit + 1)
    if ids.shape[0] == 1:
        live = live._replace(slots=copy_all(fixed.host, live.slots, copies, jnp.int32(0)))
        mine = lax.dynamic_slice_in_dim(slot_of, layer * cfg.experts, cfg.experts)
        y = moe_experts.experts(cfg, h, ids, gates, moe_experts.slotted(live.slots, mine))
    else:
        live, y = _stream(cfg, fixed.host, live, layer, demand, old, h, ids, gates)
        live = live._replace(slots=copy_all(fixed.host, live.slots, copies, copies.own))
    return (
        live,
        y,
        Record(ids, seen_gates, ahead, None, decision, jnp.sum(owner >= 0, dtype=jnp.int32), jnp.asarray(True)),
    )


def _seen(
    cfg: MoEConfig,
    live: Live,
    layer: jax.Array,
    decode: jax.Array,
    ids: jax.Array,
    gates: jax.Array,
    ahead: jax.Array | None,
) -> Seen:
    """`keeper._columns` on the device."""
    tokens, top_k = ids.shape
    choice = jnp.arange(top_k, dtype=jnp.int32)
    larger = gates[:, None, :] > gates[:, :, None]  # [T, K, K]: the last one's gate is above the one's before
    equal = (gates[:, None, :] == gates[:, :, None]) & (choice[None, :] < choice[:, None])[None]
    place = jnp.sum(larger | equal, axis=-1, dtype=jnp.int32)  # in falling order
    place = place + top_k * jnp.arange(tokens, dtype=jnp.int32)[:, None]
    routed = ids[:, :, None] == jnp.arange(cfg.experts, dtype=jnp.int32)[None, None]  # [T, K, E]
    last = jnp.max(jnp.where(routed, place[:, :, None], -1), axis=(0, 1))
    count = jnp.sum(routed, axis=(0, 1), dtype=jnp.int32)
    before = (last[None, :] < last[:, None]) & (last >= 0)[None, :]
    return Seen(
        index=live.visit,
        layer=layer,
        pass_id=live.pass_id,
        tokens=jnp.int32(tokens),
        decode=decode.astype(jnp.int32),
        count=count,
        mass=_in_order(jnp.sum(jnp.where(routed, gates[:, :, None], 0.0), axis=1)),
        rank=jnp.where(count > 0, jnp.sum(before, axis=1, dtype=jnp.int32), -1),
        ahead=jnp.zeros(cfg.experts, jnp.float32) if ahead is None else _in_order(ahead),
    )


def _in_order(rows: jax.Array) -> jax.Array:
    """The sum of [T, E] over the tokens, one after the other, as the schedule has it."""
    if rows.shape[0] == 1:
        return rows[0]
    return lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(rows[0]), rows, unroll=16)[0]


class Copies(NamedTuple):
    """Experts on their way into slots, in order."""

    flat: jax.Array  # [(1 + H) E] int32
    slot: jax.Array  # [(1 + H) E] int32
    own: jax.Array  # how many are of the visited layer: these come first
    total: jax.Array


def _settle(live: Live, here: jax.Array, rows: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array, Copies]:
    """Gives up the slots of experts that are not to be ``here`` [L, E], and finds slots for those that come.

    Args:
        rows: [1 + H] layers whose experts may come, the visited one first. ``order``: [1 + H, E] in what order.
    Returns:
        `Live.owner`, `Live.slot_of`, and what to copy.
    """
    experts, slots = here.shape[1], live.owner.shape[0]
    here = here.reshape(-1)
    owner = jnp.where((live.owner >= 0) & here[jnp.maximum(live.owner, 0)], live.owner, -1)
    flat = (rows[:, None] * experts + jnp.arange(experts, dtype=jnp.int32)[None]).reshape(-1)
    new, order = here[flat] & (live.slot_of[flat] < 0), order.reshape(-1)
    size = flat.shape[0]
    rank = jnp.sum(new[None, :] & (order[None, :] < order[:, None]), axis=1, dtype=jnp.int32)
    free = jnp.cumsum(owner < 0, dtype=jnp.int32)  # [C - 1]
    # the slot of the r-th that comes is the r-th free one: as many slots come before it as have had r free ones or less
    slot = jnp.sum(free[None, :] <= jnp.arange(size, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    coming = jnp.zeros(size, jnp.int32).at[jnp.where(new, rank, size)].set(flat, mode="drop")
    owner = owner.at[jnp.where(new, slot[rank], slots)].set(flat, mode="drop")
    slot_of = jnp.where(here, live.slot_of, -1)
    slot_of = slot_of.at[jnp.where(new, flat, slot_of.shape[0])].set(slot[rank], mode="drop")
    return owner, slot_of, Copies(coming, slot, jnp.sum(new[:experts], dtype=jnp.int32), jnp.sum(new, dtype=jnp.int32))


def _fetch(host: Expert, flat: jax.Array) -> Expert:
    """One expert out of the host's stack, leaves [1, ...] on the device."""
    device = sharding(DEVICE)
    return jax.tree.map(lambda leaf: jax.device_put(lax.dynamic_slice_in_dim(leaf, flat, 1, 0), device), host)


def _put(slots: Expert, expert: Expert, slot: jax.Array) -> Expert:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, slot, 0), slots, expert)


def copy_all(host: Expert, slots: Expert, copies: Copies, first: jax.Array) -> Expert:
    """Copies all from number ``first`` on."""
    return lax.fori_loop(
        first, copies.total, lambda n, slots: _put(slots, _fetch(host, copies.flat[n]), copies.slot[n]), slots
    )


def _stream(
    cfg: MoEConfig,
    host: Expert,
    live: Live,
    layer: jax.Array,
    demand: jax.Array,
    old: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    gates: jax.Array,
) -> tuple[Live, jax.Array]:
    """The experts of many tokens: those in slots ``old`` [E] first, then each missing one as its copy arrives, while
    the next copy goes on. Those that stay are put into their slots, the others into the one that is nobody's."""
    h, ids, gates = lax.optimization_barrier((h, ids, gates))
    held, ids_of = demand & (old >= 0), jnp.arange(cfg.experts, dtype=jnp.int32)
    out = moe_experts.pair_outputs(cfg, h, ids, moe_experts.slotted(live.slots, old), held)
    missing = demand & ~held
    rank = jnp.cumsum(missing, dtype=jnp.int32) - 1
    wanted = jnp.zeros(cfg.experts, jnp.int32).at[jnp.where(missing, rank, cfg.experts)].set(ids_of, mode="drop")
    count = jnp.sum(missing, dtype=jnp.int32)
    mine = lax.dynamic_slice_in_dim(live.slot_of, layer * cfg.experts, cfg.experts)
    blocks = moe_experts.cut_blocks(cfg, ids)
    nobodys = live.owner.shape[0]

    def work(number: jax.Array, expert: Expert, slots: Expert, flat_out: jax.Array) -> tuple[Expert, jax.Array]:
        """Computes missing expert ``number`` and puts it away; -1: none."""
        at = wanted[jnp.maximum(number, 0)]
        size = jnp.where(number < 0, 0, blocks.end[at] - blocks.begin[at]).astype(jnp.int32)
        weights = jax.tree.map(lambda leaf: leaf[0], expert)
        flat_out = lax.fori_loop(
            jnp.int32(0),
            size,
            lambda block, out: moe_experts.run_block(cfg, blocks, h, at, block, weights, out),
            flat_out,
        )
        return _put(slots, expert, jnp.where((number < 0) | (mine[at] < 0), nobodys, mine[at])), flat_out

    def body(number: jax.Array, carry: tuple[Expert, Expert, jax.Array]) -> tuple[Expert, Expert, jax.Array]:
        expert, slots, flat_out = carry
        coming = _fetch(host, layer * cfg.experts + wanted[number])
        return (coming, *work(number - 1, expert, slots, flat_out))

    nothing = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), live.slots)
    carry = nothing, live.slots, out.reshape(-1, cfg.width)
    expert, slots, flat_out = lax.fori_loop(jnp.int32(0), count, body, carry)
    slots, flat_out = work(count - 1, expert, slots, flat_out)
    y = moe_experts.combine(flat_out.reshape(out.shape), ids, gates).astype(h.dtype)
    return live._replace(slots=slots), y
