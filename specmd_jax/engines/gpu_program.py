"""The GPU program of one configuration: `engines.gpu` launches one for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.engines.gpu_columns import Columns
from specmd_jax.engines.gpu_visits import ABSENT, USED, Contents, Found, Registers, Row, Visits, Wishes, lanes_of_layers
from specmd_jax.policies.base import Eviction
from specmd_jax.replay.state import Setup
from specmd_jax.replay.timing import Costs, Timeline, dense, roofline, sums_of, timeline

# Columns of `Tables.counts`: three counts of 10 bits are summed as one number.
REUSED, FETCHED, PREFETCH_HITS, LATE, COLLISIONS, PREFETCH_USED = range(6)
COUNTS, BITS = 8, 10
MOST_EXPERTS = (1 << BITS) - 1
PHASE = 8  # room for the seconds of a phase


class Given(NamedTuple):
    """What the configurations differ in, and what they start from."""

    budget: Any  # [B] or [B, L] int32 units
    costs: Costs | None  # leaves [H, ...]
    policy: dict[str, Any]  # [P] each: the eviction policy's numbers
    units: Any  # [L] int32
    fill: dict[str, Any]  # [L, E] each: the policy's empty tables


class Tables(NamedTuple):
    """What the programs write; C configurations."""

    state: Any  # [C, L, E] int8
    evicted: Any  # [C, L, E] int32: the pass of the last eviction
    columns: dict[str, Any]  # [C, L, E] each
    counts: Any  # [C, L, COUNTS] int32
    moved: Any  # [C, 2, L] int32: evictions, prefetch copies
    seconds: Any  # [C, 2, 2 * PHASE] float32: sums, and what they are short of


class Sums(NamedTuple):
    """What a program adds up in registers."""

    evictions: jax.Array  # [L] int32
    prefetched: jax.Array  # [L] int32
    seconds: jax.Array  # [2 * PHASE]
    rounding: jax.Array  # [2 * PHASE]


class Program(Visits):
    """One configuration: `place` is its budget, hardware and policy numbers. Arguments are references to memory."""

    def __init__(
        self,
        setup: Setup,
        policy: Eviction,
        count: tuple[int, int, int],
        place: tuple[jax.Array, jax.Array, jax.Array],
        data: Columns,
        given: Given,
        tables: Tables,
        interpret: bool,
    ) -> None:
        cell = (place[0] * count[1] + place[1]) * count[2] + place[2]
        if len(given.budget.shape) == 1:
            budget = given.budget[place[0]]
        else:
            layers = lanes_of_layers(setup)
            budget = triton.load(given.budget.at[place[0], layers], mask=layers < setup.layers, other=0)
        contents = Contents(tables.state, tables.evicted, tables.columns)
        super().__init__(setup, policy, cell, contents, budget, lambda layer: given.units[layer], interpret)
        self.data, self.given, self.tables, self.machine = data, given, tables, place[1]

    def run(self) -> None:
        """Replays all visits."""
        self._clear(everything=True)
        nothing, zero = jnp.zeros_like(self.layers), jnp.zeros(2 * PHASE)
        start = self.start(Sums(nothing, nothing, zero, zero))
        self.barrier()
        sums = jax.lax.fori_loop(0, self.data.count[0], self._visit, start).notes
        self.tables.moved[self.cell, 0, :] = sums.evictions
        self.tables.moved[self.cell, 1, :] = sums.prefetched
        self.tables.seconds[self.cell, 0, :] = sums.seconds
        self.tables.seconds[self.cell, 1, :] = sums.rounding

    def _visit(self, at: jax.Array, old: Registers) -> Registers:
        if self.setup.resets:
            old = self._reset(self.data.reset[at] > 0, old)
        return self.visit(_row(self.data, at), old)

    def _clear(self, everything: bool) -> None:
        """Empties the cache; an oracle keeps what it knows of the future unless `everything` goes."""

        def clear(row: jax.Array, done: jax.Array) -> jax.Array:
            self.tables.state[self.cell, row, :] = jnp.full_like(self.ids, ABSENT).astype(jnp.int8)
            self.tables.evicted[self.cell, row, :] = jnp.full_like(self.ids, -1)
            if everything:
                self.tables.counts[self.cell, row, :] = jnp.zeros(COUNTS, jnp.int32)
            if everything or not self.policy.oracle:
                for name in self.columns:
                    self.tables.columns[name][self.cell, row, :] = self.given.fill[name][row, :]
            return done

        jax.lax.fori_loop(0, self.setup.layers, clear, jnp.int32(0))

    def _reset(self, reset: jax.Array, old: Registers) -> Registers:
        @pl.when(reset)
        def _() -> None:
            self._clear(everything=False)
            self.barrier()

        return old._replace(
            used=jnp.where(reset, 0, old.used),
            best=jnp.where(reset, -1, old.best),
            flying=jnp.where(reset, -1, old.flying),
            pinned_layer=jnp.where(reset, 0, old.pinned_layer),
        )

    def on_found(self, row: Row, found: Found) -> jax.Array:
        late, fresh = found.late, found.fresh
        counts = (
            _packed(found.hit & ~late & ~fresh, found.fetched, found.hit & ~late & fresh),
            _packed(late, found.collisions, found.hit & found.fresh_counted),
        )
        slot = jnp.arange(COUNTS, dtype=jnp.int32)
        shift = BITS * (slot % 3)
        number = (jnp.where(slot < 3, counts[0], counts[1]) >> shift) & MOST_EXPERTS
        place = self.tables.counts
        place[self.cell, row.layer, :] = place[self.cell, row.layer, :] + jnp.where(slot < 6, number * row.counted, 0)
        return (counts[0] >> BITS) & MOST_EXPERTS

    def on_spend(self, row: Row, stream: jax.Array, old: Registers) -> tuple[Timeline, jax.Array]:
        """Does what `spending.spend` does; the demand comes as a list in the order of its copies."""
        costs = self.given.costs
        if costs is None:
            return super().on_spend(row, stream, old)
        data, machine, at, layer = self.data, self.machine, row.at, row.layer
        order = stream.astype(jnp.int32)
        listed, tokens = data.listed[order, at, :], data.listed_tokens[order, at, :]
        there = listed >= 0
        place = self.tables.state.at[self.cell, layer, jnp.maximum(listed, 0)]
        absent = triton.load(place, mask=there, other=USED).astype(jnp.int32) == ABSENT
        late = there & ~absent & (old.flying == layer * self.setup.experts + listed) & (old.link_s > 0)
        launch_s = costs.launch_s[machine]
        compute_s = roofline(
            tokens, costs.expert_flop_s[machine, layer], costs.expert_read_s[machine, 0, layer], launch_s
        )
        copy_s = jnp.where(absent, costs.copy_s[machine, 0, layer], 0.0)
        sums = sums_of(listed.shape[0])
        line = timeline(compute_s, copy_s, late, jnp.float32(0), old.link_s, costs.adds[machine], running=sums)
        turns = None if data.turns is None else data.turns[at]
        spent = dense(costs, (machine, layer), data.tokens[at], data.decode[at] > 0, turns)
        dense_s = roofline(data.tokens[at], *spent, launch_s + costs.layer_s[machine])
        gate_s = line.done_s + jnp.where(data.ends_layer[at] > 0, dense_s, 0.0)
        return line, gate_s if data.drafting_s is None else gate_s + data.drafting_s[at, 1]

    def copy_s(self, layer: jax.Array) -> jax.Array:
        costs = self.given.costs
        return jnp.float32(0) if costs is None else costs.copy_s[self.machine, 0, layer]

    def on_arrivals(self, notes: Sums, carry: Any, row: Row, rows: list[jax.Array], started: list[jax.Array]) -> Sums:
        prefetched = notes.prefetched
        for target, arrived in zip(rows, started, strict=True):
            prefetched = prefetched + jnp.where(self.layers == target, jnp.sum(arrived) * row.counted, 0)
        return notes._replace(prefetched=prefetched)

    def on_leave(self, notes: Sums, row: Row, layer: jax.Array, expert: jax.Array) -> Sums:
        return notes._replace(evictions=notes.evictions + jnp.where(self.layers == layer, row.counted, 0))

    def on_end(self, notes: Sums, row: Row, spent: tuple[jax.Array, ...]) -> Sums:
        """Adds the seconds of one visit, as `totals.add` does; drafting before its gate is its own, not that behind."""
        drafting_s = self.data.drafting_s
        if drafting_s is not None and self.setup.timed:
            spent = spent[0] - drafting_s[row.at, 1] + drafting_s[row.at, 0], *spent[1:]
        slot = jnp.arange(2 * PHASE, dtype=jnp.int32)
        seconds = jnp.zeros(2 * PHASE)
        for column, value in enumerate(spent):
            seconds = jnp.where(slot % PHASE == column, value, seconds)
        mine = (slot // PHASE == self.data.decode[row.at]) & (row.counted > 0)
        term = jnp.where(mine, seconds, 0.0) - notes.rounding
        new = notes.seconds + term
        return notes._replace(seconds=new, rounding=(new - notes.seconds) - term)


def _row(data: Columns, at: jax.Array) -> Row:
    """Reads visit number `at`; the wishes are read one by one."""
    wishes = None
    if data.wishes is not None:
        wishes = Wishes(
            count=data.wish_count[at],
            read=lambda number: data.wishes[at, number],
            selected=lambda ahead: data.selected[at, ahead, :] > 0,
        )
    return Row(
        at=at,
        index=data.index[at],
        layer=data.layer[at],
        pass_id=data.pass_id[at],
        starts_pass=data.starts_pass[at] > 0,
        counted=data.counted[at],
        clock=data.clock[at],
        demanded=data.demanded[at],
        touch=data.touch[at, :],
        mass=data.mass[at, :],
        next_use=data.next_use[at, :],
        score=None if data.score is None else data.score[at, :],
        wishes=wishes,
    )


def _packed(*masks: jax.Array) -> jax.Array:
    """Gives three sums of [E] masks as one number."""
    together = jnp.zeros(masks[0].shape, jnp.int32)
    for place, mask in enumerate(masks):
        together = together | jnp.where(mask, 1 << (BITS * place), 0)
    return jnp.sum(together)
