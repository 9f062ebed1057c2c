"""The routed experts: their weights, how they are looked up, and what they compute.

The weights live outside the model's parameters. An `Expert` holds one expert; the same structure with a leading axis
is a *stack*: of all E experts of a layer, or of C slots. A *lookup* maps an expert id to its weights, so the
same computation runs on either::

    experts(cfg, h, ids, gates, stacked(stack))            # all resident
    experts(cfg, h, ids, gates, slotted(slots, slot_of))   # C slots and an index [E] -> slot

Both give the same bits: an expert sees the same rows at the same places of a block, outputs are kept apart for every
(token, choice) and added in the order of the choices; barriers at the seams keep a compiler from simplifying across
them, and `uncontracted` products round the same wherever they are fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.model import quant
from specmd_jax.moe.model.config import MoEConfig


class Expert(NamedTuple):
    """Weights of one expert; with a leading axis, a stack of them. ``gate_up`` has the rows of the gate first."""

    gate_up: quant.Leaf  # [2 F, D]
    down: quant.Leaf  # [D, F]
    gate_up_bias: Any = None  # [2 F]
    down_bias: Any = None  # [D]


Lookup = Callable[[jax.Array], Expert]


def expert_spec(cfg: MoEConfig, precision: str | None = None, group: int | None = None) -> Expert:
    """Gives shapes and types of one expert at a precision (None: the model's own); see `quant.matrix_spec`."""
    precision = precision or cfg.dtype
    bias = (lambda n: jax.ShapeDtypeStruct((n,), cfg.np_dtype)) if cfg.expert_bias else (lambda n: None)
    return Expert(
        gate_up=quant.matrix_spec(2 * cfg.expert_width, cfg.width, precision, group),
        down=quant.matrix_spec(cfg.width, cfg.expert_width, precision, group),
        gate_up_bias=bias(2 * cfg.expert_width),
        down_bias=bias(cfg.width),
    )


def expert_bytes(cfg: MoEConfig, precision: str | None = None, group: int | None = None) -> int:
    """Gives the exact bytes of one expert, scales and biases included."""
    return quant.tree_bytes(expert_spec(cfg, precision, group))


def stacked(stack: Expert) -> Lookup:
    """Gives the lookup in the stack of all experts of a layer: leaves [E, ...]."""
    return lambda expert: jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, 0, keepdims=False), stack)


def slotted(slots: Expert, slot_of: jax.Array) -> Lookup:
    """Gives the lookup in slots [C, ...] by the index ``slot_of`` [E] int32; the expert must be there."""
    at_slot = stacked(slots)
    return lambda expert: at_slot(lax.dynamic_index_in_dim(slot_of, expert, 0, keepdims=False))


def apply(cfg: MoEConfig, expert: Expert, h: jax.Array) -> jax.Array:
    """Computes one expert on rows ``h`` [n, D] -> [n, D] float32 (products and activation in float32)."""
    hidden = quant.matmul(h, expert.gate_up)
    if expert.gate_up_bias is not None:
        hidden = hidden + expert.gate_up_bias.astype(jnp.float32)[None, :]
    gate, up = jnp.split(hidden, 2, axis=-1)
    y = quant.matmul(activation(cfg, gate, up).astype(h.dtype), expert.down)
    return y if expert.down_bias is None else y + expert.down_bias.astype(jnp.float32)[None, :]


