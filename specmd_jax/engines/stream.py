"""Replays of a trace that is read a stretch at a time: memory that does not grow with the trace.

Two passes over the file. The first one (`survey`) checks it and finds what a replay must know of the rest of the trace:
where each stretch begins, when its experts are used next behind it, how much one visit demands. The second one
replays: `stream_curves` all curves side by side, `stream_totals` the scan with its carry. Results equal those of the
whole trace, integers and seconds to the bit; sums of gate mass are added up in float64, a block of visits at a time.

What does grow is 8 bytes for each expert a stretch (next uses, gate mass), a small share of what the stretch itself
takes, and 8 bytes a request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, PartitionSpec

from specmd_jax.engines.curves import Curves, CurveTotals
from specmd_jax.engines.devices import CELLS, devices
from specmd_jax.engines.prepared import Choice, Mix, Replays, _pad, native_bits, policies, sizes, work
from specmd_jax.engines.scan import simulate
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import PREFETCH
from specmd_jax.replay.metrics import Counted
from specmd_jax.replay.step import Numbers, Setup, Visit, begin
from specmd_jax.replay.totals import Totals, nothing
from specmd_jax.schedule import demand_kernels as kernel
from specmd_jax.schedule.build import (
    Origin,
    build_schedule,
    check_clock,
    check_counted,
    check_options,
    counted_passes,
    one_by_one,
)
from specmd_jax.schedule.demand import Demand
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.trace.stream import TraceFile, stretches
from specmd_jax.types import DECODE, NEVER, PREFILL, Trace

BLOCK_VISITS = 4096
"""Visits that the scan takes at once; each block is one call of one compiled program."""

_ORDER = {"event": kernel.EVENT, "sequential": kernel.BY_POSITION, "sequential-id": kernel.BY_ID}

Item = TypeVar("Item")


class Timetable(NamedTuple):
    """Options of `build_schedule` for requests that run one after the other."""

    contract: str = "event"
    prefill_chunk: int | None = None
    reset_per_request: bool = False
    phase: str = "all"
    warmup_tokens: int = 0


class Stretch(NamedTuple):
    """The demand of some requests of a longer trace."""

    demand: Demand
    first_use: npt.NDArray[np.int32]  # [L, E] first visit from the stretch on that demands each expert
    next: Origin  # where the next stretch begins
    wanted: bool  # some pass is of the wanted phase
    counted: Counted


def demand_of(trace: Trace, timetable: Timetable, origin: Origin = Origin()) -> Stretch:  # noqa: B008 (immutable)
    """What `curves.pack(build_schedule(trace, origin=origin, ...))` gives, without the schedule's dense columns."""
    layers, experts = trace.layers, trace.experts
    passes = one_by_one(trace, timetable.prefill_chunk)
    starts = np.searchsorted(passes.of_token, np.arange(passes.phase.size + 1))  # [P + 1]
    start, group, clock, flat, mass = kernel.gather(
        trace.expert_ids, trace.gates, starts, _ORDER[timetable.contract], experts, origin.clock
    )
    check_clock(int(clock[-1]), group.size + origin.visit)
    upcoming = np.full(layers * experts, NEVER, np.int32) if origin.after is None else origin.after.flatten()
    next_use = kernel.look_ahead(start, flat, origin.visit, upcoming)
    pass_id, layer = np.divmod(group, layers)
    starts_pass = np.diff(pass_id, prepend=-1) > 0
    wanted, counted = counted_passes(
        trace, passes, starts[:-1], timetable.phase, timetable.warmup_tokens, timetable.reset_per_request, origin
    )
    tokens, prefills, decodes = np.diff(starts), counted & (passes.phase == PREFILL), counted & (passes.phase == DECODE)
    reset = starts_pass & passes.begins[pass_id] if timetable.reset_per_request else np.zeros(group.size, np.bool_)
    return Stretch(
        demand=Demand(
            start=start,
            flat=flat,
            mass=mass,
            next_use=next_use,
            layer=layer.astype(np.int32),
            pass_id=(pass_id + origin.pass_id).astype(np.int32),
            clock=clock[:-1].astype(np.int32),
            starts_pass=starts_pass,
            reset=reset,
            counted=counted[pass_id],
        ),
        first_use=upcoming.reshape(layers, experts),
        next=Origin(
            visit=origin.visit + group.size,
            pass_id=origin.pass_id + passes.phase.size,
            clock=int(clock[-1]),
            request=origin.request + trace.requests,
            tokens=origin.tokens + trace.tokens,
        ),
        wanted=bool(wanted.any()),
        counted=Counted(
            tokens=int(tokens[counted].sum()),
            prompts=len(np.unique(passes.request[prefills])),
            decodes=int(decodes.sum()),
            decoded=int(tokens[decodes].sum()),
        ),
    )


