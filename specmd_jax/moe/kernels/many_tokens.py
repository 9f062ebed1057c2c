"""Several tokens through their experts as grouped products: those on the device out of their slots, the missing ones
out of the host's memory, put into their slots and multiplied block by block as they arrive.

A program takes a block of rows of one expert's matrix and multiplies it by all of the expert's tokens, a block of them
at a time. Rows of a missing expert it copies first, in whole lines, into the slot, where all tokens find them: so an
expert that does not stay needs a slot, too, while it passes through. Wherever an expert was, it is computed by the same
instructions in the same order, and a token's output does not depend on it.

Shapes: N tokens, K experts each, E experts per layer; a *pair* is one of the N * K (token, choice).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.moe.kernels import blocks
from specmd_jax.moe.kernels.blocks import Block, Cut
from specmd_jax.moe.kernels.launch import Shape, fit, is_encoded
from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert, activation, block_rows
from specmd_jax.moe.model.quant import Leaf

NOTHING, HELD, MISSING, COPY = range(4)
"""What is done for an expert: nothing; its tokens are computed out of its slot; they are computed out of the host's
memory, which fills the slot; it is copied into its slot."""

LEAST, MOST_ROWS = 16, 64
"""Matrix units take no fewer rows or columns; a program multiplies at most so many tokens at a time."""

PLAIN, ENCODED = Shape(64, 64, 4, 2), Shape(64, 32, 4, 2)


class Pairs(NamedTuple):
    """A pass's pairs by expert: those of expert e are order[first[e]], ... , size[e] of them."""

    order: jax.Array  # [N * K] int32 pairs by rising expert, those without one last
    first: jax.Array  # [E] int32
    size: jax.Array  # [E] int32


class Chosen(NamedTuple):
    """What one launch works on, one entry for an expert."""

    expert: jax.Array  # [n] int32 within the layer: whose pairs are computed
    flat: jax.Array  # [n] int32 its row in the host's stack
    slot: jax.Array  # [n] int32
    what: jax.Array  # [n] int32, a constant of this module


class _Given(NamedTuple):
    """What a launch only reads."""

    chosen: Chosen
    pairs: Pairs
    rows: Any  # [N or N * K, in]: what the matrices are multiplied by
    host: Any  # (matrix, bias) of all experts


def choose_shape(leaf: Leaf) -> Shape:
    """Gives the default shape of a launch over matrices of a form."""
    return ENCODED if is_encoded(leaf) else PLAIN


def serves(cfg: MoEConfig, expert: Expert) -> str | None:
    """Gives None, or the reason why experts of this form (arrays or shapes) cannot be computed."""
    for outputs in (cfg.expert_width, cfg.width):
        if outputs % LEAST:
            return f"matrices of {outputs} rows, expected a multiple of {LEAST}"
    for leaf in (expert.gate_up, expert.down):
        reason = blocks.serves(leaf)
        if reason:
            return reason
    return None


def sort_pairs(experts: int, ids: jax.Array) -> Pairs:
    """Sorts the pairs of ``ids`` [N, K] by expert; -1: no expert."""
    flat = jnp.where(ids >= 0, ids, experts).reshape(-1)
    size = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)
    return Pairs(jnp.argsort(flat, stable=True).astype(jnp.int32), jnp.cumsum(size) - size, size)


