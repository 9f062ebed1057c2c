"""One visit as part of a GPU program, for Pallas' Triton backend: what `replay.step` does, with the policies' own code.

A program is one warp with a table row across its lanes. Its tables lie in device memory; what it asks for at every
visit (what each layer holds, and who would leave it first) are values. `gpu_program` goes through a whole trace with it
and counts. A running model keeps the values in memory from visit to visit and notes who comes and leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.loops import next_power_of_two
from specmd_jax.policies.base import Arrival, Eviction, Now, Use
from specmd_jax.replay.make_room import lowest
from specmd_jax.replay.state import Setup
from specmd_jax.replay.timing import Timeline

# What an expert is in the table of a program.
ABSENT, USED, FRESH, FRESH_COUNTED = range(4)  # prefetched and unused: outside, or inside the counted visits


class Row(NamedTuple):
    """One visit: scalars, and rows of E lanes, a power of two."""

    at: jax.Array  # its place in columns of a subclass's own
    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layer: jax.Array
    pass_id: jax.Array
    starts_pass: jax.Array
    counted: jax.Array  # 0 or 1
    clock: jax.Array  # demanded experts so far, plus visits
    demanded: jax.Array  # demanded experts
    touch: jax.Array  # [E] int32 access clock of its use (-1: not demanded)
    mass: jax.Array  # [E] float32
    next_use: jax.Array  # [E] int32
    score: jax.Array | None = None  # [E] int32, see `Use.score`
    wishes: Wishes | None = None


class Wishes(NamedTuple):
    """What a predictor asks for at a visit."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    read: Callable[[jax.Array], jax.Array]  # number -> target x E + id, in the order of their copies
    selected: Callable[[int], jax.Array]  # target -> [E] bool


class Found(NamedTuple):
    """The visited layer as the visit finds it: [E] bool."""

    demand: jax.Array
    hit: jax.Array  # late ones too
    fetched: jax.Array
    late: jax.Array
    fresh: jax.Array  # came in by prefetch and was not used since; demanded or not
    fresh_counted: jax.Array  # those whose prefetch was counted
    collisions: jax.Array


class Contents(NamedTuple):
    """References to the tables of C configurations."""

    state: Any  # [C, L, E] int8
    evicted: Any  # [C, L, E] int32: the pass of the last eviction
    columns: dict[str, Any]  # [C, L, E] each: the eviction policy's


class Registers(NamedTuple):
    """What a program carries from visit to visit."""

    used: jax.Array  # [L] int32 units
    best: jax.Array  # [L] int32: who would leave first (-1: nobody)
    entry: dict[str, jax.Array]  # [L] each: the columns of `best`
    stale: jax.Array  # [L] bool as int32: `best` must be searched again
    layer: jax.Array  # the previous visit's
    link_s: jax.Array
    flying: jax.Array  # flat id of the copy in flight (-1: none)
    pinned_layer: jax.Array
    notes: Any  # a subclass's own


