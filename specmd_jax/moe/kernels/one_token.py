"""One token through its experts, in two launches: those on the device out of their slots, the missing ones out of the
host's memory, put into their slots and multiplied block by block as they arrive.

A program takes a block of rows of one expert's matrix; those of missing experts start first, and the others run while
the link is busy, so that a visit takes the larger of link and compute. Rows of a missing expert are copied into its
slot in whole lines, which keeps the link at its rate, and multiplied out of it while other programs' are on their way:
a missing expert is computed by the instructions that compute one that is there, and gives its bits. The experts to
prefetch are copied by programs beside: they share the link with the missing ones, and the launch ends when all have
arrived.
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
from specmd_jax.moe.kernels.rows import lanes
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert, activation
from specmd_jax.moe.model.quant import Leaf

COPYING = 8
"""Programs per block of rows that copy experts to prefetch, each its share of them."""

PLAIN, ENCODED = Shape(4, 1024, 4), Shape(8, 128, 4)


class Visit(NamedTuple):
    """A visit of a pass of one token."""

    layer: jax.Array  # [1] int32
    ids: jax.Array  # [K] int32, -1: nothing is computed
    placed: Placed


class _Given(NamedTuple):
    """What a launch only reads."""

    visit: Visit
    rows: Any  # [1 or K, in]: what the matrices are multiplied by
    host: Any  # (matrix, bias) of all experts


def choose_shape(leaf: Leaf) -> Shape:
    """Gives the default shape of a launch over matrices of a form."""
    return ENCODED if is_encoded(leaf) else PLAIN


def serves(expert: Expert) -> str | None:
    """Gives None, or the reason why experts of this form (arrays or shapes) cannot be computed."""
    for leaf in (expert.gate_up, expert.down):
        reason = blocks.serves(leaf)
        if reason:
            return reason
    return None


def experts(
    cfg: MoEConfig,
    h: jax.Array,
    visit: Visit,
    host: Expert,
    slots: Expert,
    *,
    interpret: bool = False,
    shapes: tuple[Shape | None, Shape | None] = (None, None),
) -> tuple[jax.Array, Expert]:
    """Computes one token's experts, fills the slots of those that are missing, and copies those to prefetch.

    Args:
        h: [1, D] normed hidden state.
        visit: every expert of ``ids`` has a slot; where it is missing, the slot is filled.
        host: leaves [L * E, ...] in pinned host memory (or on the device).
        slots: leaves [C + S, ...], written in place.
        shapes: of the two launches.
    Returns:
        The output of every choice, not yet weighted, [1, K, D] float32 (undefined where there is no expert), and the
        slots.
    """
    top_k, inner = visit.ids.shape[0], cfg.expert_width
    first = fit(shapes[0] or choose_shape(host.gate_up), inner)
    second = fit(shapes[1] or choose_shape(host.down), cfg.width)

    def gate_up(sums: list[jax.Array]) -> jax.Array:
        return activation(cfg, *sums).astype(h.dtype)

    hidden, kept = _launch(
        "expert_gate_up", visit, blocks.arrange(host.gate_up, h), (host.gate_up, host.gate_up_bias),
        (slots.gate_up, slots.gate_up_bias), (0, inner), jax.ShapeDtypeStruct((top_k, inner), h.dtype), gate_up,
        first, blocks.cut(host.down, 1), interpret,
    )  # fmt: skip
    out, kept_down = _launch(
        "expert_down", visit, hidden, (host.down, host.down_bias), (slots.down, slots.down_bias),
        (0,), jax.ShapeDtypeStruct((top_k, cfg.width), jnp.float32), lambda sums: sums[0], second, None, interpret,
    )  # fmt: skip
    return out[None], Expert(kept[0], kept_down[0], kept[1], kept_down[1])


def _launch(
    name: str,
    visit: Visit,
    rows: jax.Array,
    host: tuple[Leaf, Any],
    slots: tuple[Leaf, Any],
    starts: tuple[int, ...],
    shape: jax.ShapeDtypeStruct,
    finish: Callable[[list[jax.Array]], jax.Array],
    own: Shape,
    along: Cut | None,
    interpret: bool,
) -> tuple[jax.Array, tuple[Leaf, Any]]:
    """Computes ``finish`` of the products of an expert's rows from each of ``starts`` on: one value per output, put
    where ``along`` has its place (None: in order)."""
    top_k, outputs = shape.shape
    copying = min(COPYING, visit.placed.coming.shape[0])
    used: dict[str, Any] = {"spare": None} if copying else {"spare": None, "coming": None, "coming_slot": None}
    given = _Given(visit._replace(placed=visit.placed._replace(**used)), rows, host)
    read, kept = len(jax.tree.leaves(given)), len(jax.tree.leaves(slots))

    def program(given: _Given, _: Any, slots: tuple[Leaf, Any], out: Any) -> None:
        entry, block = pl.program_id(0), pl.program_id(1)
        work = _Work(given, slots, tuple(start + block * own.rows for start in starts), own, interpret)

        @pl.when(entry < top_k)
        def _() -> None:
            choice = _missing_first(given.visit, entry)

            @pl.when(given.visit.ids[choice] >= 0)
            def _() -> None:
                made, first = finish(work.compute(choice)), block * own.rows
                if along is None or along.stride == 1:
                    out[choice, pl.ds(first, own.rows)] = made
                else:
                    column = first + jnp.arange(own.rows, dtype=jnp.int32)
                    triton.store(out.at[choice, blocks.place(along, column)], made)

        if copying:

            @pl.when(entry >= top_k)
            def _() -> None:
                work.copy_ahead(entry - top_k, copying)

    kept_shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), slots)
    slots, out = pl.pallas_call(
        program,
        grid=(top_k + copying, outputs // own.rows),
        out_shape=(kept_shapes, shape),
        input_output_aliases={read + place: place for place in range(kept)},
        compiler_params=own.compiler_params,
        interpret=interpret,
        name=name,
    )(given, slots)
    return out, slots


def _missing_first(visit: Visit, number: Any) -> jax.Array:
    """Gives the choice that is ``number`` in the order in which programs start: what the link has to bring comes first,
    and the others are computed meanwhile."""
    top_k = visit.ids.shape[0]
    lane, real = lanes(top_k)
    ids_ref: Any = visit.ids
    missing_ref: Any = visit.placed.missing
    ids = ids_ref[:] if real is None else triton.load(ids_ref.at[lane], mask=real, other=-1)
    missing = triton.load(missing_ref.at[jnp.maximum(ids, 0)], mask=ids >= 0, other=0) > 0
    turn = jnp.where(missing, lane, lane + top_k)
    place = jnp.sum((turn[None, :] < turn[:, None]).astype(jnp.int32), axis=1)
    return jnp.sum(jnp.where(place == number, lane, 0))


class _Work:
    """What a program does for one expert: its rows from each of ``starts`` on, inside the kernel."""

    def __init__(
        self, given: _Given, slots: tuple[Leaf, Any], starts: tuple[Any, ...], own: Shape, interpret: bool
    ) -> None:
        self.given, self.starts, self.rows, self.interpret = given, starts, own.rows, interpret
        self.slots, self.bias = slots
        self.cut = blocks.cut(self.slots, own.codes)

    def compute(self, choice: Any) -> list[jax.Array]:
        """Gives [rows] float32 for each start; a missing expert's rows are put into its slot first."""
        visit = self.given.visit
        expert = visit.ids[choice]
        slot, missing = visit.placed.slot[expert], visit.placed.missing[expert] > 0

        @pl.when(missing)
        def _() -> None:
            self._copy(slot, visit.layer[0] * visit.placed.slot.shape[0] + expert)
            if not self.interpret:
                triton.debug_barrier()  # what one thread has copied, another reads

        return self._products(jnp.minimum(choice, self.given.rows.shape[0] - 1), slot)

    def copy_ahead(self, share: Any, shares: int) -> None:
        """Copies these rows of every ``shares``-th expert to prefetch."""
        placed = self.given.visit.placed

        def copy(number: jax.Array, _: None) -> None:
            flat, slot = placed.coming[share + number * shares], placed.coming_slot[share + number * shares]

            @pl.when(flat >= 0)
            def _() -> None:
                self._copy(slot, flat)

        lax.fori_loop(0, placed.coming.shape[0] // shares, copy, None)

    def _copy(self, slot: Any, flat: Any) -> None:
        for start in self.starts:
            blocks.copy(self.given.host, (self.slots, self.bias), flat, slot, start, self.rows)

    def _products(self, row: Any, slot: Any) -> list[jax.Array]:
        """Multiplies row ``row`` by an expert's rows in ``slot``."""

        def add(number: Any, sums: list[jax.Array], found: list[Block]) -> list[jax.Array]:
            x = blocks.entries(self.given.rows, self.cut, row, number)
            return [
                total + blocks.weighed(self.slots, self.cut, block, x) for total, block in zip(sums, found, strict=True)
            ]

        def step(number: jax.Array, carry: Any) -> Any:
            sums, found = carry
            following = self._fetch(slot, number + 1)  # on its way while the present one is multiplied
            return add(number, list(sums), found), following

        sums = [jnp.zeros((self.rows, self.cut.sums), jnp.float32) for _ in self.starts]
        found = self._fetch(slot, 0)
        if self.cut.blocks > 1:
            sums, found = lax.fori_loop(0, self.cut.blocks - 1, step, (sums, found))
        sums = [jnp.sum(total, axis=1) for total in add(self.cut.blocks - 1, list(sums), found)]
        if self.bias is None:
            return sums
        biases = (self.bias[slot, pl.ds(start, self.rows)] for start in self.starts)
        return [total + bias.astype(jnp.float32) for total, bias in zip(sums, biases, strict=True)]

    def _fetch(self, slot: Any, number: Any) -> list[Block]:
        return [blocks.load(self.slots, self.cut, slot, start, self.rows, number) for start in self.starts]
