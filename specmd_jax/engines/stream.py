"""Replays of a trace that is read a stretch at a time: memory that does not grow with the trace.

It makes two passes over the file. The first one (`schedule.stretches`) checks it and finds what a replay must know of
the rest of the trace. The second one replays: `stream_curves` all curves side by side, `stream_totals` the scan with
its carry. Results equal those of the whole trace, integers and seconds to the bit; sums of gate mass are added up in
float64, a block of visits at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, PartitionSpec

from specmd_jax.engines.asked import points
from specmd_jax.engines.curves import Curves, CurveTotals
from specmd_jax.engines.devices import CELLS, devices
from specmd_jax.engines.prepared import Prepared
from specmd_jax.engines.scan import in_axes, simulate
from specmd_jax.engines.sizes import native_bits, sizes, work
from specmd_jax.engines.visits import padded
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import Choice, Mix
from specmd_jax.replay.state import Numbers, Setup, Visit, begin
from specmd_jax.replay.totals import Totals, nothing
from specmd_jax.schedule.build import Origin, build_schedule, check_options
from specmd_jax.schedule.demand import Demand
from specmd_jax.schedule.stretches import Survey, Timetable, ahead, demand_of, survey
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.trace.stream import TraceFile, stretches
from specmd_jax.types import Trace

BLOCK_VISITS = 4096
"""Visits that the scan takes at once; each block is one call of one compiled program."""


@dataclass(frozen=True)
class Streamed:
    """A trace file under one schedule, ready to be replayed by any mix, budget and hardware, as `Prepared` is."""

    file: TraceFile
    timetable: Timetable
    stretch_tokens: int
    arrays: tuple[str, ...]  # optional ones that are read
    survey: Survey
    first: Prepared  # the first stretch, with the head of the file for its trace

    def setup(self, mix: Mix, hardware: Hardware | None, **options: Any) -> Setup:
        """Gives the static choices; raises SpecmdError if they make no sense for this trace, or for a streamed one."""
        predictor = mix.declared().prefetch
        if predictor is not None and predictor.needs == "shuffled":
            raise SpecmdError(f"prefetch {mix.prefetch.name!r} deals all passes anew, so its trace cannot be streamed")
        setup = self.first.setup(mix, hardware, **options)
        return setup._replace(resets=self.timetable.reset_per_request)

    def numbers(
        self, budgets: Sequence[Budget], machines: Sequence[Hardware | None], host_budget: Budget | None = None
    ) -> Numbers:
        """Gives the traced numbers of all cells: [budget] and, with hardware, [machine]."""
        numbers = self.first.numbers(budgets[0], machines[0], host_budget)
        stacked = jnp.asarray(np.stack([self.first.sizes.budget(budget) for budget in budgets]))
        if machines[0] is not None:
            each = [self.first.costs(machine, reads=host_budget is not None) for machine in machines]
            numbers = numbers._replace(costs=jax.tree.map(lambda *x: jnp.stack(x), *each))
        return numbers._replace(budget=stacked, first_use=jnp.asarray(self.survey.first_use))

    def demands(self) -> Iterator[tuple[Demand, int]]:
        """Gives the demand of each stretch, and the number of its first visit."""
        for trace, origin in zip(
            stretches(self.file, self.stretch_tokens, self.arrays), self.survey.origins, strict=True
        ):
            yield demand_of(trace, self.timetable, origin).demand, origin.visit

    def columns(self, setup: Setup, mix: Mix) -> Iterator[Visit]:
        """Gives the visits of each stretch (numpy), without padding."""
        most, chunk = int(self.survey.widest.max()), self.timetable.prefill_chunk
        longest = max(1, int(self.file.head.prompt_lengths.max()))
        longest = longest if chunk is None else min(longest, chunk)
        if self.timetable.drafts is not None:
            longest = max(longest, 1 + self.timetable.drafts.tokens)
        origins = self.survey.origins
        for i, trace in enumerate(stretches(self.file, self.stretch_tokens, self.arrays)):
            built = _schedule(trace, self.timetable, self.arrays, origins[i])
            behind = None
            if i + 1 < len(origins):
                behind = self.survey.heads[i + 1], self.timetable.reset_per_request
            visits = replace(self.first, schedule=built).columns(setup, mix, most, behind)
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
    context: int = 0,
    **schedule: Any,
) -> Streamed:
    """Makes the first pass over a file: the twin of `prepared.prepare`, whose arguments it takes.

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
    first = Prepared(head, built, found, work(head, found.level_bytes, bits, context))
    return Streamed(file, timetable, tokens, arrays, surveyed, first)


