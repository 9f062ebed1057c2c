"""The scan as a GPU program: one configuration a program, one launch a grid.

XLA launches some dozens of kernels a visit, however few numbers each has to change; this program goes through all
visits by itself. It replays what `simulate` does, visit for visit and victim for victim, with the policies' own code: a
`Column` and a `keep` are elementwise, so they serve a row that a program has read as well as a whole table. What no
configuration decides (predictions, scores from routing alone) comes ready on the `Tape`.

A program is one warp with a table row across its lanes. Its tables lie in device memory and mostly in the caches; what
it asks for at every visit (what each layer holds, and who would leave it first) stays in registers.

It is written for Pallas' Triton backend: array sizes are powers of two, and there are no gathers, sorts or slices of
values. (JAX means to drop that backend some day; the scan then still serves a GPU, much more slowly.) On a CPU it is
interpreted, which is slow and for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax import tally
from specmd_jax.evict import lowest
from specmd_jax.plan import Choice
from specmd_jax.policies import EVICTION
from specmd_jax.policies.eviction import Arrival, Eviction, Now, Start, Use
from specmd_jax.simulate import Numbers, Setup
from specmd_jax.tally import Totals
from specmd_jax.tape import Tape, room
from specmd_jax.timing import Costs, Timeline, roofline, running, timeline

# What an expert is in the table of a program.
ABSENT, USED, FRESH, FRESH_COUNTED = range(4)  # prefetched and unused: outside, or inside the counted visits
# Columns of `_Tables.counts`: three counts of 10 bits are summed as one number.
REUSED, FETCHED, PREFETCH_HITS, LATE, COLLISIONS, PREFETCH_USED = range(6)
COUNTS, BITS = 8, 10
MOST_EXPERTS = (1 << BITS) - 1
PHASE = 8  # room for the seconds of a phase
LANES = 32
FEW = 16  # of so many all pairs are looked at
TABLE_BYTES = 2 << 30  # about what the programs of a launch have together


class _Given(NamedTuple):
    """What the configurations differ in, and what they start from."""

    budget: Any  # [B] or [B, L] int32 units
    costs: Costs | None  # leaves [H, ...]
    policy: dict[str, Any]  # [P] each: the eviction policy's numbers
    units: Any  # [L] int32
    fill: dict[str, Any]  # [L, E] each: the policy's empty tables


class _Tables(NamedTuple):
    """What the programs write; C configurations."""

    state: Any  # [C, L, E] int8
    evicted: Any  # [C, L, E] int32: the pass of the last eviction
    columns: dict[str, Any]  # [C, L, E] each
    counts: Any  # [C, L, COUNTS] int32
    moved: Any  # [C, 2, L] int32: evictions, prefetch copies
    seconds: Any  # [C, 2, 2 * PHASE] float32: sums, and what they are short of


class _Registers(NamedTuple):
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


def serves(setup: Setup, choices: tuple[Choice, ...], levels: int) -> bool:
    """Whether the program can replay this: one stored precision, misses fetched, and an eviction policy by rows."""
    names = {choice.axis: choice.name for choice in choices}
    plain = names["miss"] == "fetch" and names["routing"] == "standard" and setup.detail == "totals"
    return plain and levels == 1 and setup.experts <= MOST_EXPERTS and _eviction(choices, {}).rows is not None


def _eviction(choices: tuple[Choice, ...], numbers: Mapping[str, Any]) -> Eviction:
    choice = next(choice for choice in choices if choice.axis == "eviction")
    return EVICTION[choice.name](**dict(choice.static), **numbers)


@partial(jax.jit, static_argnames=("setup", "choices", "axes", "interpret"))
def replay_tape(
    setup: Setup,
    choices: tuple[Choice, ...],
    axes: tuple[str, ...],
    numbers: Numbers,
    policy_numbers: dict[str, dict[str, jax.Array]],
    tape: Tape,
    interpret: bool = False,
) -> Totals:
    """The totals of `plan.replay_many` over the same axes.

    The caller has asked `serves`. Of the policies' numbers only those of the eviction policy may differ along an axis
    "policy"; the others are on the tape.
    """
    policy_axis = "policy" in axes
    eviction_numbers = {k: v if policy_axis else v[None] for k, v in policy_numbers["eviction"].items()}
    budget = numbers.budget if "budget" in axes else numbers.budget[None]
    costs = numbers.costs
    if costs is not None and "hardware" not in axes:
        costs = jax.tree.map(lambda leaf: leaf[None], costs)
    policy = _eviction(choices, {name: leaf[0] for name, leaf in eviction_numbers.items()})
    assert policy.rows is not None
    wide, start = ((0, 0), (0, room(setup.experts) - setup.experts)), Start(numbers.first_use)
    fill = {name: jnp.pad(column.fill(start), wide) for name, column in policy.rows.columns.items()}
    given = _Given(budget, costs, eviction_numbers, numbers.units[1], fill)
    rest = (
        1 if costs is None else len(costs.launch_s),
        len(next(iter(eviction_numbers.values()))) if policy_axis else 1,
    )
    launch = partial(_launch, setup, choices, policy, rest, tape, interpret=interpret)
    # budgets in as many launches as their tables take
    table_bytes = rest[0] * rest[1] * sum(leaf.dtype.itemsize * leaf.size for leaf in [*fill.values(), start.first_use])
    most = max(1, TABLE_BYTES // table_bytes)
    if len(budget) <= most:
        totals = launch(given)
    else:
        parts = -(-len(budget) // most)
        short = parts * most - len(budget)
        padded = jnp.concatenate([budget, jnp.repeat(budget[-1:], short, axis=0)]).reshape(
            parts, most, *budget.shape[1:]
        )
        totals = jax.lax.map(lambda part: launch(given._replace(budget=part)), padded)
        totals = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: len(budget) * rest[0] * rest[1]], totals)
    sizes = {"budget": len(budget), "hardware": rest[0], "policy": rest[1]}
    placed = [axis for axis in sizes if axis in axes]  # as the programs lie
    order = [placed.index(axis) for axis in axes]

    def shaped(leaf: jax.Array) -> jax.Array:
        found = leaf.reshape(*(sizes[axis] for axis in placed), *leaf.shape[1:])
        return found.transpose(*order, *range(len(placed), found.ndim))

    return jax.tree.map(shaped, totals)


def _launch(
    setup: Setup,
    choices: tuple[Choice, ...],
    policy: Eviction,
    rest: tuple[int, int],
    tape: Tape,
    given: _Given,
    interpret: bool,
) -> Totals:
    """[C, ...] totals of every budget with every hardware and policy number, which `rest` counts."""
    assert policy.rows is not None
    scored = policy.rows.scored  # then its numbers are in the scores
    count = len(given.budget), *rest
    cells = count[0] * rest[0] * rest[1]

    def table(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((cells, *shape), dtype)

    whole = setup.layers, room(setup.experts)
    shapes = _Tables(
        state=table(whole, jnp.int8),
        evicted=table(whole, jnp.int32),
        columns={name: table(whole, leaf.dtype) for name, leaf in given.fill.items()},
        counts=table((setup.layers, COUNTS), jnp.int32),
        moved=table((2, room(setup.layers)), jnp.int32),
        seconds=table((2, 2 * PHASE), jnp.float32),
    )

    def program(tape: Tape, given: _Given, tables: _Tables) -> None:
        place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        mine = {name: leaf[place[2]] for name, leaf in given.policy.items()}
        own = policy if scored else _eviction(choices, mine)
        _Program(setup, own, count, place, tape, given, tables, interpret).run()

    call = pl.pallas_call(
        program,
        grid=count,
        out_shape=(shapes,),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=max(1, whole[1] // (8 * LANES)), num_stages=1),
        name="replay",
    )
    return _totals(setup, tape, call(tape, given)[0])


def _totals(setup: Setup, tape: Tape, tables: _Tables) -> Totals:
    """[C, ...] totals from what the programs counted and what the tape knows."""
    layers, cells = setup.layers, len(tables.counts)

    def everywhere(row: jax.Array) -> jax.Array:
        return jnp.broadcast_to(row, (cells, *row.shape))

    none = jax.tree.map(everywhere, tally.nothing(layers, 1))
    demand = everywhere(tape.demand_total)
    seconds = tables.seconds.reshape(cells, 2, 2, PHASE)[..., : none.seconds.shape[-1]]
    counts = tables.counts
    return none._replace(
        experts=none.experts._replace(
            demand=demand,
            reused=counts[..., REUSED],
            prefetch_hits=counts[..., PREFETCH_HITS],
            late=counts[..., LATE],
            fetched=counts[..., FETCHED],
            collisions=counts[..., COLLISIONS],
            prefetch_used=counts[..., PREFETCH_USED],
            predicted=everywhere(tape.predicted_total),
            predicted_right=everywhere(tape.right_total),
        ),
        fetched_at=counts[:, None, :, FETCHED],
        runs_at=demand[:, None],
        evictions=tables.moved[:, 0, :layers],
        prefetched=tables.moved[:, 1, :layers],
        mass=everywhere(tape.mass_total),
        seconds=seconds[:, 0],
        rounding=seconds[:, 1],
    )


class _Program:
    """One configuration: `place` is its budget, hardware and policy numbers. Arguments are references to memory."""

    def __init__(
        self,
        setup: Setup,
        policy: Eviction,
        count: tuple[int, int, int],
        place: tuple[jax.Array, jax.Array, jax.Array],
        tape: Tape,
        given: _Given,
        tables: _Tables,
        interpret: bool,
    ) -> None:
        self.setup, self.policy, self.tape, self.given, self.tables = setup, policy, tape, given, tables
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
        """All visits."""
        self._clear(everything=True)
        nothing, nobody, zero = jnp.zeros_like(self.layers), jnp.full_like(self.layers, -1), jnp.zeros(2 * PHASE)
        start = _Registers(
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
        end = jax.lax.fori_loop(0, self.tape.count[0], self.visit, start)
        self.tables.moved[self.cell, 0, :] = end.evictions
        self.tables.moved[self.cell, 1, :] = end.prefetched
        self.tables.seconds[self.cell, 0, :] = end.seconds
        self.tables.seconds[self.cell, 1, :] = end.rounding

    def _barrier(self) -> None:
        """What one lane has written, the others read."""
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

    def visit(self, at: jax.Array, old: _Registers) -> _Registers:
        """One visit, in the order of CONTRACT.md section 2."""
        setup, tape, tables, cell, ids = self.setup, self.tape, self.tables, self.cell, self.ids
        if setup.resets:
            old = self._reset(tape.reset[at] > 0, old)
        layer, pass_id, counted = tape.layer[at], tape.pass_id[at], tape.counted[at]
        now = Now(tape.index[at], layer, pass_id, setup.layers)
        units = self.given.units[layer]
        demanded = tape.demanded[at]
        in_flight = old.link_s > 0

        # classification
        touch = tape.touch[at, :]
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
        end_touch = tape.clock[at] + demanded
        self._observe(at, now, demand, touch, hit, fetched, end_touch)

        # prefetch copies
        link_s, flying, started, prefetched = line.link_s, old.flying, [], old.prefetched
        rows = [_wrapped(layer + 1 + ahead, setup.layers) for ahead in range(setup.horizon)]
        stale = old.stale
        for row in (old.layer, layer):
            stale = jnp.where(self.layers == row, 1, stale)
        flight_layer = jnp.where(old.flying < 0, layer, old.flying // setup.experts)
        if tape.wishes is not None:
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
        every = (tape.starts_pass[at] > 0) | (not self.policy.static_rows)
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
        seconds, rounding = self._add_seconds(new, tape.decode[at], counted, spent)
        self._barrier()
        return new._replace(
            layer=layer,
            link_s=left_s,
            flying=jnp.where(left_s > 0, flying, -1),
            pinned_layer=flight_layer,
            seconds=seconds,
            rounding=rounding,
        )

    def _reset(self, reset: jax.Array, old: _Registers) -> _Registers:
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
            mass=self.tape.mass[at, :],
            hit=hit,
            loaded=fetched,
            top=demand,  # the one precision is the highest
            next_use=self.tape.next_use[at, :],
            end_touch=end_touch,
            pool=unknown,
            budget=unknown,
            units=unknown,
            score=None if self.tape.score is None else self.tape.score[at, :],
        )
        for name, column in self.columns.items():
            table = self.tables.columns[name]
            row = table[self.cell, now.layer, :]
            new = column.used(row, use)
            if new is not row:
                table[self.cell, now.layer, :] = new

    def _spend(self, at: jax.Array, layer: jax.Array, stream: jax.Array, old: _Registers) -> tuple[Timeline, jax.Array]:
        """As `simulate._spend`; the demand comes as a list in the order of its copies."""
        costs = self.given.costs
        if costs is None:
            zero = jnp.float32(0)
            return Timeline(zero, zero, zero, zero, zero), zero
        tape, machine = self.tape, self.machine
        order = stream.astype(jnp.int32)
        listed, tokens = tape.listed[order, at, :], tape.listed_tokens[order, at, :]
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
            tape.tokens[at], costs.dense_flop_s[machine, layer], costs.dense_read_s[machine, layer], launch_s
        )
        return line, line.done_s + jnp.where(tape.ends_layer[at] > 0, dense_s, 0.0)

    def _pinned_units(self, layer: jax.Array, demand: jax.Array, held: jax.Array | int, old: _Registers) -> jax.Array:
        """[L] int32: what the pinned demand and the copy in flight hold in each layer."""
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
        """Starts copies until the next gate, in the order of the wishes; also which ([E] 0 or 1 a target layer)."""
        setup, tape, costs = self.setup, self.tape, self.given.costs
        assert tape.wishes is not None and tape.wish_count is not None
        wide = self.ids.shape[0]
        wishes, wish_count = tape.wishes, tape.wish_count[at]

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
        tape, cell = self.tape, self.cell
        assert tape.wish_count is not None and tape.selected is not None
        mark = FRESH + tape.counted[at]

        @pl.when(tape.wish_count[at] > 0)
        def _() -> None:
            for ahead, (row, arrived) in enumerate(zip(rows, started, strict=True)):
                there = arrived > 0
                state = self.tables.state
                state[cell, row, :] = jnp.where(there, mark, state[cell, row, :].astype(jnp.int32)).astype(jnp.int8)
                arrival = Arrival(
                    rows=row[None],
                    selected=tape.selected[at, ahead, :][None] > 0,
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
        old: _Registers,
        pinned_at: Callable[[jax.Array], jax.Array],
        pools: jax.Array,
        counted: jax.Array,
    ) -> _Registers:
        """As `evict.evict`; the layers are searched when somebody has to leave, not before."""
        tables, cell, layers, ids = self.tables, self.cell, self.layers, self.ids

        def is_over(used: jax.Array) -> jax.Array:
            if self.whole:
                return jnp.sum(used) > self.budget
            return jnp.max(jnp.where(pools & (used > self.budget), 1, 0)) > 0

        def searched(registers: _Registers, row: jax.Array) -> _Registers:
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

        def candidates(registers: _Registers) -> jax.Array:
            over = is_over(registers.used) if self.whole else pools & (registers.used > self.budget)
            return over & (registers.best >= 0)

        def next_row(registers: _Registers) -> jax.Array:
            keys = self.keep(now, layers, **registers.entry)
            return lowest(tuple(jnp.broadcast_to(key, layers.shape) for key in keys), candidates(registers))

        def next_stale(registers: _Registers) -> jax.Array:
            return jnp.max(jnp.where(registers.stale > 0, layers, -1))

        def refresh(carry: tuple[jax.Array, _Registers]) -> tuple[jax.Array, _Registers]:
            registers = searched(carry[1], carry[0])
            return next_stale(registers), registers

        def remove(carry: tuple[jax.Array, _Registers]) -> tuple[jax.Array, _Registers]:
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
        self, old: _Registers, decode: jax.Array, counted: jax.Array, spent: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """As `tally.add`."""
        slot = jnp.arange(2 * PHASE, dtype=jnp.int32)
        seconds = jnp.zeros(2 * PHASE)
        for column, value in enumerate(spent):
            seconds = jnp.where(slot % PHASE == column, value, seconds)
        mine = (slot // PHASE == decode) & (counted > 0)
        term = jnp.where(mine, seconds, 0.0) - old.rounding
        new = old.seconds + term
        return new, (new - old.seconds) - term


def _packed(*masks: jax.Array) -> jax.Array:
    """Three sums of [E] masks as one number."""
    together = jnp.zeros(masks[0].shape, jnp.int32)
    for place, mask in enumerate(masks):
        together = together | jnp.where(mask, 1 << (BITS * place), 0)
    return jnp.sum(together)


def _wrapped(layer: jax.Array, layers: int) -> jax.Array:
    """`layer` modulo `layers`, for less than twice as many."""
    return jnp.where(layer >= layers, layer - layers, layer)