class Survey(NamedTuple):
    """What the first pass finds; C stretches."""

    origins: list[Origin]  # [C] with their `after`
    heads: npt.NDArray[np.float32]  # [C, L, E] gate mass of the first pass of each stretch
    first_use: npt.NDArray[np.int32]  # [L, E]
    widest: npt.NDArray[np.int64]  # [L] the most experts that a visit of each layer demands
    visits: int
    counted: Counted


def survey(file: TraceFile, timetable: Timetable, stretch_tokens: int, arrays: Sequence[str] = ("gates",)) -> Survey:
    """Reads a file once, and checks all of it that is read. Raises `SpecmdError` as `build_schedule` does."""
    layers, experts = file.head.layers, file.head.experts
    origin, origins, first, heads = Origin(), list[Origin](), list[npt.NDArray[np.int32]](), list[Any]()
    widest = np.zeros(layers, np.int64)
    wanted, counted = False, np.zeros(len(Counted._fields), np.int64)

    for trace in ahead(stretches(file, stretch_tokens, arrays)):
        found = demand_of(trace, timetable, origin)
        demand = found.demand
        np.maximum.at(widest, demand.layer, np.diff(demand.start))
        opening = demand.start[np.searchsorted(demand.pass_id, origin.pass_id, side="right")]
        head = np.zeros(layers * experts, np.float32)
        np.add.at(head, demand.flat[:opening], demand.mass[:opening])
        origins.append(origin)
        first.append(found.first_use)
        heads.append(head.reshape(layers, experts))
        wanted, counted = wanted or found.wanted, counted + found.counted
        origin = found.next
    check_counted(file.head, timetable.phase, timetable.warmup_tokens, wanted, bool(counted[0]))
    uses = np.stack([*first, np.full((layers, experts), NEVER, np.int32)])
    np.minimum.accumulate(uses[::-1], axis=0, out=uses[::-1])
    return Survey(
        origins=[place._replace(after=after) for place, after in zip(origins, uses[1:], strict=True)],
        heads=np.stack(heads),
        first_use=uses[0],
        widest=widest,
        visits=origin.visit,
        counted=Counted(*(int(value) for value in counted)),
    )


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, the next one in the making by another thread."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Streamed:
    """A trace file under one schedule, ready to be replayed by any mix, budget and hardware, as `plan.Replays` is."""

    file: TraceFile
    timetable: Timetable
    stretch_tokens: int
    arrays: tuple[str, ...]  # optional ones that are read
    survey: Survey
    first: Replays  # the first stretch, with the head of the file for its trace

    def setup(self, choices: tuple[Choice, ...], hardware: Hardware | None, **options: Any) -> Setup:
        """Static choices; checks that they make sense for this trace, and for one that is streamed."""
        names = {choice.axis: choice.name for choice in choices}
        predictor = PREFETCH[names["prefetch"]]
        if predictor is not None and predictor().needs == "shuffled":
            raise SpecmdError(f"prefetch {names['prefetch']!r} deals all passes anew, so its trace cannot be streamed")
        setup = self.first.setup(choices, hardware, **options)
        return setup._replace(resets=self.timetable.reset_per_request)

    def numbers(self, budgets: Sequence[Budget], machines: Sequence[Hardware | None]) -> Numbers:
        """Traced numbers of all cells: [budget] and, with hardware, [machine]."""
        numbers = self.first.numbers(budgets[0], machines[0])
        stacked = jnp.asarray(np.stack([self.first.sizes.budget(budget) for budget in budgets]))
        if machines[0] is not None:
            each = [self.first.costs(machine) for machine in machines]
            numbers = numbers._replace(costs=jax.tree.map(lambda *x: jnp.stack(x), *each))
        return numbers._replace(budget=stacked, first_use=jnp.asarray(self.survey.first_use))

    def demands(self) -> Iterator[tuple[Demand, int]]:
        """The demand of each stretch, and the number of its first visit."""
        for trace, origin in zip(
            stretches(self.file, self.stretch_tokens, self.arrays), self.survey.origins, strict=True
        ):
            yield demand_of(trace, self.timetable, origin).demand, origin.visit

    def columns(self, setup: Setup, choices: tuple[Choice, ...]) -> Iterator[Visit]:
        """The visits of each stretch (numpy), without padding."""
        most, chunk = int(self.survey.widest.max()), self.timetable.prefill_chunk
        longest = max(1, int(self.file.head.prompt_lengths.max()))
        longest = longest if chunk is None else min(longest, chunk)
        origins = self.survey.origins
        for i, trace in enumerate(stretches(self.file, self.stretch_tokens, self.arrays)):
            built = _schedule(trace, self.timetable, self.arrays, origins[i])
            behind = None
            if i + 1 < len(origins):
                behind = self.survey.heads[i + 1], self.timetable.reset_per_request
            visits = replace(self.first, schedule=built).columns(setup, choices, most, behind)
            yield visits._replace(logits=None if visits.logits is None else _longer(visits.logits, longest))


