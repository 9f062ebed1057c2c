"""One visit inside a program: the simulator's step, slots given up and taken (`settle`), copies, experts.

Copies are loops over what is missing, not a `lax.cond` each: compilers follow arrays in host memory into loops only.

Shapes: T tokens of the pass (one sequence), K experts per token, L routed layers of E experts, C slots, H the
prefetching horizon.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.fused.arrays import Fixed, Form, Live, Record
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.runtime.decider import Seen, decide
from specmd_jax.moe.runtime.store import DEVICE, sharding


def visit(
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
    state, decision = decide(form.setup, fixed.numbers, fixed.traced, live.state, seen)
    demand = seen.count > 0
    here = decision.level > 0  # [L, E]
    if ids.shape[0] == 1:
        here = here.at[layer].max(demand)  # all of a token's experts are computed out of slots
    rows = jnp.mod(layer + jnp.arange(1 + horizon, dtype=jnp.int32), form.setup.layers)
    # the order of copies: this layer's by id, then the prefetched as they were asked for
    order = jnp.concatenate([jnp.arange(cfg.experts, dtype=jnp.int32)[None], cfg.experts + decision.prefetched])
    old = lax.dynamic_slice_in_dim(live.slot_of, layer * cfg.experts, cfg.experts)  # [E]
    owner, slot_of, copies = settle(live, here, rows, order)
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
    """Gives `decider.columns` on the device."""
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
    """Gives the sum of [T, E] over the tokens, one after the other, as the schedule has it."""
    if rows.shape[0] == 1:
        return rows[0]
    return lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(rows[0]), rows, unroll=16)[0]


class Copies(NamedTuple):
    """Experts on their way into slots, in order."""

    flat: jax.Array  # [(1 + H) E] int32
    slot: jax.Array  # [(1 + H) E] int32
    own: jax.Array  # how many are of the visited layer: these come first
    total: jax.Array


def settle(live: Live, here: jax.Array, rows: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array, Copies]:
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
    """Copies one expert out of the host's stack, leaves [1, ...] on the device."""
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
