"""Several tokens through their experts as grouped products: those on the device out of their slots, the missing ones
out of the host's memory, multiplied as they arrive and put into their slots on the way.

A program takes a block of rows of one expert's matrix and multiplies it by all of the expert's tokens, a block of them
at a time. It reads its weights from the host once, with the first block, and keeps them in the slot, where the other
blocks find them. So an expert that does not stay needs a slot, too, while it passes through: each spare slot is the
lane of some of them, and the programs of a lane take them one after the other, each at its own speed. Whatever is read
comes by the same instructions in the same order, so that an output does not depend on where its expert was.

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
from specmd_jax.moe.kernels.blocks import Block
from specmd_jax.moe.kernels.launch import Shape, fit
from specmd_jax.moe.kernels.placed import Placed
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert, activation, block_rows
from specmd_jax.moe.model.quant import Leaf

HELD, MISSING, COPY = range(3)
"""What is done for an expert: its pairs are computed out of its slot; they are computed out of the host's memory, which
fills the slot; it is only copied into the slot."""

LEAST, MOST_TOKENS = 16, 64
"""Matrix units take no fewer rows or columns; a program multiplies at most so many tokens at a time."""

PLAIN, ENCODED = Shape(64, 64, 4, 2), Shape(32, 256, 8, 2)


class Pairs(NamedTuple):
    """A pass's pairs by expert: those of expert e are order[first[e]] and the size[e] - 1 that follow."""

    order: jax.Array  # [N * K] int32 pairs by rising expert, those without one last
    first: jax.Array  # [E] int32
    size: jax.Array  # [E] int32


class Chosen(NamedTuple):
    """What one launch does: its lane g does the entries begin[g] .. end[g] - 1, one after the other.

    Lanes start in their order and go on side by side. No two may use one slot.
    """

    begin: jax.Array  # [lanes] int32
    end: jax.Array  # [lanes] int32
    expert: jax.Array  # [n] int32 within the layer: whose pairs are computed
    flat: jax.Array  # [n] int32 its row in the host's stack
    slot: jax.Array  # [n] int32
    what: jax.Array  # [n] int32, a constant of this module


class _Given(NamedTuple):
    """What a launch only reads."""

    chosen: Chosen
    pairs: Pairs
    rows: Any  # [N or N * K, in]: what the matrices are multiplied by, its planes side by side (`blocks.by_plane`)
    host: Any  # (matrix, bias) of all experts


def choose_shape(leaf: Leaf) -> Shape:
    """Gives the default shape of a launch over matrices of a form."""
    return ENCODED if blocks.cut(leaf, LEAST).group else PLAIN


def serves(cfg: MoEConfig, expert: Expert) -> str | None:
    """Gives None, or the reason why experts of this form (arrays or shapes) cannot be computed."""
    for outputs in (cfg.expert_width, cfg.width):
        if outputs % LEAST:
            return f"matrices of {outputs} rows, expected a multiple of {LEAST}"
    for leaf in (expert.gate_up, expert.down):
        reason, columns = blocks.serves(leaf), blocks.cut(leaf, LEAST).columns
        if reason is None and columns < LEAST:
            reason = f"matrices of {columns} codes in a row, expected at least {LEAST}"
        if reason:
            return reason
    return None


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
    at_once: int | None = None,
) -> tuple[jax.Array, Expert]:
    """Computes a visit's experts, fills the slots of those that are missing, and copies those to prefetch.

    The experts that are held come first, as one of them may give its slot up; then all that has to be copied.

    Args:
        layer: [1] int32.
        h: [N, D] normed hidden states.
        ids: [N, K] int32, -1: nothing is computed.
        placed: by the rules of passes of several tokens, one spare slot at least if an expert passes through.
        host: leaves [L * E, ...] in pinned host memory (or on the device).
        slots: leaves [C + S, ...], written in place.
        shapes: of the launches over each of an expert's two matrices.
        at_once: how many tokens a program multiplies at a time, a power of two.
    Returns:
        The output of every pair, not yet weighted, [N, K, D] float32 (0 where there is no expert), and the slots.
    """
    pairs, out = sort_pairs(cfg.experts, ids), jnp.zeros((ids.size, cfg.width), jnp.float32)
    for chosen in (choose_held(layer, placed), choose_coming(layer, placed)):
        out, slots = experts(
            cfg, h, pairs, chosen, host, slots, out, interpret=interpret, shapes=shapes, at_once=at_once
        )
    return out.reshape(*ids.shape, cfg.width), slots