# ----------------------------------------------------------------------------------------------------- curves


class Curve(NamedTuple):
    """One call of `curves.curves`."""

    eviction: Choice
    budgets: Sequence[npt.ArrayLike]  # in whole units of `Streamed.first.sizes`
    hold: bool = False


def stream_curves(streamed: Streamed, wanted: Sequence[Curve]) -> list[list[CurveTotals]]:
    """Gives what `curves.curves` gives for each of `wanted`, in one pass over the file."""
    head, units = streamed.file.head, streamed.first.sizes.units[1]
    under_way = [
        Curves(head.layers, head.experts, streamed.survey.widest, units, one.budgets, one.eviction, hold=one.hold)
        for one in wanted
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
    """What is static of the scan over one block; its carry is the leaves of (State, `Totals.clocks`)."""

    setup: Setup
    axes: tuple[str, ...]  # as for `scan.replay_many`
    flags: Flags


def _opening(setup: Setup, numbers: Numbers, mix: Mix) -> tuple[Any, Totals]:
    policies, levels = mix.build(), numbers.units.shape[0] - 1
    totals = nothing(setup.layers, levels, policies.selective, *setup.tiers)
    return begin(setup, policies, numbers), totals


def _split(state: Any, totals: Totals) -> Leaves:
    return jax.tree.leaves((state, totals.clocks()))


def _vmapped(program: Any, axes: Sequence[str], mix: Mix, outs: Sequence[Any], ins: Sequence[Any] | None = None) -> Any:
    """Gives `program(budget, costs, mix[, carry])` under `axes`, outermost first.

    `outs` and `ins` [axis] are the axes of its results and of the carry.
    """
    for i in reversed(range(len(axes))):
        taken = in_axes(axes[i], mix)
        program = jax.vmap(program, in_axes=taken if ins is None else (*taken, ins[i]), out_axes=outs[i])
    return program


def dependence(setup: Setup, axes: tuple[str, ...], numbers: Numbers, mix: Mix, visits: Visit) -> Flags:
    """Says which leaves of the carry depend on which axis.

    A carry that crosses the border of a compiled program must say so, or tables that all budgets share would be made
    and moved once per budget. `vmap` finds it out by itself: asked here by a function that does nothing.
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

    def one(budget: Any, costs: Any, mix: Mix) -> Leaves:
        own = numbers._replace(budget=budget, costs=costs)
        (state, totals), _ = simulate(setup, mix.build(), own, visits)
        return spy(_split(state, totals))

    jax.eval_shape(_vmapped(one, axes, mix, [0] * len(axes)), numbers.budget, numbers.costs, mix)
    return tuple(reversed(seen))  # the innermost axis is asked first


def _axes_of(flags: Sequence[bool]) -> list[int | None]:
    return [0 if flag else None for flag in flags]


@partial(jax.jit, static_argnames=("program",))
def _begin(program: _Program, numbers: Numbers, mix: Mix) -> Leaves:
    def one(budget: Any, costs: Any, mix: Mix) -> Leaves:
        return _split(*_opening(program.setup, numbers._replace(budget=budget, costs=costs), mix))

    outs = [_axes_of(flags) for flags in program.flags]
    return _vmapped(one, program.axes, mix, outs)(numbers.budget, numbers.costs, mix)


@partial(jax.jit, static_argnames=("program", "mesh"))
def _block(
    program: _Program, mesh: Mesh, numbers: Numbers, mix: Mix, visits: Visit, carry: Leaves
) -> tuple[Leaves, Totals]:
    """Replays one block of visits: the carry behind it, and the block's totals (of the seconds: all so far)."""
    setup, axes, flags = program

    def one(budget: Any, costs: Any, mix: Mix, carry: Leaves) -> tuple[Leaves, Totals]:
        own = numbers._replace(budget=budget, costs=costs)
        opening = jax.eval_shape(lambda: _opening(setup, own, mix))
        like = jax.tree.structure((opening[0], opening[1].clocks()))
        state, clocks = jax.tree.unflatten(like, carry)
        policies, levels = mix.build(), own.units.shape[0] - 1
        totals = nothing(setup.layers, levels, policies.selective, *setup.tiers).at(clocks)
        (state, totals), _ = simulate(setup, policies, own, visits, (state, totals))
        return _split(state, totals), totals

    carried = [_axes_of(row) for row in flags]
    many = _vmapped(one, axes, mix, [(row, 0) for row in carried], carried)
    if mesh.size == 1:
        return many(numbers.budget, numbers.costs, mix, carry)
    split, everywhere = PartitionSpec(CELLS), PartitionSpec()
    leaves = [split if flag else everywhere for flag in flags[axes.index("budget")]]
    sharded = jax.shard_map(
        many, mesh=mesh, in_specs=(split, everywhere, everywhere, leaves), out_specs=(leaves, split), check_vma=False
    )
    return sharded(numbers.budget, numbers.costs, mix, carry)


def stream_totals(
    streamed: Streamed,
    mix: Mix,
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
    mesh: Mesh | None = None,
    block_visits: int | None = None,
    host_budget: Budget | None = None,
    **options: Any,
) -> Totals:
    """Gives totals (numpy, wide) of one mix by the scan, with the axes of `table.Replayer`.

    Args:
      mesh: the budgets are dealt to its devices; None: all of this process.
      block_visits: visits of a call; None: `BLOCK_VISITS`.
      host_budget: of the host tier; None: there is none.
      options: those of `Setup`.
    """
    if jax.process_count() > 1:
        raise SpecmdError("a trace is streamed by one process, but there are several")
    setup, mix = streamed.setup(mix, machines[0], **options), mix.traced()
    mesh = mesh or devices()
    spare = -len(budgets) % mesh.size  # the last budget is replayed again where their number is no multiple
    numbers = streamed.numbers([*budgets, *[budgets[-1]] * spare], machines, host_budget)
    axes = ("budget",) if machines[0] is None else ("budget", "hardware")
    if points(mix) is not None:
        axes = (*axes, "policy")
    program: _Program | None = None
    carry: Leaves = []
    sums: Totals | None = None
    for visits in ahead(blocks(streamed.columns(setup, mix), block_visits or BLOCK_VISITS)):
        if program is None:
            program = _Program(setup, axes, dependence(setup, axes, numbers, mix, visits))
            carry = _begin(program, numbers, mix)
        carry, totals = _block(program, mesh, numbers, mix, visits, carry)
        wide = jax.tree.map(_wide, totals)
        added: Totals = wide if sums is None else jax.tree.map(np.add, sums, wide)
        sums = added.at(wide.clocks())
    return jax.tree.map(lambda leaf: leaf[: len(budgets)], sums)


def _wide(leaf: jax.Array) -> npt.NDArray[Any]:
    array = np.asarray(leaf)
    return array.astype(np.int64 if array.dtype.kind == "i" else np.float64)


def blocks(stretches: Iterable[Visit], size: int) -> Iterator[Visit]:
    """Gives the same visits in blocks of `size`; the last one is padded, where nothing comes behind it."""
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
        yield padded(_join(held), size - count)


def _join(parts: Sequence[Visit]) -> Visit:
    columns = [[part[i] for part in parts] for i in range(len(Visit._fields))]
    return Visit(*(None if column[0] is None else np.concatenate(column) for column in columns))  # pyright: ignore


def _longer(logits: Any, most: int) -> npt.NDArray[np.float32]:
    return np.pad(logits, ((0, 0), (0, most - logits.shape[1]), (0, 0)), constant_values=np.nan)


def _cut(visits: Visit, rows: slice) -> Visit:
    return jax.tree.map(lambda column: column[rows], visits)