def _schedule(trace: Trace, timetable: Timetable, arrays: Sequence[str], origin: Origin) -> Any:
    return build_schedule(
        trace,
        with_logits="logits" in arrays and trace.logits is not None,
        with_ahead=trace.ahead is not None,
        origin=origin,
        **timetable._asdict(),
    )


def prepare_stream(
    file: TraceFile,
    *,
    precisions: tuple[float, ...] | None = None,
    logits: bool = False,
    ahead_scores: bool = False,
    stretch_tokens: int | None = None,
    batch: int = 1,
    **schedule: Any,
) -> Streamed:
    """The first pass over a file: the twin of `plan.prepare`, whose arguments it takes.

    Args:
      ahead_scores: read `ahead` too.
      stretch_tokens: tokens that are held at once, in whole requests; None: `TraceFile.stretch_tokens`.

    Raises:
      SpecmdError: a damaged file, or options that make no sense for it; only `batch` 1 can be streamed.
    """
    timetable = Timetable(**schedule)
    options = timetable._asdict()
    check_options(batch, **options)
    if batch > 1:
        raise SpecmdError(f"batch is {batch}, expected 1 for a trace that is streamed: its requests run in turn")
    if logits and timetable.contract != "event":
        raise SpecmdError(
            f"logits with contract {timetable.contract!r}, expected 'event': a visit there is one chosen expert"
        )
    head, tokens = file.head, stretch_tokens or file.stretch_tokens
    arrays = ("gates", *(["logits"] if logits else []), *(["ahead"] if ahead_scores else []))
    bits = native_bits(head)
    found = sizes(head.expert_bytes, head.experts, precisions, bits)
    surveyed = survey(file, timetable, tokens, arrays)
    opening = next(stretches(file, tokens, arrays))
    built = _schedule(opening, timetable, arrays, surveyed.origins[0])
    first = Replays(head, built, found, work(head, found.level_bytes, bits))
    return Streamed(file, timetable, tokens, arrays, surveyed, first)


# ----------------------------------------------------------------------------------------------------- curves


def stream_curves(
    streamed: Streamed,
    policies: Sequence[tuple[str, Mapping[str, Any]]],
    budgets: Sequence[npt.ArrayLike],
    hold: bool = False,
) -> list[list[CurveTotals]]:
    """`curves.curves` for each (eviction policy, its numbers): [policy][budget], in one pass over the file.

    Args:
      budgets: in whole units of `streamed.first.sizes`.
      hold: as for `curves`.
    """
    head, units = streamed.file.head, streamed.first.sizes.units[1]
    under_way = [
        Curves(head.layers, head.experts, streamed.survey.widest, units, budgets, name, numbers, hold=hold)
        for name, numbers in policies
    ]
    steps = [step for curves in under_way for step in curves.steps]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for demand, first_visit in ahead(streamed.demands()):
            for _ in threads.map(lambda step, stretch=(demand, first_visit): step(*stretch), steps):
                pass
    return [curves.totals() for curves in under_way]