def sort_pairs(experts: int, ids: jax.Array) -> Pairs:
    """Sorts the pairs of ``ids`` [N, K] by expert; -1: no expert."""
    flat = jnp.where(ids >= 0, ids, experts).reshape(-1)
    size = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)
    return Pairs(jnp.argsort(flat, stable=True).astype(jnp.int32), jnp.cumsum(size) - size, size)


def choose_held(layer: jax.Array, placed: Placed) -> Chosen:
    """Gives the launch of the visited layer's experts that are on the device."""
    experts = jnp.arange(placed.slot.shape[0], dtype=jnp.int32)
    held = (placed.slot >= 0) & (placed.missing == 0)
    flat = layer * experts.shape[0] + experts
    return Chosen(experts, experts + held.astype(jnp.int32), experts, flat, placed.slot, jnp.full_like(experts, HELD))


def choose_coming(layer: jax.Array, placed: Placed) -> Chosen:
    """Gives the launch of all that comes: missing experts that pass through the spare slots, missing ones that stay,
    copies to prefetch."""
    count = placed.slot.shape[0]
    experts, missing = jnp.arange(count, dtype=jnp.int32), placed.missing > 0
    stays, passes, ahead = missing & (placed.slot >= 0), missing & (placed.slot < 0), placed.coming >= 0
    # each spare slot has an equal share of those that pass through
    usable, passing = placed.spare >= 0, jnp.sum(passes, dtype=jnp.int32)
    shares = jnp.maximum(jnp.sum(usable, dtype=jnp.int32), 1)
    lane = jnp.cumsum(usable, dtype=jnp.int32) - usable.astype(jnp.int32)  # [S]
    begin, end = (jnp.where(usable, (lane + more) * passing // shares, 0) for more in (0, 1))
    mine = (experts[:, None] >= begin[None]) & (experts[:, None] < end[None])  # [E, S]: the n-th that passes
    place = jnp.where(passes, jnp.cumsum(passes, dtype=jnp.int32) - 1, count)
    listed = jnp.zeros(count, jnp.int32).at[place].set(experts, mode="drop")
    alone = count + jnp.arange(count + ahead.shape[0], dtype=jnp.int32)  # entries that are a lane of their own
    first = layer[0] * count
    return Chosen(
        begin=jnp.concatenate([begin, alone]),
        end=jnp.concatenate([end, alone + jnp.concatenate([stays, ahead]).astype(jnp.int32)]),
        expert=jnp.concatenate([listed, experts, jnp.zeros_like(placed.coming)]),
        flat=jnp.concatenate([first + listed, first + experts, placed.coming]),
        slot=jnp.concatenate([jnp.max(jnp.where(mine, placed.spare, -1), axis=1), placed.slot, placed.coming_slot]),
        what=jnp.concatenate([jnp.full(2 * count, MISSING, jnp.int32), jnp.full_like(placed.coming, COPY)]),
    )


def experts(
    cfg: MoEConfig,
    h: jax.Array,
    pairs: Pairs,
    chosen: Chosen,
    host: Expert,
    slots: Expert,
    out: jax.Array,
    *,
    interpret: bool = False,
    shapes: tuple[Shape | None, Shape | None] = (None, None),
    at_once: int | None = None,
) -> tuple[jax.Array, Expert]:
    """Does what is chosen, in two launches: ``out`` [N * K, D] float32 with the outputs of the experts' pairs, and the
    slots; see `visit_experts`."""
    first = fit(shapes[0] or choose_shape(host.gate_up), cfg.expert_width)
    second = fit(shapes[1] or choose_shape(host.down), cfg.width)
    top_k = out.shape[0] // h.shape[0]
    at_once = at_once or max(LEAST, min(block_rows(cfg, h.shape[0], top_k), MOST_TOKENS))
    matrix, inner = blocks.cut(host.down, second.codes), (out.shape[0], cfg.expert_width)

    def gate_up(sums: list[jax.Array]) -> jax.Array:
        return activation(cfg, *sums).astype(h.dtype)

    rows = blocks.by_plane(blocks.cut(host.gate_up, first.codes), h)
    hidden, kept = _launch(
        "experts_gate_up", _Given(chosen, pairs, rows, (host.gate_up, host.gate_up_bias)),
        (slots.gate_up, slots.gate_up_bias), None, jax.ShapeDtypeStruct(inner, h.dtype),
        _Tokens(top_k, at_once, True, matrix), (0, cfg.expert_width), gate_up, first, interpret,
    )  # fmt: skip
    out, kept_down = _launch(
        "experts_down", _Given(chosen, pairs, hidden, (host.down, host.down_bias)),
        (slots.down, slots.down_bias), out, jax.ShapeDtypeStruct(out.shape, out.dtype),
        _Tokens(top_k, at_once, False, None), (0,), lambda sums: sums[0], second, interpret,
    )  # fmt: skip
    return out, Expert(kept[0], kept_down[0], kept[1], kept_down[1])


class _Tokens(NamedTuple):
    """How a launch finds the rows that it multiplies, and puts its results."""

    top_k: int
    at_once: int  # rows at a time
    gathers: bool  # reads a pair's token, and writes in the order of the experts; else the other way round
    following: blocks.Cut | None  # of the matrix that its results are multiplied by: they are put by plane


def _launch(
    name: str,
    given: _Given,
    slots: tuple[Leaf, Any],
    out: jax.Array | None,
    shape: jax.ShapeDtypeStruct,
    tokens: _Tokens,
    starts: tuple[int, ...],
    finish: Callable[[list[jax.Array]], jax.Array],
    own: Shape,
    interpret: bool,
) -> tuple[jax.Array, tuple[Leaf, Any]]:
    """Puts ``finish`` of the products of an expert's rows from each of ``starts`` on into ``out`` (None: a new one)."""
    read, kept = len(jax.tree.leaves(given)), len(jax.tree.leaves((slots, out)))

    def program(given: _Given, _: Any, slots: tuple[Leaf, Any], out: Any) -> None:
        output, lane = pl.program_id(0) * own.rows, pl.program_id(1)
        work = _Work(given, slots, out, tokens, tuple(start + output for start in starts), own, interpret)

        def entry(number: jax.Array, _: None) -> None:
            what = given.chosen.what[number]

            @pl.when(what == COPY)
            def _() -> None:
                work.copy(number)

            @pl.when(what != COPY)
            def _() -> None:
                work.compute(number, what == MISSING, finish, output)

        lax.fori_loop(given.chosen.begin[lane], given.chosen.end[lane], entry, None)

    kept_shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), slots)
    slots, out = pl.pallas_call(
        program,
        grid=(shape.shape[1] // own.rows, given.chosen.begin.shape[0]),
        out_shape=(kept_shapes, shape),
        input_output_aliases={read + place: place for place in range(kept)},
        compiler_params=own.compiler_params,
        interpret=interpret,
        name=name,
    )(given, (slots, out))
    assert out is not None
    return out, slots


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
        (self.host, self.host_bias), (self.slots, self.slots_bias) = given.host, slots
        self.cut, self.interpret = blocks.cut(self.host, own.codes), interpret

    def copy(self, entry: Any) -> None:
        """Copies these rows into the slot."""
        flat, slot = self.given.chosen.flat[entry], self.given.chosen.slot[entry]

        def block(number: jax.Array, _: None) -> None:
            self._keep(number, slot, self._fetch(self.host, flat, number))

        lax.fori_loop(0, self.cut.blocks, block, None)
        self._bias(slot, flat)

    def compute(self, entry: Any, missing: Any, finish: Callable[..., jax.Array], output: Any) -> None:
        """Multiplies these rows by all tokens of the expert, and puts the results from column ``output`` on."""
        chosen, many = self.given.chosen, self.tokens.at_once
        pairs: Any = self.given.pairs
        expert, slot, flat = chosen.expert[entry], chosen.slot[entry], chosen.flat[entry]
        first, size = pairs.first[expert], pairs.size[expert]

        def multiply(number: Any, flat: Any | None) -> None:
            row = number * many + jnp.arange(many, dtype=jnp.int32)
            mask = row < size
            pair = triton.load(pairs.order.at[jnp.where(mask, first + row, 0)], mask=mask, other=0)
            read, put = (pair // self.tokens.top_k, first + row) if self.tokens.gathers else (first + row, pair)
            self._put(put, mask, output, finish(self._products(jnp.where(mask, read, 0), mask, slot, flat)))

        @pl.when(missing)
        def _() -> None:
            self._barrier()  # nothing is read any more of the expert that was in the slot
            multiply(0, flat)
            self._barrier()  # what one thread has kept, another may read

        blocks_of_tokens = (size + many - 1) // many
        lax.fori_loop(missing.astype(jnp.int32), blocks_of_tokens, lambda number, _: multiply(number, None), None)

    def _products(self, read: jax.Array, mask: jax.Array, slot: Any, flat: Any | None) -> list[jax.Array]:
        """Multiplies rows ``read`` by an expert's rows in ``slot``, or those of the host's ``flat``, which it keeps:
        [rows read, rows] float32 for each start."""
        source, expert = (self.slots, slot) if flat is None else (self.host, flat)

        def add(number: Any, sums: list[jax.Array], found: list[Block]) -> list[jax.Array]:
            if flat is not None:
                self._keep(number, slot, found)
            weights = [self._weights(block) for block in found]
            for plane in range(self.cut.planes):
                values = self._entries(read, mask, number, plane)
                for place, planes in enumerate(weights):
                    sums[place] = sums[place] + _dot(values, planes[plane])
            return sums

        def step(number: jax.Array, carry: Any) -> Any:
            sums, found = carry
            following = self._fetch(source, expert, number + 1)  # on its way while the present one is multiplied
            return add(number, list(sums), found), following

        sums = [jnp.zeros((read.shape[0], self.rows), jnp.float32) for _ in self.starts]
        found = self._fetch(source, expert, 0)
        if self.cut.blocks > 1:
            sums, found = lax.fori_loop(0, self.cut.blocks - 1, step, (sums, found))
        sums = add(self.cut.blocks - 1, list(sums), found)
        return [total + bias for total, bias in zip(sums, self._bias(slot, flat), strict=True)]

    def _weights(self, block: Block) -> list[jax.Array]:
        """Gives what a block stands for, [rows, codes] per plane in the type that it is multiplied in."""
        planes = blocks.decoded(self.host, self.cut, block) if self.cut.group else [block.codes]
        return [plane.astype(self.given.rows.dtype) for plane in planes]

    def _entries(self, read: jax.Array, mask: jax.Array, number: Any, plane: int) -> jax.Array:
        """Loads what a plane of block ``number`` is multiplied by, [rows read, codes], 0 beyond the last column."""
        own = self.cut
        wide = (read.shape[0], own.codes)
        code = number * own.codes + jnp.arange(own.codes, dtype=jnp.int32)
        column = jnp.broadcast_to((plane * own.columns + code)[None, :], wide)
        real = jnp.broadcast_to(mask[:, None], wide)
        if not own.whole:
            real = real & (code < own.columns)[None, :]
        return triton.load(self.given.rows.at[jnp.broadcast_to(read[:, None], wide), column], mask=real, other=0)

    def _put(self, put: jax.Array, mask: jax.Array, output: Any, made: jax.Array) -> None:
        """Writes results [rows read, rows] to the rows ``put`` of the output."""
        column, wide = output + jnp.arange(self.rows, dtype=jnp.int32), made.shape
        if self.tokens.following is not None:
            column = blocks.place_by_plane(self.tokens.following, column)
        put = jnp.where(mask, put, self.out.shape[0])  # outside: interpreted, a masked lane writes what was there
        where = jnp.broadcast_to(put[:, None], wide), jnp.broadcast_to(column[None, :], wide)
        triton.store(self.out.at[where], made, mask=jnp.broadcast_to(mask[:, None], wide))

    def _fetch(self, source: Leaf, expert: Any, number: Any) -> list[Block]:
        return [blocks.load(source, self.cut, expert, start, self.rows, number) for start in self.starts]

    def _keep(self, number: Any, slot: Any, found: list[Block]) -> None:
        for start, block in zip(self.starts, found, strict=True):
            blocks.store(self.slots, self.cut, slot, start, number, block)

    def _bias(self, slot: Any, flat: Any | None) -> list[Any]:
        """Gives [1, rows] float32 for each start, 0 without biases; those of the host's ``flat`` are kept."""
        if self.host_bias is None:
            return [jnp.float32(0)] * len(self.starts)
        found = []
        for start in self.starts:
            mine = pl.ds(start, self.rows)
            bias = self.slots_bias[slot, mine] if flat is None else self.host_bias[flat, mine]
            if flat is not None:
                self.slots_bias[slot, mine] = bias
            found.append(bias.astype(jnp.float32)[None, :])
        return found

    def _barrier(self) -> None:
        if not self.interpret:
            triton.debug_barrier()


def _dot(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Gives values @ weights.T, [rows read, rows] float32, with full products of what is float32."""
    precision = lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(values, weights, contract, precision=precision, preferred_element_type=jnp.float32)