def activation(cfg: MoEConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """SwiGLU; `clamped_swiglu` (gpt-oss) limits both sides, sharpens the sigmoid and adds 1 to the linear side."""
    if cfg.activation == "clamped_swiglu":
        gate = jnp.minimum(gate, cfg.swiglu_limit)
        up = jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(cfg.swiglu_alpha * gate)
    return jax.nn.silu(gate) * up


def experts(cfg: MoEConfig, h: jax.Array, ids: jax.Array, gates: jax.Array, lookup: Lookup) -> jax.Array:
    """Computes the routed part of a layer: sum over k of ``gates[:, k] * expert(ids[:, k])(h)``, [N, D] in ``h.dtype``.

    Args:
        h: [N, D] normed hidden states.
        ids: [N, K] int32; -1: no expert (dropped, or a padding token).
        gates: [N, K] float32.
        lookup: expert id -> weights; asked only for ids that occur.
    """
    h, ids, gates = lax.optimization_barrier((h, ids, gates))
    return combine(pair_outputs(cfg, h, ids, lookup), ids, gates).astype(h.dtype)


def pair_outputs(
    cfg: MoEConfig,
    h: jax.Array,
    ids: jax.Array,
    lookup: Lookup,
    chosen: jax.Array | None = None,
    out: jax.Array | None = None,
) -> jax.Array:
    """Gives the output of every (token, choice) pair, not yet weighted: [N, K, D] float32.

    One token runs its K experts as K matrix-vector products. More tokens are sorted by expert and cut into blocks of
    `block_rows` rows, by rising expert id; each block is one matrix product, and only blocks that hold a token run.

    Args:
        chosen: [E] bool, the experts to run now (the others' pairs keep the value of ``out``), for callers that bring
            the experts in by parts; the result does not depend on how they are parted. None: all.
        out: [N, K, D] float32, what earlier parts computed; None: zeros.
    """
    tokens, top_k = ids.shape
    out = jnp.zeros((tokens, top_k, cfg.width), jnp.float32) if out is None else out
    wanted = ids >= 0
    if chosen is not None:
        wanted = wanted & chosen[jnp.maximum(ids, 0)]
    if tokens == 1:
        rows = [apply(cfg, lookup(jnp.maximum(ids[0, k], 0)), h)[0] for k in range(top_k)]
        return lax.optimization_barrier(jnp.where(wanted[:, :, None], jnp.stack(rows)[None], out))
    return _blocked(cfg, h, jnp.where(wanted, ids, cfg.experts), lookup, out)


def block_rows(cfg: MoEConfig, tokens: int, top_k: int) -> int:
    """Gives the rows of a block: about twice the mean number of tokens of an expert, a power of two within 8..128."""
    mean = -(-tokens * top_k // cfg.experts)
    return min(max(1 << (2 * mean - 1).bit_length(), 8), 128)


def _blocked(cfg: MoEConfig, h: jax.Array, ids: jax.Array, lookup: Lookup, out: jax.Array) -> jax.Array:
    """Gives `pair_outputs` for many tokens; ``ids`` [N, K] with E for pairs to leave alone."""
    blocks = cut_blocks(cfg, ids)

    def run(block: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(blocks.end, block, side="right").astype(jnp.int32)
        return run_block(cfg, blocks, h, expert, block - blocks.begin[expert], lookup(expert), out)

    flat = out.reshape(-1, cfg.width)
    return lax.fori_loop(jnp.int32(0), blocks.end[-1].astype(jnp.int32), run, flat).reshape(out.shape)


class Blocks(NamedTuple):
    """(token, choice) pairs of a pass by expert, cut into blocks of rows: expert e has begin[e]..end[e] - 1."""

    order: jax.Array  # [N * K] pairs by rising expert
    pairs: jax.Array  # [E] how many
    first_pair: jax.Array  # [E] index into `order`
    begin: jax.Array  # [E]
    end: jax.Array  # [E]


def cut_blocks(cfg: MoEConfig, ids: jax.Array) -> Blocks:
    """Gives blocks of `block_rows` rows of ``ids`` [N, K], with E for pairs to leave alone."""
    rows, flat = block_rows(cfg, *ids.shape), ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    count = jnp.zeros(cfg.experts + 1, jnp.int32).at[flat].add(1)[: cfg.experts]
    blocks = (count + (rows - 1)) // rows
    end = jnp.cumsum(blocks)
    return Blocks(order, count, jnp.cumsum(count) - count, end - blocks, end)


def run_block(
    cfg: MoEConfig, blocks: Blocks, h: jax.Array, expert: jax.Array, number: jax.Array, weights: Expert, out: jax.Array
) -> jax.Array:
    """Writes block ``number`` (from 0) of an expert to ``out`` [N * K, D] float32."""
    pairs = out.shape[0]
    top_k = pairs // h.shape[0]
    rows = block_rows(cfg, h.shape[0], top_k)
    offset = number * rows + jnp.arange(rows, dtype=jnp.int32)
    pair = blocks.order[jnp.minimum(blocks.first_pair[expert] + offset, pairs - 1)]
    y = apply(cfg, weights, h[pair // top_k])
    target = jnp.where(offset < blocks.pairs[expert], pair, pairs)  # past the expert's last pair: dropped
    return out.at[target].set(y, mode="drop")


def combine(out: jax.Array, ids: jax.Array, gates: jax.Array) -> jax.Array:
    """Gives the weighted sum over the choices, added in their order: [N, K, D], [N, K], [N, K] -> [N, D] float32."""
    out, ids, gates = lax.optimization_barrier((out, ids, gates))
    weighted = jnp.where(ids[:, :, None] >= 0, uncontracted(gates[:, :, None] * out), 0.0)
    total = weighted[:, 0]
    for k in range(1, ids.shape[1]):
        total = total + weighted[:, k]
    return lax.optimization_barrier(total)


def uncontracted(product: jax.Array) -> jax.Array:
    """Gives a float32 product that is rounded before anything is added to it.

    Compilers turn a product and a later addition into one multiply-add, with one rounding, when both end up in the
    same kernel (and XLA on CPU fuses across `optimization_barrier`). Giving up the last bit of the product makes the
    rounding explicit, so the sum has the same bits in every program.
    """
    return lax.reduce_precision(product, exponent_bits=8, mantissa_bits=22)