# ------------------------------------------------------------------------------------------------------- scan

Leaves = list[jax.Array]
Flags = tuple[tuple[bool, ...], ...]  # [axis][leaf of the carry]: whether the leaf depends on the axis


class _Program(NamedTuple):
    """What is static of the scan over one block; its carry is the leaves of (State, seconds, rounding)."""

    setup: Setup
    choices: tuple[Choice, ...]
    axes: tuple[str, ...]  # as for `scan.replay_many`
    flags: Flags


def _opening(setup: Setup, choices: tuple[Choice, ...], numbers: Numbers, given: Any) -> tuple[Any, Totals]:
    return begin(setup, policies(choices, given), numbers), nothing(setup.layers, numbers.units.shape[0] - 1)


def _split(state: Any, totals: Totals) -> Leaves:
    return jax.tree.leaves((state, totals.seconds, totals.rounding))


def _vmapped(program: Any, axes: Sequence[str], outs: Sequence[Any], ins: Sequence[Any] | None = None) -> Any:
    """`program(budget, costs, policy numbers[, carry])` under `axes`, outermost first; `outs` and `ins` [axis] are the
    axes of its results and of the carry.
    """
    places = {"budget": 0, "hardware": 1, "policy": 2}
    for i in reversed(range(len(axes))):
        taken = tuple(0 if places[axes[i]] == place else None for place in range(3))
        program = jax.vmap(program, in_axes=taken if ins is None else (*taken, ins[i]), out_axes=outs[i])
    return program


def dependence(setup: Setup, choices: tuple[Choice, ...], axes: tuple[str, ...], numbers: Numbers, given: Any,
               visits: Visit) -> Flags:  # fmt: skip
    """Which leaves of the carry depend on which axis.

    A carry that crosses the border of a compiled program must say so, or tables that all budgets share would be made
    and moved once a budget. `vmap` finds it out by itself: asked here by a function that does nothing.
    """
    seen: list[tuple[bool, ...]] = []

    @jax.custom_batching.custom_vmap
    def spy(leaves: Leaves) -> Leaves:
        return leaves

    @spy.def_vmap  # pyright: ignore[reportFunctionMemberAccess]
    def _rule(axis_size: int, in_batched: list[list[bool]], leaves: Leaves) -> tuple[Leaves, list[bool]]:
        del axis_size
        seen.append(tuple(in_batched[0]))
        return spy(leaves), in_batched[0]

    def one(budget: Any, costs: Any, given: Any) -> Leaves:
        own = numbers._replace(budget=budget, costs=costs)
        (state, totals), _ = simulate(setup, policies(choices, given), own, visits)
        return spy(_split(state, totals))

    jax.eval_shape(_vmapped(one, axes, [0] * len(axes)), numbers.budget, numbers.costs, given)
    return tuple(reversed(seen))  # the innermost axis is asked first


def _axes_of(flags: Sequence[bool]) -> list[int | None]:
    return [0 if flag else None for flag in flags]


@partial(jax.jit, static_argnames=("program",))
def _begin(program: _Program, numbers: Numbers, given: Any) -> Leaves:
    def one(budget: Any, costs: Any, given: Any) -> Leaves:
        own = numbers._replace(budget=budget, costs=costs)
        return _split(*_opening(program.setup, program.choices, own, given))

    outs = [_axes_of(flags) for flags in program.flags]
    return _vmapped(one, program.axes, outs)(numbers.budget, numbers.costs, given)


