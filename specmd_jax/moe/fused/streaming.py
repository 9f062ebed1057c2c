"""The experts of a visit as XLA operations: what the expert kernels do, for every device, and what they are compared
with.

A token's missing experts are copied first, then the prefetched ones, then all are computed out of their slots. Of
several tokens the experts on the device are computed first; each missing one is copied while the one before it is
computed. Copies are loops over what is missing, not a `lax.cond` each: compilers follow arrays in host memory into
loops only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.runtime.store import DEVICE, sharding


class Copies(NamedTuple):
    """Experts on their way into slots, in order."""

    flat: jax.Array  # [n] int32
    slot: jax.Array  # [n] int32
    total: jax.Array  # how many of them count


def one_token(
    cfg: MoEConfig, layer: jax.Array, h: jax.Array, ids: jax.Array, placed: Placed, host: Expert, slots: Expert
) -> tuple[jax.Array, Expert]:
    """Gives the output of every choice [1, K, D] float32, and the slots with all that was copied."""
    h, ids = lax.optimization_barrier((h, ids))
    experts = jnp.arange(cfg.experts, dtype=jnp.int32)
    own = _compact(placed.missing > 0, layer * cfg.experts + experts, placed.slot)
    slots = copy_all(host, slots, own)
    slots = copy_all(host, slots, _ahead(placed))
    return moe_experts.pair_outputs(cfg, h, ids, moe_experts.slotted(slots, placed.slot)), slots


def many_tokens(
    cfg: MoEConfig, layer: jax.Array, h: jax.Array, ids: jax.Array, placed: Placed, host: Expert, slots: Expert
) -> tuple[jax.Array, Expert]:
    """Gives the output of every (token, choice) pair [T, K, D] float32, and the slots with all that was copied.
    Experts that pass through end in a spare slot."""
    h, ids = lax.optimization_barrier((h, ids))
    missing = placed.missing > 0
    held = (placed.slot >= 0) & ~missing
    out = moe_experts.pair_outputs(cfg, h, ids, moe_experts.slotted(slots, placed.slot), held)
    experts = jnp.arange(cfg.experts, dtype=jnp.int32)
    coming = _compact(missing, experts, jnp.where(placed.slot < 0, placed.spare[0], placed.slot))
    blocks = moe_experts.cut_blocks(cfg, jnp.where(ids >= 0, ids, cfg.experts))

    def work(number: jax.Array, expert: Expert, slots: Expert, flat_out: jax.Array) -> tuple[Expert, jax.Array]:
        """Computes missing expert ``number`` and puts it away; -1: none."""
        at = coming.flat[jnp.maximum(number, 0)]
        size = jnp.where(number < 0, 0, blocks.end[at] - blocks.begin[at]).astype(jnp.int32)
        weights = jax.tree.map(lambda leaf: leaf[0], expert)
        flat_out = lax.fori_loop(
            jnp.int32(0),
            size,
            lambda block, out: moe_experts.run_block(cfg, blocks, h, at, block, weights, out),
            flat_out,
        )
        return _put(slots, expert, jnp.where(number < 0, placed.spare[0], coming.slot[number])), flat_out

    def body(number: jax.Array, carry: tuple[Expert, Expert, jax.Array]) -> tuple[Expert, Expert, jax.Array]:
        expert, slots, flat_out = carry
        following = _fetch(host, layer * cfg.experts + coming.flat[number])
        return (following, *work(number - 1, expert, slots, flat_out))

    nothing = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), slots)
    carry = nothing, slots, out.reshape(-1, cfg.width)
    expert, slots, flat_out = lax.fori_loop(jnp.int32(0), coming.total, body, carry)
    slots, flat_out = work(coming.total - 1, expert, slots, flat_out)
    return flat_out.reshape(out.shape), copy_all(host, slots, _ahead(placed))


def copy_all(host: Expert, slots: Expert, copies: Copies) -> Expert:
    """Copies experts out of the host's stack, one after the other."""
    if copies.flat.shape[0] == 0:
        return slots
    return lax.fori_loop(
        jnp.int32(0),
        copies.total,
        lambda n, slots: _put(slots, _fetch(host, copies.flat[n]), copies.slot[n]),
        slots,
    )


def _ahead(placed: Placed) -> Copies:
    return Copies(placed.coming, placed.coming_slot, jnp.sum(placed.coming >= 0, dtype=jnp.int32))


def _compact(which: jax.Array, values: jax.Array, slot: jax.Array) -> Copies:
    """Gives those that are meant, one behind the other."""
    size, rank = which.shape[0], jnp.cumsum(which, dtype=jnp.int32) - 1
    place, none = jnp.where(which, rank, size), jnp.zeros(size, jnp.int32)
    return Copies(
        none.at[place].set(values, mode="drop"), none.at[place].set(slot, mode="drop"), jnp.sum(which, dtype=jnp.int32)
    )


def _fetch(host: Expert, flat: jax.Array) -> Expert:
    """Copies one expert out of the host's stack, leaves [1, ...] on the device."""
    device = sharding(DEVICE)
    return jax.tree.map(lambda leaf: jax.device_put(lax.dynamic_slice_in_dim(leaf, flat, 1, 0), device), host)


def _put(slots: Expert, expert: Expert, slot: jax.Array) -> Expert:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, slot, 0), slots, expert)