def visit_experts(
    cfg: MoEConfig,
    layer: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    placed: Placed,
    host: Expert,
    slots: Expert,
    *,
    interpret: bool = False,
    shapes: tuple[Shape | None, Shape | None] = (None, None),
) -> tuple[jax.Array, Expert]:
    """Computes a visit's experts, fills the slots of those that are missing, and copies those to prefetch.

    First come the experts that are held, as one of them may give its slot up; then the missing ones that stay, with the
    copies to prefetch; then those that do not stay, as many at a time as there are spare slots.

    Args:
        layer: [1] int32 of the L layers.
        h: [N, D] normed hidden states.
        ids: [N, K] int32, -1: nothing is computed.
        placed: as `placed` has it for passes of several tokens.
        host: leaves [L * E, ...] in pinned host memory (or on the device).
        slots: leaves [C + S, ...], written in place.
        shapes: of the two launches over an expert's matrices.
    Returns:
        The output of every pair, not yet weighted, [N, K, D] float32 (0 where there is no expert), and the slots.
    """
    experts = jnp.arange(cfg.experts, dtype=jnp.int32)
    flat, missing, stays = layer * cfg.experts + experts, placed.missing > 0, placed.slot >= 0
    pairs, out = sort_pairs(cfg.experts, ids), jnp.zeros((ids.size, cfg.width), jnp.float32)

    def run(chosen: Chosen, slots: Expert, out: jax.Array) -> tuple[Expert, jax.Array]:
        return compute(cfg, h, pairs, chosen, host, slots, out, ids.shape[1], interpret, shapes)

    held = Chosen(experts, flat, placed.slot, jnp.where(stays & ~missing, HELD, NOTHING))
    slots, out = run(held, slots, out)
    comes = Chosen(experts, flat, placed.slot, jnp.where(missing & stays, MISSING, NOTHING))
    if placed.coming.shape[0]:
        what = jnp.where(placed.coming >= 0, COPY, NOTHING)
        ahead = Chosen(jnp.zeros_like(what), placed.coming, placed.coming_slot, what)
        comes = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), comes, ahead)
    slots, out = run(comes, slots, out)

    passing, width = missing & ~stays, placed.spare.shape[0]
    count = jnp.sum(passing, dtype=jnp.int32)
    place = jnp.where(passing, jnp.cumsum(passing, dtype=jnp.int32) - 1, cfg.experts)
    listed = jnp.zeros(-(-cfg.experts // width) * width, jnp.int32).at[place].set(experts, mode="drop")

    def group(number: jax.Array, carry: tuple[Expert, jax.Array]) -> tuple[Expert, jax.Array]:
        mine = lax.dynamic_slice_in_dim(listed, number * width, width)
        real = number * width + jnp.arange(width, dtype=jnp.int32) < count
        chosen = Chosen(mine, layer * cfg.experts + mine, placed.spare, jnp.where(real, MISSING, NOTHING))
        return run(chosen, *carry)

    slots, out = lax.fori_loop(jnp.int32(0), (count + width - 1) // width, group, (slots, out))
    return out.reshape(*ids.shape, cfg.width), slots


def compute(
    cfg: MoEConfig,
    h: jax.Array,
    pairs: Pairs,
    chosen: Chosen,
    host: Expert,
    slots: Expert,
    out: jax.Array,
    top_k: int,
    interpret: bool = False,
    shapes: tuple[Shape | None, Shape | None] = (None, None),
) -> tuple[Expert, jax.Array]:
    """Does what is chosen: the slots, and ``out`` [N * K, D] float32 with the outputs of the experts' pairs."""
    first = fit(shapes[0] or choose_shape(host.gate_up), cfg.expert_width)
    second = fit(shapes[1] or choose_shape(host.down), cfg.width)
    at_once = max(LEAST, min(block_rows(cfg, h.shape[0], top_k), MOST_ROWS))
    hidden = jnp.zeros((out.shape[0], cfg.expert_width), h.dtype)

    def gate_up(sums: list[jax.Array]) -> jax.Array:
        return activation(cfg, *sums)

    def down(sums: list[jax.Array]) -> jax.Array:
        return sums[0]

    kept, hidden = _launch(
        "experts_gate_up", _Given(chosen, pairs, blocks.arrange(host.gate_up, h), (host.gate_up, host.gate_up_bias)),
        (slots.gate_up, slots.gate_up_bias), hidden, _Tokens(top_k, at_once, True, blocks.cut(host.down, 1)),
        (0, cfg.expert_width), gate_up, first, interpret,
    )  # fmt: skip
    kept_down, out = _launch(
        "experts_down", _Given(chosen, pairs, hidden, (host.down, host.down_bias)),
        (slots.down, slots.down_bias), out, _Tokens(top_k, at_once, False, None), (0,), down, second, interpret,
    )  # fmt: skip
    return Expert(kept[0], kept_down[0], kept[1], kept_down[1]), out


class _Tokens(NamedTuple):
    """How a launch finds the rows that it multiplies, and puts its results."""

    top_k: int
    at_once: int  # rows at a time
    gathers: bool  # reads a pair's token, and writes in the order of the experts; else the other way round
    along: Cut | None  # has the places of a result's columns; None: in order


def _launch(
    name: str,
    given: _Given,
    slots: tuple[Leaf, Any],
    out: jax.Array,
    tokens: _Tokens,
    starts: tuple[int, ...],
    finish: Callable[[list[jax.Array]], jax.Array],
    own: Shape,
    interpret: bool,
) -> tuple[tuple[Leaf, Any], jax.Array]:
    """Computes ``finish`` of the products of an expert's rows from each of ``starts`` on, into ``out``."""
    read, kept = len(jax.tree.leaves(given)), (slots, out)

    def program(given: _Given, _: Any, kept: tuple[tuple[Leaf, Any], Any]) -> None:
        entry, block = pl.program_id(0), pl.program_id(1)
        first = block * own.rows
        work = _Work(given, *kept, tokens, tuple(start + first for start in starts), own, interpret)
        what = given.chosen.what[entry]

        @pl.when(what == COPY)
        def _() -> None:
            work.copy(entry)

        @pl.when((what == HELD) | (what == MISSING))
        def _() -> None:
            work.compute(entry, what == MISSING, lambda sums: finish(sums).astype(out.dtype), first)

    return pl.pallas_call(
        program,
        grid=(given.chosen.what.shape[0], out.shape[1] // own.rows),
        out_shape=(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), kept),),
        input_output_aliases={read + place: place for place in range(len(jax.tree.leaves(kept)))},
        compiler_params=own.compiler_params,
        interpret=interpret,
        name=name,
    )(given, kept)[0]


class _Work:
    """What a program does for one expert: its rows from each of ``starts`` on, inside the kernel."""

    def __init__(
        self,
        given: _Given,
        slots: tuple[Leaf, Any],
        out: Any,
        tokens: _Tokens,
        starts: tuple[Any, ...],
        own: Shape,
        interpret: bool,
    ) -> None:
        self.given, self.out, self.tokens, self.starts, self.rows = given, out, tokens, starts, own.rows
        self.slots, self.bias = slots
        self.cut: Cut = blocks.cut(self.slots, own.codes)
        self.interpret = interpret
        self.order: Any = given.pairs.order

    def copy(self, entry: Any) -> None:
        """Copies these rows into the slot."""
        flat, slot = self.given.chosen.flat[entry], self.given.chosen.slot[entry]
        for start in self.starts:
            blocks.copy(self.given.host, (self.slots, self.bias), flat, slot, start, self.rows)

    def compute(self, entry: Any, missing: Any, finish: Callable[..., jax.Array], first_output: Any) -> None:
        """Multiplies these rows by all tokens of the expert; those of a missing one are put into its slot first."""
        chosen, pairs, order_ref = self.given.chosen, self.given.pairs, self.order
        expert, slot = chosen.expert[entry], chosen.slot[entry]
        first, size, many = pairs.first[expert], pairs.size[expert], self.tokens.at_once

        def tile(number: Any, _: None) -> None:
            row = number * many + jnp.arange(many, dtype=jnp.int32)
            mask = row < size
            pair = triton.load(order_ref.at[first + row], mask=mask, other=0)
            read, put = (pair // self.tokens.top_k, first + row) if self.tokens.gathers else (first + row, pair)
            made = finish(self._products(jnp.where(mask, read, 0), mask, slot))
            wide = made.shape
            put = jnp.where(mask, put, self.out.shape[0])  # outside: interpreted, a masked lane writes what was there
            column = first_output + jnp.arange(self.rows, dtype=jnp.int32)
            column = column if self.tokens.along is None else blocks.place(self.tokens.along, column)
            column = jnp.broadcast_to(column[None, :], wide)
            down = jnp.broadcast_to(put[:, None], wide)
            triton.store(self.out.at[down, column], made, mask=jnp.broadcast_to(mask[:, None], wide))

        @pl.when(missing)
        def _() -> None:
            self.copy(entry)
            if not self.interpret:
                triton.debug_barrier()  # what one thread has copied, another reads

        lax.fori_loop(0, (size + many - 1) // many, tile, None)

    def _products(self, read: jax.Array, mask: jax.Array, slot: Any) -> list[jax.Array]:
        """Multiplies rows ``read`` by an expert's rows in ``slot``: [rows read, rows] float32 for each start."""

        def add(number: Any, sums: list[jax.Array], found: list[Block]) -> list[jax.Array]:
            weights = [blocks.decoded(self.slots, self.cut, block) for block in found]
            for plane in range(len(self.cut.offsets)):
                values = self._entries(read, mask, number, plane)
                for place, planes in enumerate(weights):
                    sums[place] = sums[place] + _dot(values, planes[plane].astype(values.dtype))
            return sums

        def step(number: jax.Array, carry: Any) -> Any:
            sums, found = carry
            following = self._fetch(slot, number + 1)  # on its way while the present one is multiplied
            return add(number, list(sums), found), following

        sums = [jnp.zeros((read.shape[0], self.rows), jnp.float32) for _ in self.starts]
        found = self._fetch(slot, 0)
        if self.cut.blocks > 1:
            sums, found = lax.fori_loop(0, self.cut.blocks - 1, step, (sums, found))
        sums = add(self.cut.blocks - 1, list(sums), found)
        if self.bias is None:
            return sums
        biases = (self.bias[slot, pl.ds(start, self.rows)] for start in self.starts)
        return [total + bias.astype(jnp.float32)[None, :] for total, bias in zip(sums, biases, strict=True)]

    def _entries(self, read: jax.Array, mask: jax.Array, number: Any, plane: int) -> jax.Array:
        """Loads what a plane of block ``number`` is multiplied by, [rows read, codes]."""
        own, wide = self.cut, (read.shape[0], self.cut.codes)
        code = number * own.codes + jnp.arange(own.codes, dtype=jnp.int32)
        column = jnp.broadcast_to((plane * own.columns + code)[None, :], wide)
        real = jnp.broadcast_to(mask[:, None], wide)
        if not own.whole:
            real = real & (code < own.columns)[None, :]
        return triton.load(self.given.rows.at[jnp.broadcast_to(read[:, None], wide), column], mask=real, other=0)

    def _fetch(self, slot: Any, number: Any) -> list[Block]:
        return [blocks.load(self.slots, self.cut, slot, start, self.rows, number) for start in self.starts]


def _dot(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Gives values @ weights.T, [rows read, rows] float32, with full products of what is float32."""
    precision = lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(values, weights, contract, precision=precision, preferred_element_type=jnp.float32)