@partial(jax.jit, static_argnames=("program", "mesh"))
def _block(
    program: _Program, mesh: Mesh, numbers: Numbers, given: Any, visits: Visit, carry: Leaves
) -> tuple[Leaves, Totals]:
    """One block of visits: the carry behind it, and the block's totals (of the seconds: all so far)."""
    setup, choices, axes, flags = program

    def one(budget: Any, costs: Any, given: Any, carry: Leaves) -> tuple[Leaves, Totals]:
        own = numbers._replace(budget=budget, costs=costs)
        policy = policies(choices, given)
        opening = jax.eval_shape(lambda: _opening(setup, choices, own, given))
        like = jax.tree.structure((opening[0], opening[1].seconds, opening[1].rounding))
        state, seconds, rounding = jax.tree.unflatten(like, carry)
        totals = nothing(setup.layers, own.units.shape[0] - 1)._replace(seconds=seconds, rounding=rounding)
        (state, totals), _ = simulate(setup, policy, own, visits, (state, totals))
        return _split(state, totals), totals

    carried = [_axes_of(row) for row in flags]
    many = _vmapped(one, axes, [(row, 0) for row in carried], carried)
    if mesh.size == 1:
        return many(numbers.budget, numbers.costs, given, carry)
    split, everywhere = PartitionSpec(CELLS), PartitionSpec()
    leaves = [split if flag else everywhere for flag in flags[axes.index("budget")]]
    sharded = jax.shard_map(
        many, mesh=mesh, in_specs=(split, everywhere, everywhere, leaves), out_specs=(leaves, split), check_vma=False
    )
    return sharded(numbers.budget, numbers.costs, given, carry)


def stream_totals(
    streamed: Streamed,
    mix: Mix,
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
    mesh: Mesh | None = None,
    block_visits: int | None = None,
    **options: Any,
) -> Totals:
    """Totals [budget, machine] (numpy, wide) of one mix by the scan; without hardware [budget].

    Args:
      mesh: the budgets are dealt to its devices; None: all of this process.
      block_visits: visits of a call; None: `BLOCK_VISITS`.
      options: those of `Setup`.
    """
    if jax.process_count() > 1:
        raise SpecmdError("a trace is streamed by one process, but there are several")
    choices, given = mix.choices(), mix.traced()
    setup = streamed.setup(choices, machines[0], **options)
    mesh = mesh or devices()
    spare = -len(budgets) % mesh.size  # the last budget is replayed again where their number is no multiple
    numbers = streamed.numbers([*budgets, *[budgets[-1]] * spare], machines)
    axes = ("budget",) if machines[0] is None else ("budget", "hardware")
    program: _Program | None = None
    carry: Leaves = []
    sums: Totals | None = None
    for visits in ahead(blocks(streamed.columns(setup, choices), block_visits or BLOCK_VISITS)):
        if program is None:
            program = _Program(setup, choices, axes, dependence(setup, choices, axes, numbers, given, visits))
            carry = _begin(program, numbers, given)
        carry, totals = _block(program, mesh, numbers, given, visits, carry)
        wide = jax.tree.map(_wide, totals)
        added: Totals = wide if sums is None else jax.tree.map(np.add, sums, wide)
        sums = added._replace(seconds=wide.seconds, rounding=wide.rounding)
    return jax.tree.map(lambda leaf: leaf[: len(budgets)], sums)


def _wide(leaf: jax.Array) -> npt.NDArray[Any]:
    array = np.asarray(leaf)
    return array.astype(np.int64 if array.dtype.kind == "i" else np.float64)


def blocks(stretches: Iterable[Visit], size: int) -> Iterator[Visit]:
    """The same visits in blocks of `size`; the last one is padded, where nothing comes behind it."""
    held: list[Visit] = []
    count = 0
    for visits in stretches:
        held.append(visits)
        count += len(visits.index)
        if count >= size:
            whole = _join(held)
            full = count - count % size
            for at in range(0, full, size):
                yield _cut(whole, slice(at, at + size))
            held, count = [_cut(whole, slice(full, None))], count - full
    if count:
        yield _pad(_join(held), size - count)


def _join(parts: Sequence[Visit]) -> Visit:
    columns = [[part[i] for part in parts] for i in range(len(Visit._fields))]
    return Visit(*(None if column[0] is None else np.concatenate(column) for column in columns))  # pyright: ignore


def _longer(logits: Any, most: int) -> npt.NDArray[np.float32]:
    return np.pad(logits, ((0, 0), (0, most - logits.shape[1]), (0, 0)), constant_values=np.nan)


def _cut(visits: Visit, rows: slice) -> Visit:
    return jax.tree.map(lambda column: column[rows], visits)