class Visits:
    """The visits of one configuration, one at a time. A subclass learns what happens at a visit through `on_...`.

    Args:
        cell: the configuration's place in the tables.
        budget: units, a scalar for one pool or [L] for a pool per layer.
        units: gives those of an expert of a layer.
    """

    def __init__(
        self,
        setup: Setup,
        policy: Eviction,
        cell: jax.Array | int,
        contents: Contents,
        budget: jax.Array,
        units: Callable[[jax.Array], jax.Array],
        interpret: bool,
    ) -> None:
        assert policy.rows is not None
        self.setup, self.policy, self.cell, self.contents = setup, policy, cell, contents
        self.budget, self.units, self.whole, self.interpret = budget, units, budget.ndim == 0, interpret
        self.columns, self.keep = policy.rows.columns, policy.rows.keep
        self.ids = jnp.arange(contents.state.shape[2], dtype=jnp.int32)
        self.layers = lanes_of_layers(setup)

    def on_found(self, row: Row, found: Found) -> jax.Array:
        """Hears what the visit finds, before anything changes; gives the number of experts to fetch."""
        del row
        return jnp.sum(jnp.where(found.fetched, 1, 0))

    def on_spend(self, row: Row, stream: jax.Array, old: Registers) -> tuple[Timeline, jax.Array]:
        """Gives the visit's own time, and its length in seconds. It may read the residency."""
        del row, stream, old
        zero = jnp.float32(0)
        return Timeline(zero, zero, zero, zero, zero), zero

    def on_copies(self) -> Any:
        """Gives what `on_copy` carries, before the first prefetch copy."""
        return ()

    def on_copy(self, carry: Any, go: jax.Array, ahead: jax.Array, layer: jax.Array, expert: jax.Array) -> Any:
        """Hears of each prefetch copy that is asked for, in order, and whether it starts (``go``)."""
        del go, ahead, layer, expert
        return carry

    def on_arrivals(self, notes: Any, carry: Any, row: Row, rows: list[jax.Array], started: list[jax.Array]) -> Any:
        """Hears of all prefetch copies that start: [E] 0 or 1 for each target layer of ``rows``."""
        del carry, row, rows, started
        return notes

    def on_leave(self, notes: Any, row: Row, layer: jax.Array, expert: jax.Array) -> Any:
        """Hears of each expert that leaves, in order."""
        del row, layer, expert
        return notes

    def on_end(self, notes: Any, row: Row, spent: tuple[jax.Array, ...]) -> Any:
        """Hears the seconds of the visit, in the columns of `replay.totals`."""
        del row, spent
        return notes

    def copy_s(self, layer: jax.Array) -> jax.Array:
        """Gives the seconds that a copy takes the link."""
        del layer
        return jnp.float32(0)

    def barrier(self) -> None:
        """Lets all lanes read what one has written."""
        if not self.interpret:
            triton.debug_barrier()

    def start(self, notes: Any) -> Registers:
        """Gives the registers before the first visit."""
        return begin(self.setup, {name: self.contents.columns[name].dtype for name in self.columns}, notes)

    def visit(self, row: Row, old: Registers) -> Registers:
        """Replays one visit, in the order of CONTRACT.md section 2."""
        setup, contents, cell, ids = self.setup, self.contents, self.cell, self.ids
        layer, pass_id = row.layer, row.pass_id
        now = Now(row.index, layer, pass_id, setup.layers)
        units = self.units(layer)
        in_flight = old.link_s > 0

        # classification
        demand = row.touch >= 0
        before = contents.state[cell, layer, :].astype(jnp.int32)
        hit, fetched = demand & (before != ABSENT), demand & (before == ABSENT)
        late = hit & (old.flying == layer * setup.experts + ids) & in_flight
        collisions = fetched & (contents.evicted[cell, layer, :] == pass_id)
        found = Found(demand, hit, fetched, late, before >= FRESH, before == FRESH_COUNTED, collisions)
        copies = self.on_found(row, found)
        held = row.demanded * units
        budget = self.budget if self.whole else jnp.sum(jnp.where(self.layers == layer, self.budget, 0))
        stream = (held > budget) & (not setup.hold)

        # the visit's own time: reads the residency before the demand copies
        line, gate_s = self.on_spend(row, stream, old)
        self.barrier()

        # demand copies; the policies observe
        contents.state[cell, layer, :] = jnp.where(demand, USED, before).astype(jnp.int8)
        used = old.used + jnp.where(self.layers == layer, copies * units, 0)
        end_touch = row.clock + row.demanded
        self._observe(row, now, demand, hit, fetched, end_touch)

        # prefetch copies
        link_s, flying, started, notes = line.link_s, old.flying, [], old.notes
        rows = [wrapped(layer + 1 + ahead, setup.layers) for ahead in range(setup.horizon)]
        stale = old.stale
        for touched in (old.layer, layer):
            stale = jnp.where(self.layers == touched, 1, stale)
        flight_layer = jnp.where(old.flying < 0, layer, old.flying // setup.experts)
        if row.wishes is not None:
            self.barrier()
            pinned = self._pinned_units(layer, demand, 0 if self.policy.bypass else held, old)
            link_s, flying, used, started, carry = self._prefetch(
                row.wishes, rows, stream, link_s, gate_s, flying, pinned, used
            )
            self._arrive(row, row.wishes, now, rows, started, end_touch)
            notes = self.on_arrivals(notes, carry, row, rows, started)
            for touched in (*rows, old.pinned_layer, flight_layer):
                stale = jnp.where(self.layers == touched, 1, stale)

        # evict
        every = row.starts_pass | (not self.policy.static_rows)
        stale = jnp.where(every & (self.layers < setup.layers), 1, stale)
        self.barrier()
        pinned_demand = demand & ~stream & (not self.policy.bypass)

        def pinned_at(place: jax.Array) -> jax.Array:
            stays = (place == layer) & pinned_demand
            stays |= (old.flying == place * setup.experts + ids) & in_flight & ~stream
            for target, arrived in zip(rows, started, strict=False):
                stays |= (place == target) & (arrived > 0)
            return stays

        pools = self.layers == layer
        for target, arrived in zip(rows, started, strict=False):
            pools |= (self.layers == target) & (jnp.max(arrived) > 0)
        new = self._evict(row, now, old._replace(used=used, stale=stale, notes=notes), pinned_at, pools)

        left_s = jnp.maximum(link_s - gate_s, 0.0)
        spent = gate_s, line.late_s, line.miss_s, line.busy_s, link_s - old.link_s
        notes = self.on_end(new.notes, row, spent)
        self.barrier()
        return new._replace(
            layer=layer,
            link_s=left_s,
            flying=jnp.where(left_s > 0, flying, -1),
            pinned_layer=flight_layer,
            notes=notes,
        )

    def _observe(
        self, row: Row, now: Now, demand: jax.Array, hit: jax.Array, fetched: jax.Array, end_touch: jax.Array
    ) -> None:
        unknown: Any = None  # a policy by rows has no use for what other layers hold
        use = Use(
            now=now,
            demand=demand,
            touch=row.touch,
            mass=row.mass,
            hit=hit,
            loaded=fetched,
            top=demand,  # the one precision is the highest
            next_use=row.next_use,
            end_touch=end_touch,
            pool=unknown,
            budget=unknown,
            units=unknown,
            score=row.score,
        )
        for name, column in self.columns.items():
            table = self.contents.columns[name]
            entries = table[self.cell, now.layer, :]
            new = column.used(entries, use)
            if new is not entries:
                table[self.cell, now.layer, :] = new

    def _pinned_units(self, layer: jax.Array, demand: jax.Array, held: jax.Array | int, old: Registers) -> jax.Array:
        """Gives [L] int32, what the pinned demand and the copy in flight hold in each layer."""
        experts = self.setup.experts
        flight_layer, expert = old.flying // experts, old.flying % experts
        safe = jnp.maximum(flight_layer, 0), jnp.maximum(expert, 0)
        wanted = jnp.max(jnp.where((self.ids == expert) & demand, 1, 0)) > 0
        apart = (old.link_s > 0) & (old.flying >= 0) & ~((flight_layer == layer) & wanted)
        resident = self.contents.state[self.cell, safe[0], safe[1]] != ABSENT
        units = jnp.where(apart & resident, self.units(safe[0]), 0)
        return jnp.where(self.layers == layer, held, 0) + jnp.where(self.layers == flight_layer, units, 0)

    def _prefetch(
        self,
        wishes: Wishes,
        rows: list[jax.Array],
        stream: jax.Array,
        link_s: jax.Array,
        gate_s: jax.Array,
        flying: jax.Array,
        pinned: jax.Array,
        used: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array], Any]:
        """Starts copies until the next gate, in the order of the wishes; also which ([E] 0 or 1 per target layer)."""
        setup, wide = self.setup, self.ids.shape[0]

        def fits(held: jax.Array, row: jax.Array, units: jax.Array) -> jax.Array:
            if self.whole:
                return jnp.sum(held) + units <= self.budget
            here = self.layers == row
            return jnp.sum(jnp.where(here, held - self.budget, 0)) + units <= 0

        def more(queue: tuple[Any, ...]) -> jax.Array:
            number, link_s, *_ = queue
            in_time = link_s < gate_s if setup.timed else True
            return (number < wishes.count) & ~stream & in_time

        def serve(queue: tuple[Any, ...]) -> tuple[Any, ...]:
            number, link_s, flying, pinned, used, started, carry = queue
            wish = wishes.read(number)
            ahead, expert = wish // wide, wish % wide
            row = rows[0]
            for other in range(1, setup.horizon):
                row = jnp.where(ahead == other, rows[other], row)
            units = self.units(row)
            go = (self.contents.state[self.cell, row, expert] == ABSENT) & fits(pinned, row, units)
            if not setup.may_evict:
                go &= fits(used, row, units)
            taken = jnp.where((self.layers == row) & go, units, 0)
            here = (self.ids == expert) & go
            return (
                number + 1,
                link_s + jnp.where(go, self.copy_s(row), 0.0),
                jnp.where(go, row * setup.experts + expert, flying),
                pinned + taken,
                used + taken,
                [jnp.where(here & (ahead == i), 1, mask) for i, mask in enumerate(started)],
                self.on_copy(carry, go, ahead, row, expert),
            )

        nobody = [jnp.zeros_like(self.ids) for _ in rows]
        queue = jnp.int32(0), link_s, flying, pinned, used, nobody, self.on_copies()
        _, link_s, flying, _, used, started, carry = jax.lax.while_loop(more, serve, queue)
        return link_s, flying, used, started, carry

    def _arrive(
        self,
        row: Row,
        wishes: Wishes,
        now: Now,
        rows: list[jax.Array],
        started: list[jax.Array],
        end_touch: jax.Array,
    ) -> None:
        cell, mark = self.cell, FRESH + row.counted

        @pl.when(wishes.count > 0)
        def _() -> None:
            for ahead, (target, arrived) in enumerate(zip(rows, started, strict=True)):
                there = arrived > 0
                state = self.contents.state
                state[cell, target, :] = jnp.where(there, mark, state[cell, target, :].astype(jnp.int32)).astype(
                    jnp.int8
                )
                arrival = Arrival(
                    rows=target[None],
                    selected=wishes.selected(ahead)[None],
                    arrived=there[None],
                    touch=end_touch,
                    visit=now.visit,
                    pass_id=(now.pass_id + (target <= now.layer))[None],
                )
                for name, column in self.columns.items():
                    table = self.contents.columns[name]
                    old = table[cell, target, :][None]
                    new = column.arrived(old, arrival)
                    if new is not old:
                        table[cell, target, :] = new.reshape(self.ids.shape)

    def _evict(
        self,
        visit: Row,
        now: Now,
        old: Registers,
        pinned_at: Callable[[jax.Array], jax.Array],
        pools: jax.Array,
    ) -> Registers:
        """Evicts as `make_room.evict` does; the layers are searched when somebody has to leave, not before."""
        contents, cell, layers, ids = self.contents, self.cell, self.layers, self.ids

        def is_over(used: jax.Array) -> jax.Array:
            if self.whole:
                return jnp.sum(used) > self.budget
            return jnp.max(jnp.where(pools & (used > self.budget), 1, 0)) > 0

        def searched(registers: Registers, row: jax.Array) -> Registers:
            entries = {name: contents.columns[name][cell, row, :] for name in self.columns}
            resident = contents.state[cell, row, :] != ABSENT
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
            contents.state[cell, row, expert] = jnp.int8(ABSENT)
            contents.evicted[cell, row, expert] = now.pass_id
            self.barrier()
            registers = registers._replace(
                used=registers.used - jnp.where(here, self.units(row), 0),
                notes=self.on_leave(registers.notes, visit, row, expert),
            )
            registers = searched(registers, row)
            return next_row(registers), registers

        over = is_over(old.used)
        first = jnp.where(over, next_stale(old), -1)
        _, new = jax.lax.while_loop(lambda carry: carry[0] >= 0, refresh, (first, old))
        first = jnp.where(over, next_row(new), -1)
        return jax.lax.while_loop(lambda carry: carry[0] >= 0, remove, (first, new))[1]


def lanes_of_layers(setup: Setup) -> jax.Array:
    """Gives 0, 1, ... for every layer, and on to a power of two."""
    return jnp.arange(next_power_of_two(setup.layers), dtype=jnp.int32)


def begin(setup: Setup, dtypes: dict[str, Any], notes: Any) -> Registers:
    """Gives the registers before the first visit; ``dtypes`` are those of the eviction policy's columns."""
    nothing = jnp.zeros_like(lanes_of_layers(setup))
    return Registers(
        used=nothing,
        best=jnp.full_like(nothing, -1),
        entry={name: nothing.astype(dtype) for name, dtype in dtypes.items()},
        stale=nothing,
        layer=jnp.int32(0),
        link_s=jnp.float32(0),
        flying=jnp.int32(-1),
        pinned_layer=jnp.int32(0),
        notes=notes,
    )


def wrapped(layer: jax.Array, layers: int) -> jax.Array:
    """Gives `layer` modulo `layers`, for less than twice as many."""
    return jnp.where(layer >= layers, layer - layers, layer)
