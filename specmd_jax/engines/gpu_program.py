"""The GPU program of one configuration: `engines.gpu` launches one for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.engines.gpu_columns import Columns
from specmd_jax.policies.base import Arrival, Eviction, Now, Use
from specmd_jax.replay.make_room import lowest
from specmd_jax.replay.state import Setup
from specmd_jax.replay.timing import Costs, Timeline, roofline, running, timeline

# What an expert is in the table of a program.
ABSENT, USED, FRESH, FRESH_COUNTED = range(4)  # prefetched and unused: outside, or inside the counted visits
# Columns of `Tables.counts`: three counts of 10 bits are summed as one number.
REUSED, FETCHED, PREFETCH_HITS, LATE, COLLISIONS, PREFETCH_USED = range(6)
COUNTS, BITS = 8, 10
MOST_EXPERTS = (1 << BITS) - 1
PHASE = 8  # room for the seconds of a phase
FEW = 16  # of so many all pairs are looked at


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


class Registers(NamedTuple):
    """What a program carries from visit to visit."""

    used: jax.Array  # [L] int32 units
    best: jax.Array  # [L] int32: who would leave first (-1: nobody)
    entry: dict[str, jax.Array]  # [L] each: the columns of `best`
    stale: jax.Array  # [L] bool as int32: `best` must be searched again
    evictions: jax.Array  # [L] int32
    prefetched: jax.Array  # [L] int32
    layer: jax.Array  # the previous visit's
    link_s: jax.Array
    flying: jax.Array  # flat id of the copy in flight (-1: none)
    pinned_layer: jax.Array
    seconds: jax.Array  # [2 * PHASE]
    rounding: jax.Array  # [2 * PHASE]


class Program:
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
        self.setup, self.policy, self.data, self.given, self.tables = setup, policy, data, given, tables
        assert policy.rows is not None
        self.columns, self.keep = policy.rows.columns, policy.rows.keep
        self.machine = place[1]
        self.cell = (place[0] * count[1] + place[1]) * count[2] + place[2]
        self.interpret = interpret
        self.ids = jnp.arange(tables.state.shape[2], dtype=jnp.int32)
        self.layers = jnp.arange(tables.moved.shape[2], dtype=jnp.int32)
        self.whole = len(given.budget.shape) == 1
        if self.whole:
            self.budget = given.budget[place[0]]
        else:
            real = self.layers < setup.layers
            self.budget = triton.load(given.budget.at[place[0], self.layers], mask=real, other=0)

    def run(self) -> None:
        """Replays all visits."""
        self._clear(everything=True)
        nothing, nobody, zero = jnp.zeros_like(self.layers), jnp.full_like(self.layers, -1), jnp.zeros(2 * PHASE)
        start = Registers(
            used=nothing,
            best=nobody,
            entry={name: nothing.astype(self.tables.columns[name].dtype) for name in self.columns},
            stale=nothing,
            evictions=nothing,
            prefetched=nothing,
            layer=jnp.int32(0),
            link_s=jnp.float32(0),
            flying=jnp.int32(-1),
            pinned_layer=jnp.int32(0),
            seconds=zero,
            rounding=zero,
        )
        self._barrier()
        end = jax.lax.fori_loop(0, self.data.count[0], self.visit, start)
        self.tables.moved[self.cell, 0, :] = end.evictions
        self.tables.moved[self.cell, 1, :] = end.prefetched
        self.tables.seconds[self.cell, 0, :] = end.seconds
        self.tables.seconds[self.cell, 1, :] = end.rounding

    def _barrier(self) -> None:
        """Lets all lanes read what one has written."""
        if not self.interpret:
            triton.debug_barrier()

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

    def visit(self, at: jax.Array, old: Registers) -> Registers:
        """Replays one visit, in the order of CONTRACT.md section 2."""
        setup, data, tables, cell, ids = self.setup, self.data, self.tables, self.cell, self.ids
        if setup.resets:
            old = self._reset(data.reset[at] > 0, old)
        layer, pass_id, counted = data.layer[at], data.pass_id[at], data.counted[at]
        now = Now(data.index[at], layer, pass_id, setup.layers)
        units = self.given.units[layer]
        demanded = data.demanded[at]
        in_flight = old.link_s > 0

        # classification
        touch = data.touch[at, :]
        demand = touch >= 0
        before = tables.state[cell, layer, :].astype(jnp.int32)
        hit, fetched = demand & (before != ABSENT), demand & (before == ABSENT)
        late = hit & (old.flying == layer * setup.experts + ids) & in_flight
        fresh = before >= FRESH
        collisions = fetched & (tables.evicted[cell, layer, :] == pass_id)
        counts = (
            _packed(hit & ~late & ~fresh, fetched, hit & ~late & fresh),
            _packed(late, collisions, hit & (before == FRESH_COUNTED)),
        )
        self._count(layer, counts, counted)
        copies = (counts[0] >> BITS) & MOST_EXPERTS
        held = demanded * units
        budget = self.budget if self.whole else jnp.sum(jnp.where(self.layers == layer, self.budget, 0))
        stream = (held > budget) & (not setup.hold)

        # the visit's own time: reads the residency before the demand copies
        line, gate_s = self._spend(at, layer, stream, old)
        self._barrier()

        # demand copies; the policies observe
        tables.state[cell, layer, :] = jnp.where(demand, USED, before).astype(jnp.int8)
        used = old.used + jnp.where(self.layers == layer, copies * units, 0)
        end_touch = data.clock[at] + demanded
        self._observe(at, now, demand, touch, hit, fetched, end_touch)

        # prefetch copies
        link_s, flying, started, prefetched = line.link_s, old.flying, [], old.prefetched
        rows = [_wrapped(layer + 1 + ahead, setup.layers) for ahead in range(setup.horizon)]
        stale = old.stale
        for row in (old.layer, layer):
            stale = jnp.where(self.layers == row, 1, stale)
        flight_layer = jnp.where(old.flying < 0, layer, old.flying // setup.experts)
        if data.wishes is not None:
            self._barrier()
            pinned = self._pinned_units(layer, demand, 0 if self.policy.bypass else held, old)
            link_s, flying, used, started = self._prefetch(at, rows, stream, link_s, gate_s, flying, pinned, used)
            self._arrive(at, now, rows, started, end_touch)
            for row, arrived in zip(rows, started, strict=True):
                number = jnp.sum(arrived)
                prefetched = prefetched + jnp.where(self.layers == row, number * counted, 0)
            for row in (*rows, old.pinned_layer, flight_layer):
                stale = jnp.where(self.layers == row, 1, stale)

        # evict
        every = (data.starts_pass[at] > 0) | (not self.policy.static_rows)
        stale = jnp.where(every & (self.layers < setup.layers), 1, stale)
        self._barrier()
        pinned_demand = demand & ~stream & (not self.policy.bypass)

        def pinned_at(row: jax.Array) -> jax.Array:
            stays = (row == layer) & pinned_demand
            stays |= (old.flying == row * setup.experts + ids) & in_flight & ~stream
            for target, arrived in zip(rows, started, strict=False):
                stays |= (row == target) & (arrived > 0)
            return stays

        pools = self.layers == layer
        for row, arrived in zip(rows, started, strict=False):
            pools |= (self.layers == row) & (jnp.max(arrived) > 0)
        new = old._replace(used=used, stale=stale, prefetched=prefetched)
        new = self._evict(now, new, pinned_at, pools, counted)

        left_s = jnp.maximum(link_s - gate_s, 0.0)
        spent = gate_s, line.late_s, line.miss_s, line.busy_s, link_s - old.link_s
        seconds, rounding = self._add_seconds(new, data.decode[at], counted, spent)
        self._barrier()
        return new._replace(
            layer=layer,
            link_s=left_s,
            flying=jnp.where(left_s > 0, flying, -1),
            pinned_layer=flight_layer,
            seconds=seconds,
            rounding=rounding,
        )

    def _reset(self, reset: jax.Array, old: Registers) -> Registers:
        @pl.when(reset)
        def _() -> None:
            self._clear(everything=False)
            self._barrier()

        return old._replace(
            used=jnp.where(reset, 0, old.used),
            best=jnp.where(reset, -1, old.best),
            flying=jnp.where(reset, -1, old.flying),
            pinned_layer=jnp.where(reset, 0, old.pinned_layer),
        )

    def _count(self, layer: jax.Array, counts: tuple[jax.Array, jax.Array], counted: jax.Array) -> None:
        slot = jnp.arange(COUNTS, dtype=jnp.int32)
        shift = BITS * (slot % 3)
        number = (jnp.where(slot < 3, counts[0], counts[1]) >> shift) & MOST_EXPERTS
        place = self.tables.counts
        place[self.cell, layer, :] = place[self.cell, layer, :] + jnp.where(slot < 6, number * counted, 0)

    def _observe(
        self,
        at: jax.Array,
        now: Now,
        demand: jax.Array,
        touch: jax.Array,
        hit: jax.Array,
        fetched: jax.Array,
        end_touch: jax.Array,
    ) -> None:
        unknown: Any = None  # a policy by rows has no use for what other layers hold
        use = Use(
            now=now,
            demand=demand,
            touch=touch,
            mass=self.data.mass[at, :],
            hit=hit,
            loaded=fetched,
            top=demand,  # the one precision is the highest
            next_use=self.data.next_use[at, :],
            end_touch=end_touch,
            pool=unknown,
            budget=unknown,
            units=unknown,
            score=None if self.data.score is None else self.data.score[at, :],
        )
        for name, column in self.columns.items():
            table = self.tables.columns[name]
            row = table[self.cell, now.layer, :]
            new = column.used(row, use)
            if new is not row:
                table[self.cell, now.layer, :] = new

    def _spend(self, at: jax.Array, layer: jax.Array, stream: jax.Array, old: Registers) -> tuple[Timeline, jax.Array]:
        """Does what `spending.spend` does; the demand comes as a list in the order of its copies."""
        costs = self.given.costs
        if costs is None:
            zero = jnp.float32(0)
            return Timeline(zero, zero, zero, zero, zero), zero
        data, machine = self.data, self.machine
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
        zero = jnp.float32(0)
        sums = running if listed.shape[0] <= FEW else partial(jax.lax.cumsum, axis=0)
        line = timeline(compute_s, copy_s, late, zero, zero, old.link_s, sums)
        dense_s = roofline(
            data.tokens[at], costs.dense_flop_s[machine, layer], costs.dense_read_s[machine, layer], launch_s
        )
        return line, line.done_s + jnp.where(data.ends_layer[at] > 0, dense_s, 0.0)

    def _pinned_units(self, layer: jax.Array, demand: jax.Array, held: jax.Array | int, old: Registers) -> jax.Array:
        """Gives [L] int32, what the pinned demand and the copy in flight hold in each layer."""
        experts = self.setup.experts
        flight_layer, expert = old.flying // experts, old.flying % experts
        safe = jnp.maximum(flight_layer, 0), jnp.maximum(expert, 0)
        wanted = jnp.max(jnp.where((self.ids == expert) & demand, 1, 0)) > 0
        apart = (old.link_s > 0) & (old.flying >= 0) & ~((flight_layer == layer) & wanted)
        resident = self.tables.state[self.cell, safe[0], safe[1]] != ABSENT
        units = jnp.where(apart & resident, self.given.units[safe[0]], 0)
        return jnp.where(self.layers == layer, held, 0) + jnp.where(self.layers == flight_layer, units, 0)

    def _prefetch(
        self,
        at: jax.Array,
        rows: list[jax.Array],
        stream: jax.Array,
        link_s: jax.Array,
        gate_s: jax.Array,
        flying: jax.Array,
        pinned: jax.Array,
        used: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
        """Starts copies until the next gate, in the order of the wishes; also which ([E] 0 or 1 per target layer)."""
        setup, data, costs = self.setup, self.data, self.given.costs
        assert data.wishes is not None and data.wish_count is not None
        wide = self.ids.shape[0]
        wishes, wish_count = data.wishes, data.wish_count[at]

        def fits(held: jax.Array, row: jax.Array, units: jax.Array) -> jax.Array:
            if self.whole:
                return jnp.sum(held) + units <= self.budget
            here = self.layers == row
            return jnp.sum(jnp.where(here, held - self.budget, 0)) + units <= 0

        def more(queue: tuple[Any, ...]) -> jax.Array:
            number, link_s, *_ = queue
            in_time = link_s < gate_s if setup.timed else True
            return (number < wish_count) & ~stream & in_time

        def serve(queue: tuple[Any, ...]) -> tuple[Any, ...]:
            number, link_s, flying, pinned, used, started = queue
            wish = wishes[at, number]
            ahead, expert = wish // wide, wish % wide
            row = rows[0]
            for other in range(1, setup.horizon):
                row = jnp.where(ahead == other, rows[other], row)
            units = self.given.units[row]
            go = (self.tables.state[self.cell, row, expert] == ABSENT) & fits(pinned, row, units)
            if not setup.may_evict:
                go &= fits(used, row, units)
            taken = jnp.where((self.layers == row) & go, units, 0)
            copy_s = jnp.float32(0) if costs is None else costs.copy_s[self.machine, 0, row]
            here = (self.ids == expert) & go
            return (
                number + 1,
                link_s + jnp.where(go, copy_s, 0.0),
                jnp.where(go, row * setup.experts + expert, flying),
                pinned + taken,
                used + taken,
                [jnp.where(here & (ahead == i), 1, mask) for i, mask in enumerate(started)],
            )

        nobody = [jnp.zeros_like(self.ids) for _ in rows]
        queue = jax.lax.while_loop(more, serve, (jnp.int32(0), link_s, flying, pinned, used, nobody))
        _, link_s, flying, _, used, started = queue
        return link_s, flying, used, started

    def _arrive(
        self, at: jax.Array, now: Now, rows: list[jax.Array], started: list[jax.Array], end_touch: jax.Array
    ) -> None:
        data, cell = self.data, self.cell
        assert data.wish_count is not None and data.selected is not None
        mark = FRESH + data.counted[at]

        @pl.when(data.wish_count[at] > 0)
        def _() -> None:
            for ahead, (row, arrived) in enumerate(zip(rows, started, strict=True)):
                there = arrived > 0
                state = self.tables.state
                state[cell, row, :] = jnp.where(there, mark, state[cell, row, :].astype(jnp.int32)).astype(jnp.int8)
                arrival = Arrival(
                    rows=row[None],
                    selected=data.selected[at, ahead, :][None] > 0,
                    arrived=there[None],
                    touch=end_touch,
                    visit=now.visit,
                    pass_id=(now.pass_id + (row <= now.layer))[None],
                )
                for name, column in self.columns.items():
                    table = self.tables.columns[name]
                    old = table[cell, row, :][None]
                    new = column.arrived(old, arrival)
                    if new is not old:
                        table[cell, row, :] = new.reshape(self.ids.shape)

    def _evict(
        self,
        now: Now,
        old: Registers,
        pinned_at: Callable[[jax.Array], jax.Array],
        pools: jax.Array,
        counted: jax.Array,
    ) -> Registers:
        """Evicts as `make_room.evict` does; the layers are searched when somebody has to leave, not before."""
        tables, cell, layers, ids = self.tables, self.cell, self.layers, self.ids

        def is_over(used: jax.Array) -> jax.Array:
            if self.whole:
                return jnp.sum(used) > self.budget
            return jnp.max(jnp.where(pools & (used > self.budget), 1, 0)) > 0

        def searched(registers: Registers, row: jax.Array) -> Registers:
            entries = {name: tables.columns[name][cell, row, :] for name in self.columns}
            resident = tables.state[cell, row, :] != ABSENT
            expert = lowest(self.keep(now, row, **entries), resident & ~pinned_at(row))
            here = layers == row
            entry = {
                name: jnp.where(here, jnp.sum(jnp.where(ids == expert, values, 0)), registers.entry[name])
                for name, values in entries.items()
            }
            return registers._replace(
                best=jnp.where(here, expert, registers.best), entry=entry, stale=jnp.where(here, 0, registers.stale)
            )

        def candidates(registers: Registers) -> jax.Array:
            over = is_over(registers.used) if self.whole else pools & (registers.used > self.budget)
            return over & (registers.best >= 0)

        def next_row(registers: Registers) -> jax.Array:
            keys = self.keep(now, layers, **registers.entry)
            return lowest(tuple(jnp.broadcast_to(key, layers.shape) for key in keys), candidates(registers))

        def next_stale(registers: Registers) -> jax.Array:
            return jnp.max(jnp.where(registers.stale > 0, layers, -1))

        def refresh(carry: tuple[jax.Array, Registers]) -> tuple[jax.Array, Registers]:
            registers = searched(carry[1], carry[0])
            return next_stale(registers), registers

        def remove(carry: tuple[jax.Array, Registers]) -> tuple[jax.Array, Registers]:
            row, registers = carry
            here = layers == row
            expert = jnp.sum(jnp.where(here, registers.best, 0))
            tables.state[cell, row, expert] = jnp.int8(ABSENT)
            tables.evicted[cell, row, expert] = now.pass_id
            self._barrier()
            registers = registers._replace(
                used=registers.used - jnp.where(here, self.given.units[row], 0),
                evictions=registers.evictions + jnp.where(here, counted, 0),
            )
            registers = searched(registers, row)
            return next_row(registers), registers

        over = is_over(old.used)
        first = jnp.where(over, next_stale(old), -1)
        _, new = jax.lax.while_loop(lambda carry: carry[0] >= 0, refresh, (first, old))
        first = jnp.where(over, next_row(new), -1)
        return jax.lax.while_loop(lambda carry: carry[0] >= 0, remove, (first, new))[1]

    def _add_seconds(
        self, old: Registers, decode: jax.Array, counted: jax.Array, spent: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Adds one visit, as `totals.add` does."""
        slot = jnp.arange(2 * PHASE, dtype=jnp.int32)
        seconds = jnp.zeros(2 * PHASE)
        for column, value in enumerate(spent):
            seconds = jnp.where(slot % PHASE == column, value, seconds)
        mine = (slot // PHASE == decode) & (counted > 0)
        term = jnp.where(mine, seconds, 0.0) - old.rounding
        new = old.seconds + term
        return new, (new - old.seconds) - term


def _packed(*masks: jax.Array) -> jax.Array:
    """Gives three sums of [E] masks as one number."""
    together = jnp.zeros(masks[0].shape, jnp.int32)
    for place, mask in enumerate(masks):
        together = together | jnp.where(mask, 1 << (BITS * place), 0)
    return jnp.sum(together)


def _wrapped(layer: jax.Array, layers: int) -> jax.Array:
    """Gives `layer` modulo `layers`, for less than twice as many."""
    return jnp.where(layer >= layers, layer - layers, layer)
