"""One visit of the cache's policy as one small kernel: who is here, who comes, who leaves, and where everybody is put.

The step is that of the GPU program (`engines.gpu_visits`), made of the policies' own code; its registers live in memory
between visits. Behind it the slots change hands by the rules of `placed`. All of it is one warp that works in place on
the `Memory`. What predictors say is worked out before the call (`kernels.predicted`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.engines import gpu_visits
from specmd_jax.engines.gpu import MOST_AHEAD, MOST_EXPERTS
from specmd_jax.engines.gpu_visits import ABSENT, Contents, Found, Registers, Row, Visits, Wishes, lanes_of_layers
from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.kernels import predicted
from specmd_jax.moe.kernels.placed import Book, Frame, Log, Placed, Token, blank_log
from specmd_jax.moe.runtime.decider import Seen
from specmd_jax.moe.runtime.policy import Policy
from specmd_jax.policies.base import Eviction, Size, Start
from specmd_jax.policies.choice import Choice, Mix
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.state import Numbers
from specmd_jax.replay.totals import FETCHED, NOT_DEMANDED, PREFETCHED, REUSED
from specmd_jax.types import NEVER

LAYER, CLOCK, FREE, PENDING, SCALARS = 0, 1, 2, 3, 4
USED, BEST, STALE, POOLS = 0, 1, 2, 3


class Memory(NamedTuple):
    """What the next visit needs. L and E are widened to powers of two where noted (')."""

    state: Any  # [1, L, E'] int8, see `engines.gpu_visits`
    evicted: Any  # [1, L, E'] int32
    columns: dict[str, Any]  # [1, L, E'] each: the eviction policy's tables
    pools: Any  # [POOLS, L'] int32, see `Registers`
    entry: dict[str, Any]  # [L'] each
    scalars: Any  # [SCALARS] int32: previous layer, clock, how many slots are free, and pending
    # these end in room for the lanes that write nothing, a place for each (`_write`)
    slot_of: Any  # [L * E ...] int32, -1: not on the device
    free: Any  # [C + S ...] int32: a stack of free slots
    pending: Any  # [E ...] int32: slots in use until the next visit begins


class State(NamedTuple):
    """`Memory` with what predictors and the selection remember."""

    memory: Memory
    scorer: Any
    prefetch: Any
    selection: Any


class Given(NamedTuple):
    """What one visit only reads."""

    layer: Any  # [1] int32, as the next one
    pass_id: Any
    demand: tuple[Any, ...]  # of one token: ids [K] and gates [K]; of several: count, mass and rank [E]
    score: Any  # [E] int32, see `Use.score`; None: no column reads it
    want: Any  # [H, E] float32, -inf: not selected; None: nothing prefetches
    budget: Any  # [1] or [L] int32 units
    units: Any  # [2, L] int32
    numbers: dict[str, Any]  # [1] each: the eviction policy's


class Notes(NamedTuple):
    """What is counted in a visit."""

    left: jax.Array  # experts that left
    came: jax.Array  # prefetch copies


def serves(policy: Policy) -> str | None:
    """Gives None, or the reason why the kernel cannot decide under this policy."""
    mix, setup, policies = policy.mix, policy.setup, policy.policies
    named, rows = mix.eviction.name, policies.eviction.rows
    levels = len(policy.sizes.units) - 1
    if levels != 1:
        return f"it has one stored precision, this has {levels}"
    if not policies.miss.fetches_all:
        return f"miss {mix.miss.name!r}: it fetches every miss"
    if policies.eviction.oracle:
        return f"eviction {named!r} looks into the future"
    if rows is None:
        return f"eviction {named!r} does not change one layer at a time (it declares no rows)"
    if mix.eviction.is_built:
        return "the eviction policy is built already, with its numbers out of sight: pass the function that makes it"
    if setup.hold:
        return "oversize 'hold' keeps more than the budget, and slots are counted by it"
    if setup.experts > MOST_EXPERTS:
        return f"{setup.experts} experts per layer, it counts up to {MOST_EXPERTS}"
    if setup.horizon > MOST_AHEAD:
        return f"horizon {setup.horizon}, it looks up to {MOST_AHEAD} layers ahead"
    return None


def begin(frame: Frame, numbers: Numbers, mix: Mix) -> State:
    """Gives an empty cache; the policy is one that `serves`."""
    setup, policies = frame.setup, mix.build()
    wide, room = next_power_of_two(setup.experts), frame.most_leaving(setup.experts)
    table = 1, setup.layers, wide
    rows = policies.eviction.rows
    assert rows is not None
    start, widened = Start(jnp.asarray(numbers.first_use)), ((0, 0), (0, wide - setup.experts))
    columns = {name: jnp.pad(column.fill(start), widened)[None] for name, column in rows.columns.items()}
    first = gpu_visits.begin(setup, {name: leaf.dtype for name, leaf in columns.items()}, ())
    memory = Memory(
        state=jnp.zeros(table, jnp.int8),
        evicted=jnp.full(table, -1, jnp.int32),
        columns=columns,
        pools=jnp.stack([first.used, first.best, first.stale]),
        entry=first.entry,
        scalars=jnp.array([0, 0, frame.slots, 0], jnp.int32),
        slot_of=jnp.full(setup.layers * setup.experts + room, -1, jnp.int32),
        free=jnp.arange(frame.slots + room, dtype=jnp.int32),
        pending=jnp.full(setup.experts + room, -1, jnp.int32),
    )
    size = Size(setup.layers, setup.experts, setup.horizon)
    scorer, prefetch, selection = rows.scorer, policies.prefetch, policies.selection
    return State(
        memory,
        scorer.init(start) if scorer else (),
        prefetch.init(size) if prefetch else (),
        selection.init(size) if selection else (),
    )


def resident(frame: Frame, state: State, layer: jax.Array) -> jax.Array:
    """Says which experts of a layer are resident, [E] bool."""
    return state.memory.state[0, layer, : frame.setup.experts] != ABSENT


def visit(
    frame: Frame,
    numbers: Numbers,
    mix: Mix,
    state: State,
    seen: Seen | Token,
    interpret: bool = False,
    book: Book | None = None,
) -> tuple[State, Placed, Any]:
    """Decides one visit, to be traced: by the rules of one token for a `Token`, else by those of several. Every pass
    visits all layers, in their order.

    Args:
        book: where a token's visit is noted, in the layer's row; written in place.
    Returns:
        The state, what is placed, and the book, or without one the `Log` of this visit, a single row.
    """
    setup = frame.setup
    wide, coming = next_power_of_two(setup.experts), frame.most_coming
    policies, score, want = mix.build(), None, None
    rows = policies.eviction.rows
    assert rows is not None
    if rows.scorer is not None:
        memory, score = predicted.score(setup, rows.scorer, state.scorer, seen, interpret)
        state = state._replace(scorer=memory)
    if frame.prefetches:
        memories = state.prefetch, state.selection
        learned, memory, want = predicted.foresee(setup, policies, memories, seen, interpret)
        state = state._replace(prefetch=learned, selection=memory)
    if isinstance(seen, Token):
        demand, most = (seen.ids, seen.gates), seen.ids.shape[0]
    else:
        demand, most = (seen.count, seen.mass, seen.rank), setup.experts
    given = Given(
        *(scalar.reshape(1) for scalar in (seen.layer, seen.pass_id)),
        demand=demand,
        score=score,
        want=want,
        budget=jnp.asarray(numbers.budget).reshape(-1),
        units=numbers.units,
        numbers={name: jnp.asarray(leaf).reshape(1) for name, leaf in mix.eviction.numbers.items()},
    )

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    ahead = frame.prefetches
    kept = state.memory, blank_log(frame, most, 1) if book is None else book
    shapes = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), kept),
        (ints(wide), ints(wide), ints(coming) if ahead else None, ints(coming) if ahead else None,
         ints(next_power_of_two(frame.staging))),
        ints(next_power_of_two(setup.horizon * wide)) if ahead else None,
    )  # fmt: skip
    fixed, whole = (len(jax.tree.leaves(leaves)) for leaves in (given, kept))
    choice, pooled = mix.eviction, numbers.budget.ndim == 0

    def body(given: Given, _: Any, kept: tuple[Memory, Any], placed: tuple[Any, ...], wishes: Any) -> None:
        mine = {name: leaf[0] for name, leaf in given.numbers.items()}
        policy = Choice(choice.axis, choice.name, choice.factory, choice.texts, mine).build()
        _Visit(frame, policy, pooled, given, *kept, Placed(*placed), wishes, interpret).run()

    (memory, noted), placed, _ = pl.pallas_call(
        body,
        grid=(1,),
        out_shape=shapes,
        input_output_aliases={fixed + place: place for place in range(whole)},
        interpret=interpret,
        # one warp, whose lanes see each other's writes behind a barrier
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        name="policy",
    )(given, kept)
    slot, missing, came, came_to, spare = placed
    placed = Placed(
        slot=slot[: setup.experts],
        missing=missing[: setup.experts],
        coming=came if ahead else jnp.zeros(0, jnp.int32),
        coming_slot=came_to if ahead else jnp.zeros(0, jnp.int32),
        spare=spare[: frame.staging],
    )
    return state._replace(memory=memory), placed, noted


