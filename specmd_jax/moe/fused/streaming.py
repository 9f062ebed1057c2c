"""The experts of a visit as XLA operations: what the expert kernels do, for every device, and what they are compared
with.

A token's missing experts are copied first, then the prefetched ones, then all are computed out of their slots. Of
several tokens the experts on the device are computed first; each missing one is copied while the one before it is
computed. Copies are loops over what is missing, not a `lax.cond` each: compilers follow arrays in host memory into
loops only.

Loops do not know how an expert lies on the device: a `Shelf` does. This module has the one of slots; experts of several
precisions are `levels`' business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Blocks, Expert
from specmd_jax.moe.runtime.store import DEVICE, sharding


class Shelf(NamedTuple):
    """Where experts of one form are kept."""

    host: Any  # leaves [L * E, ...] in pinned host memory
    weights: Callable[[Any], Expert]  # leaves [1, ...] of the host's -> the expert
    put: Callable[[Any, Any, jax.Array], Any]  # (slots, leaves [1, ...], place) -> slots


class Copies(NamedTuple):
    """Experts on their way to their places, in order."""

    flat: jax.Array  # [n] int32
    place: jax.Array  # [n, ...] int32
    total: jax.Array  # how many of them count


def one_token(
    cfg: MoEConfig, layer: jax.Array, h: jax.Array, ids: jax.Array, placed: Placed, host: Expert, slots: Expert
) -> tuple[jax.Array, Expert]:
    """Gives the output of every choice [1, K, D] float32, and the slots with all that was copied."""
    h, ids = lax.optimization_barrier((h, ids))
    own = layer * cfg.experts + jnp.arange(cfg.experts, dtype=jnp.int32)
    slots = copy_all(slot_shelf(host), slots, compact(placed.missing > 0, own, placed.slot))
    slots = copy_all(slot_shelf(host), slots, in_front(placed.coming, placed.coming_slot))
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
    own = layer * cfg.experts + jnp.arange(cfg.experts, dtype=jnp.int32)
    coming = compact(missing, own, jnp.where(placed.slot < 0, placed.spare[0], placed.slot))
    out, slots = stream(cfg, layer, h, ids, coming, placed.spare[0], slot_shelf(host), slots, out)
    return out, copy_all(slot_shelf(host), slots, in_front(placed.coming, placed.coming_slot))


def stream(
    cfg: MoEConfig,
    layer: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    coming: Copies,
    nowhere: jax.Array,
    shelf: Shelf,
    slots: Any,
    out: jax.Array,
) -> tuple[jax.Array, Any]:
    """Computes experts of a layer as they come, each while the next one is copied, and puts them away.

    Args:
        h, ids: [T, D], and [T, K] int32; -1: no expert.
        nowhere: a place whose contents do not matter.
        out: [T, K, D] float32; the pairs of the experts that come are filled in.
    """
    blocks: Blocks = moe_experts.cut_blocks(cfg, jnp.where(ids >= 0, ids, cfg.experts))

    def work(number: jax.Array, expert: Any, slots: Any, flat_out: jax.Array) -> tuple[Any, jax.Array]:
        """Computes expert ``number`` of those that come and puts it away; -1: none."""
        at = coming.flat[jnp.maximum(number, 0)] - layer * cfg.experts
        size = jnp.where(number < 0, 0, blocks.end[at] - blocks.begin[at]).astype(jnp.int32)
        weights = shelf.weights(expert)
        flat_out = lax.fori_loop(
            jnp.int32(0),
            size,
            lambda block, out: moe_experts.run_block(cfg, blocks, h, at, block, weights, out),
            flat_out,
        )
        return shelf.put(slots, expert, jnp.where(number < 0, nowhere, coming.place[number])), flat_out

    def body(number: jax.Array, carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
        expert, slots, flat_out = carry
        following = _fetch(shelf, coming.flat[number])
        return (following, *work(number - 1, expert, slots, flat_out))

    nothing = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), shelf.host)
    carry = nothing, slots, out.reshape(-1, cfg.width)
    expert, slots, flat_out = lax.fori_loop(jnp.int32(0), coming.total, body, carry)
    slots, flat_out = work(coming.total - 1, expert, slots, flat_out)
    return flat_out.reshape(out.shape), slots


def copy_all(shelf: Shelf, slots: Any, copies: Copies) -> Any:
    """Copies experts out of the host's memory, one after the other."""
    if copies.flat.shape[0] == 0:
        return slots
    return lax.fori_loop(
        jnp.int32(0),
        copies.total,
        lambda n, slots: shelf.put(slots, _fetch(shelf, copies.flat[n]), copies.place[n]),
        slots,
    )


def in_front(flat: jax.Array, place: jax.Array) -> Copies:
    """Gives copies that stand in front of a list of flat ids; -1: none."""
    return Copies(flat, place, jnp.sum(flat >= 0, dtype=jnp.int32))


def compact(which: jax.Array, values: jax.Array, place: jax.Array) -> Copies:
    """Gives those that are meant, one behind the other."""
    size, rank = which.shape[0], jnp.cumsum(which, dtype=jnp.int32) - 1
    to = jnp.where(which, rank, size)

    def front(rows: jax.Array) -> jax.Array:
        return jnp.zeros(rows.shape, jnp.int32).at[to].set(rows, mode="drop")

    return Copies(front(values), front(place), jnp.sum(which, dtype=jnp.int32))


def _fetch(shelf: Shelf, flat: jax.Array) -> Any:
    """Copies one expert out of the host's memory, leaves [1, ...] on the device."""
    device = sharding(DEVICE)
    return jax.tree.map(lambda leaf: jax.device_put(lax.dynamic_slice_in_dim(leaf, flat, 1, 0), device), shelf.host)


def slot_shelf(host: Expert) -> Shelf:
    """Gives the shelf of experts that are one array per matrix, each in a slot."""

    def put(slots: Expert, expert: Expert, slot: jax.Array) -> Expert:
        return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, slot, 0), slots, expert)

    return Shelf(host, lambda expert: jax.tree.map(lambda leaf: leaf[0], expert), put)