class _Visit(Visits):
    """The visit inside the kernel; arguments are references to memory."""

    def __init__(
        self,
        frame: Frame,
        policy: Eviction,
        pooled: bool,
        given: Given,
        memory: Memory,
        noted: Log | Book,
        placed: Placed,
        wishes: Any,
        interpret: bool,
    ) -> None:
        setup, layers = frame.setup, lanes_of_layers(frame.setup)
        if pooled:
            budget = given.budget[0]
        else:
            budget = triton.load(given.budget.at[layers], mask=layers < setup.layers, other=0)
        contents = Contents(memory.state, memory.evicted, memory.columns)
        super().__init__(setup, policy, 0, contents, budget, lambda layer: given.units[1, layer], interpret)
        self.frame, self.given, self.memory, self.placed = frame, given, memory, placed
        self.book, self.log = (noted, noted.log) if isinstance(noted, Book) else (None, noted)
        self.at = jnp.int32(0) if self.book is None else given.layer[0]  # the visit's row of the log
        self.wishes, self.one_token = wishes, len(given.demand) == 2
        self.real, self.room = self.ids < setup.experts, frame.most_leaving(setup.experts)

    def run(self) -> None:
        """Takes the visit."""
        memory = self.memory
        self._clear()
        free, pending = memory.scalars[FREE], memory.scalars[PENDING]
        # what was in use until this visit
        old = triton.load(memory.pending.at[self.ids], mask=self.ids < pending, other=-1)
        self._write(memory.free, free + self.ids, old, self.ids < pending)
        free += pending
        row = self._row()
        old = Registers(
            used=memory.pools[USED, :],
            best=memory.pools[BEST, :],
            entry={name: leaf[:] for name, leaf in memory.entry.items()},
            stale=memory.pools[STALE, :],
            layer=memory.scalars[LAYER],
            link_s=jnp.float32(0),
            flying=jnp.int32(-1),
            pinned_layer=memory.scalars[LAYER],
            notes=Notes(jnp.int32(0), jnp.int32(0)),
        )
        new = self.visit(row, old)
        memory.pools[USED, :], memory.pools[BEST, :], memory.pools[STALE, :] = new.used, new.best, new.stale
        for name, entry in new.entry.items():
            memory.entry[name][:] = entry
        free, pending = self._settle(row, new.notes, free)
        memory.scalars[LAYER], memory.scalars[CLOCK] = row.layer, row.clock + row.demanded + 1
        memory.scalars[FREE], memory.scalars[PENDING] = free, pending

    def _clear(self) -> None:
        """Empties the lists that are written entry by entry."""
        self.log.evicted[self.at, :] = jnp.full(self.log.evicted.shape[1:], -1, jnp.int32)
        if self.frame.prefetches:
            for ref in (self.placed.coming, self.placed.coming_slot):
                ref[:] = jnp.full(ref.shape, -1, jnp.int32)
            for ahead in range(self.setup.horizon):
                self.log.prefetched[self.at, ahead, :] = jnp.zeros_like(self.ids)

    def _row(self) -> Row:
        given, ids, real = self.given, self.ids, self.real
        clock, nobody = self.memory.scalars[CLOCK], jnp.full_like(ids, -1)
        if self.one_token:
            chosen, gates = given.demand
            if self.book is not None:
                for place in range(chosen.shape[0]):
                    self.book.ids[self.at, 0, place] = chosen[place]
                    self.book.gates[self.at, 0, place] = gates[place]
            touch, mass, demanded = nobody, jnp.zeros(ids.shape, jnp.float32), jnp.int32(chosen.shape[0])
            for place in range(chosen.shape[0]):
                here = ids == chosen[place]
                touch, mass = jnp.where(here, clock + place, touch), jnp.where(here, gates[place], mass)
        else:
            count, mass, rank = (triton.load(ref.at[ids], mask=real, other=0) for ref in given.demand)
            touch = jnp.where(count > 0, clock + rank, -1)
            demanded = jnp.sum(jnp.where(count > 0, 1, 0))
        return Row(
            at=jnp.int32(0),
            index=given.pass_id[0] * self.setup.layers + given.layer[0],
            layer=given.layer[0],
            pass_id=given.pass_id[0],
            starts_pass=given.layer[0] == 0,
            counted=jnp.int32(1),
            clock=clock,
            demanded=demanded,
            touch=touch,
            mass=mass,
            next_use=jnp.full_like(ids, NEVER),
            score=None if given.score is None else triton.load(given.score.at[ids], mask=real, other=0),
            wishes=self._in_order() if self.frame.prefetches else None,
        )

    def _in_order(self) -> Wishes:
        """Lists what is selected by falling want-score; of equals the nearer layer, then the lower id, first."""
        wide, experts, horizon, listed = self.ids.shape[0], self.setup.experts, self.setup.horizon, self.wishes
        lanes = jnp.arange(listed.shape[0], dtype=jnp.int32)
        ahead, expert = lanes // wide, lanes % wide
        place = jnp.minimum(ahead, horizon - 1), jnp.minimum(expert, experts - 1)
        real = (ahead < horizon) & (expert < experts)
        want = triton.load(self.given.want.at[place], mask=real, other=NO)

        def add(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            number, want = carry
            first = jnp.min(jnp.where(want == jnp.max(want), lanes, lanes.shape[0]))
            listed[number] = first
            return number + 1, jnp.where(lanes == first, NO, want)

        count, _ = jax.lax.while_loop(lambda carry: jnp.max(carry[1]) > NO, add, (jnp.int32(0), want))

        def selected(ahead: int) -> jax.Array:
            row = self.given.want.at[ahead, jnp.minimum(self.ids, experts - 1)]
            return triton.load(row, mask=self.real, other=NO) > NO

        return Wishes(count, lambda number: listed[number], selected)

    def on_found(self, row: Row, found: Found) -> jax.Array:
        here = jnp.where(found.fresh, PREFETCHED, REUSED)
        outcome = jnp.where(found.fetched, FETCHED, jnp.where(found.hit, here, NOT_DEMANDED))
        self.log.outcome[self.at, :] = outcome.astype(jnp.int8)
        self.log.collision[self.at, :] = found.collisions.astype(jnp.int8)
        self.placed.missing[:] = found.fetched.astype(jnp.int32)
        return super().on_found(row, found)

    def on_copies(self) -> jax.Array:
        return jnp.int32(0)

    def on_copy(
        self, carry: jax.Array, go: jax.Array, ahead: jax.Array, layer: jax.Array, expert: jax.Array
    ) -> jax.Array:
        @pl.when(go)
        def _() -> None:
            self.placed.coming[carry] = layer * self.setup.experts + expert
            self.log.prefetched[self.at, ahead, expert] = carry + 1

        return carry + go.astype(jnp.int32)

    def on_arrivals(
        self, notes: Notes, carry: jax.Array, row: Row, rows: list[jax.Array], started: list[jax.Array]
    ) -> Notes:
        return notes._replace(came=carry)

    def on_leave(self, notes: Notes, row: Row, layer: jax.Array, expert: jax.Array) -> Notes:
        self.log.evicted[self.at, notes.left] = layer * self.setup.experts + expert
        return notes._replace(left=notes.left + 1)

    def _settle(self, row: Row, notes: Notes, free: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Takes the slots of those that left and gives slots to those that came; how many are free, and pending."""
        memory, placed, layer, experts = self.memory, self.placed, row.layer, self.setup.experts
        own = layer * experts + self.ids
        held = triton.load(memory.slot_of.at[own], mask=self.real, other=-1)
        demand, missing = row.touch >= 0, placed.missing[:] > 0
        stays = memory.state[0, layer, :] != ABSENT

        # those that left; what the visit needs is pending
        lanes = jnp.arange(self.log.evicted.shape[1], dtype=jnp.int32)
        gone = lanes < notes.left
        flat = jnp.maximum(self.log.evicted[self.at, :], 0)
        slot = triton.load(memory.slot_of.at[flat], mask=gone, other=-1)
        outcome = triton.load(self.log.outcome.at[self.at, flat % experts], mask=gone, other=NOT_DEMANDED)
        needed = (flat // experts == layer) & (outcome != NOT_DEMANDED)
        free = self._push(memory.free, free, slot, gone & (slot >= 0) & ~needed)
        pending = self._push(memory.pending, jnp.int32(0), slot, gone & (slot >= 0) & needed)
        self.barrier()  # all that is read of the row has been
        self._write(memory.slot_of, flat, jnp.full_like(slot, -1), gone)
        self.barrier()

        # those that came, of this layer by id, then the prefetched ones in their order
        takes = missing if self.one_token else missing & stays
        slot, free, pending = self._pop(_rank(takes), takes, free, pending)
        now = jnp.where(takes, slot, held)
        self._write(memory.slot_of, own, jnp.where(stays, now, -1), self.real)
        placed.slot[:] = jnp.where(demand & (takes | ~missing), now, -1)
        if self.frame.prefetches:
            lanes = jnp.arange(placed.coming.shape[0], dtype=jnp.int32)
            there = lanes < notes.came
            slot, free, pending = self._pop(lanes, there, free, pending)
            placed.coming_slot[:] = jnp.where(there, slot, -1)
            self.barrier()  # a model of one layer prefetches into the row just written
            self._write(memory.slot_of, placed.coming[:], slot, there)
        if self.one_token:  # those that are gone with the visit
            pending = self._push(memory.pending, pending, now, missing & ~stays)
        lanes = jnp.arange(placed.spare.shape[0], dtype=jnp.int32)
        placed.spare[:] = triton.load(memory.free.at[jnp.maximum(free - 1 - lanes, 0)], mask=lanes < free, other=-1)
        return free, pending

    def _write(self, ref: Any, place: jax.Array, values: jax.Array, which: jax.Array) -> None:
        """Writes some lanes. The others have places of their own at the end: interpreted, they write what was there."""
        nowhere = ref.shape[0] - self.room + jnp.arange(which.shape[0], dtype=jnp.int32)
        triton.store(ref.at[jnp.where(which, place, nowhere)], values, mask=which)

    def _push(self, stack: Any, size: jax.Array, values: jax.Array, which: jax.Array) -> jax.Array:
        """Puts some values on a stack; gives its new size."""
        self._write(stack, size + _rank(which), values, which)
        return size + jnp.sum(jnp.where(which, 1, 0))

    def _pop(
        self, rank: jax.Array, takes: jax.Array, free: jax.Array, pending: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gives a slot to each that takes one, by rank, and how many are free and pending then.

        In a pass of several tokens hits that leave are computed before anybody comes: their slots are taken first, so
        that the spare ones hold nothing.
        """
        count = jnp.sum(jnp.where(takes, 1, 0))
        first = jnp.int32(0) if self.one_token else jnp.minimum(count, pending)
        old, new = takes & (rank < first), takes & (rank >= first)
        slot = triton.load(self.memory.free.at[jnp.maximum(free - 1 - rank + first, 0)], mask=new, other=-1)
        if not self.one_token:
            place = self.memory.pending.at[jnp.maximum(pending - 1 - rank, 0)]
            slot = jnp.where(old, triton.load(place, mask=old, other=-1), slot)
        return slot, free - count + first, pending - first


def _rank(mask: jax.Array) -> jax.Array:
    return jax.lax.cumsum(mask.astype(jnp.int32), axis=0) - 1
