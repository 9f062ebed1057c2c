"""The doors: `run` for one replay, `sweep` for a grid, `totals` for `vmap`, and `explain`, which names the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from specmd_jax.engines.asked import Asked, points
from specmd_jax.engines.curves import as_totals, each_value, stacked
from specmd_jax.engines.prepared import Prepared, check, prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.engines.sizes import check_context, native_bits, sizes
from specmd_jax.engines.stream import Curve, Streamed, prepare_stream, stream_curves, stream_totals
from specmd_jax.engines.table import ENGINES, choose_engine, refusals, replayer
from specmd_jax.errors import SpecmdError
from specmd_jax.launches import Cell, Launch, by_schedule, key_of, launches, machine_key
from specmd_jax.progress import heartbeat
from specmd_jax.replay.metrics import Metrics, metrics_of
from specmd_jax.replay.totals import Totals
from specmd_jax.schedule.build import check_schedule
from specmd_jax.schedule.counted import counted_of
from specmd_jax.schedule.drafts import check_accepted
from specmd_jax.setting import Setting, grid, make_setting
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.trace import as_trace
from specmd_jax.trace.door import Source
from specmd_jax.trace.profile import Profile
from specmd_jax.trace.stream import TraceFile
from specmd_jax.types import Trace

GAP_BETWEEN = ("lru", "belady")
"""The eviction policies that `gap_closed` is measured between."""
DRAFT_NOTE = "routes of rejected drafts estimated"
"""What every number says that comes from a replay with drafts."""


def run(trace: Source, setting: Setting | None = None, /, *, engine: str = "auto", **changes: Any) -> Metrics:
    """Replays `trace` through one cache.

    Args:
      trace: a trace in memory, the name of a bundled one, the path of a trace file, or an opened file
        (`specmd_jax.open_trace`), which is then read a stretch at a time, twice; that takes batch 1 and gives the same
        numbers.
      setting: everything about the cell; None: the defaults of `Setting`.
      engine: "auto", or one of `specmd_jax.engines.table.ENGINES`.
      changes: fields of `Setting`, or numbers of its policies by name, such as `decay=0.95`, `reading="literal"`,
        `strength=0.3`.

    Raises:
      SpecmdError: a bad trace, or a name, number or combination that makes no sense, with what was expected.
    """
    source = as_trace(trace)
    cells = _cells(source, [_setting(setting, changes)])
    with heartbeat(f"replaying {_head(source).tokens:,} tokens of {_head(source).model}"):
        ((_, found),) = _replayed(source, cells, engine)
    return found


def sweep(
    trace: Source,
    settings: Iterable[Setting] | Setting | None = None,
    /,
    *,
    engine: str = "auto",
    **axes: Any,
) -> Iterator[dict[str, Any]]:
    """Replays a grid of cells, and yields a dictionary of plain numbers for each.

    Cells share a launch where they can. A row has the setting, the capacity in every unit, the scalar fields of
    `Metrics` and `gap_closed`: the share of the hits between `lru` and `belady` in an otherwise equal cell that the
    policy gains, None where the two do not differ or are not in the sweep.

    Args:
      trace, engine: as for `run`.
      settings: the cells, as `grid` makes them; or one setting that `axes` vary.
      axes: without a list of settings, what `grid` takes: fields of `Setting`, or numbers of policies, with a value or
        a list of values each. There is no hardware unless it is named. `evictions` and `capacities` are understood,
        too, and `numbers` maps an eviction policy to its own numbers.

    Raises:
      SpecmdError: before the first row, as for `run`.
    """
    source = as_trace(trace)
    if settings is None or isinstance(settings, Setting):
        wanted = _grid(settings, axes)
    elif axes:
        raise SpecmdError(f"{next(iter(axes))} is given beside a list of settings, expected one of the two")
    else:
        wanted = list(settings)
    for place, item in enumerate(wanted):
        if not isinstance(item, Setting):
            raise SpecmdError(f"settings[{place}] is {item!r}, expected a Setting")
    if not wanted:
        raise SpecmdError("there are no settings, expected at least one")
    cells = _cells(source, wanted)
    return _rows(source, cells, engine)


def totals(prepared: Prepared, setting: Setting | None = None, /, **changes: Any) -> Totals:
    """Replays a prepared trace by the scan, and gives its sums as arrays: what `jax.vmap` and `jax.jit` go over.

    A number of a policy, or of the hardware, may be traced: `vmap(lambda d: totals(prepared, eviction="lfu_decay",
    decay=d))(decays)` is a study in one expression.

    Args:
      prepared: a trace under one schedule (`specmd_jax.prepare`); fields of the setting that decide the schedule are
        those of `prepared`.
      setting, changes: as for `run`.

    Raises:
      SpecmdError: a name, number or combination that makes no sense, with what was expected.
    """
    cell = _setting(setting, changes)
    mix, machine = cell.mix(prepared.trace.top_k), cell.machine
    setup = prepared.setup(mix, machine, **cell.options)
    numbers = prepared.numbers(cell.budget(prepared.trace), machine, cell.host_budget(prepared.trace))
    (_, found), _ = replay_many(setup, (), numbers, mix.traced(), prepared.visits(setup, mix))
    return found


class Explanation(NamedTuple):
    """Which engine replays a setting, and why the others do not."""

    engine: str
    refusals: dict[str, str | None]  # engine -> why "auto" does not take it; None: it could

    def __str__(self) -> str:
        lines = [f"{self.engine}: replays it ({ENGINES[self.engine].about})"]
        for name, reason in self.refusals.items():
            if name != self.engine:
                lines.append(f"{name}: {'could, too, but comes later' if reason is None else reason}")
        return "\n".join(lines)


def explain(trace: Source, setting: Setting | None = None, /, **changes: Any) -> Explanation:
    """Says which engine `run` will take for this setting, and why not the others; arguments as for `run`."""
    source = as_trace(trace)
    (cell,) = _cells(source, [_setting(setting, changes)])
    asked = _asked(source, cell)
    return Explanation(choose_engine(asked), refusals(asked))


# ------------------------------------------------------------------------------------------------------ the settings


def _setting(setting: Setting | None, changes: Mapping[str, Any]) -> Setting:
    if setting is not None and not isinstance(setting, Setting):
        raise SpecmdError(f"the setting is {setting!r}, expected a Setting, or its fields by name (eviction='lru')")
    return make_setting(setting, **changes)


def _grid(base: Setting | None, axes: dict[str, Any]) -> list[Setting]:
    """Gives the settings that `sweep` is given by axes."""
    axes = dict(axes)
    for plural, field in (("evictions", "eviction"), ("capacities", "capacity")):
        if plural in axes:
            if field in axes:
                raise SpecmdError(f"{plural} and {field} are both given, expected one of them")
            axes[field] = axes.pop(plural)
    if base is None:
        axes.setdefault("hardware", None)
    own = axes.pop("numbers", None) or {}
    if not isinstance(own, Mapping):
        raise SpecmdError(f"numbers is {own!r}, expected the numbers of each eviction policy by its name")
    settings = grid(base, **axes)
    evictions = {setting.row()["eviction"] for setting in settings}
    for name, given in own.items():
        if name not in evictions:
            raise SpecmdError(f"numbers has {name!r}, expected one of the eviction policies {sorted(evictions)}")
        if not isinstance(given, Mapping):
            raise SpecmdError(f"numbers of {name!r} is {given!r}, expected numbers by name")
    return [make_setting(setting, **own.get(setting.row()["eviction"], {})) for setting in settings]


def _head(source: Trace | TraceFile) -> Trace:
    return source.head if isinstance(source, TraceFile) else source


def _cells(source: Trace | TraceFile, settings: Iterable[Setting]) -> list[Cell]:
    """Gives the settings, resolved and checked against the trace."""
    head, found = _head(source), []
    for number, setting in enumerate(settings):
        mix = setting.mix(head.top_k)
        for choice in mix:
            for name, value in choice.numbers.items():
                if getattr(value, "ndim", 0):
                    raise SpecmdError(f"{choice.axis} {choice.name!r}: {name} has {value.size} values, expected one")
        found.append(Cell(number, setting, mix, setting.budget(head), setting.machine, setting.host_budget(head)))
        _asked(source, found[-1])
    for schedule, cells in by_schedule(found):
        check_context(_head(source), schedule["context"])
        options = {name: value for name, value in schedule.items() if name not in ("precisions", "context")}
        if isinstance(source, Trace):
            check_schedule(source, with_logits=_needs_logits(cells), **options)
        else:
            check_accepted(head, options["drafts"])
    return found


def _asked(source: Trace | TraceFile, cell: Cell) -> Asked:
    """Gives what an engine is asked; raises SpecmdError for policies that make no sense on this trace."""
    head, setting = _head(source), cell.setting
    stored = sizes(head.expert_bytes, head.experts, setting.schedule["precisions"], native_bits(head))
    setup = check(head, len(stored.level_bytes), cell.mix, cell.machine, **setting.options)
    setup = setup._replace(resets=setting.reset_per_request)
    return Asked(setup, cell.mix, len(stored.level_bytes), streamed=isinstance(source, TraceFile))


def _needs_logits(cells: Iterable[Cell]) -> bool:
    return any(cell.mix.build().needs_logits for cell in cells)


# -------------------------------------------------------------------------------------------------------- the replay


def _replayed(source: Trace | TraceFile, cells: list[Cell], engine: str) -> Iterator[tuple[Cell, Metrics]]:
    """Gives the metrics of each cell, launch by launch. Within a schedule, the ends of `gap_closed` come first."""
    described: dict[Profile, str] = {}
    for profile in dict.fromkeys(profile for cell in cells for profile in cell.setting.profiles):
        described[profile] = profile.described(source)
    for schedule, group in by_schedule(cells):
        planned = sorted(launches(group), key=lambda launch: launch.mix.eviction.name not in GAP_BETWEEN)
        if isinstance(source, Trace):
            prepared = prepare(source, logits=_needs_logits(group), **schedule)
            counted, replay = counted_of(prepared.schedule), partial(_in_memory, prepared, engine)
        else:
            scores = any(_needs_ahead(cell) for cell in group)
            streamed = prepare_stream(source, logits=_needs_logits(group), ahead_scores=scores, **schedule)
            prepared, counted = streamed.first, streamed.survey.counted
            replay = _stream(streamed, planned, engine)
        measure = partial(metrics_of, counted, prepared.sizes.level_bytes)
        for launch in planned:
            totals = replay(launch)
            for cell, at in launch.cells:
                own = jax.tree.map(lambda leaf, at=at: leaf[at], totals)
                found = measure(own, prepared.bits, timed=cell.machine is not None)
                known = "; ".join(described[profile] for profile in cell.setting.profiles)
                yield cell, replace(found, profile=known or None)


def _in_memory(prepared: Prepared, engine: str, launch: Launch) -> Totals:
    replay = replayer(prepared, launch.mix, launch.machines, engine, host_budget=launch.host_budget, **launch.options)
    return replay(launch.budgets)


def _needs_ahead(cell: Cell) -> bool:
    predictor = cell.mix.build().prefetch
    return predictor is not None and predictor.needs == "ahead"


def _stream(streamed: Streamed, planned: list[Launch], engine: str) -> Callable[[Launch], Totals]:
    """Gives what replays launches of a streamed trace: those that the curves serve side by side, in one reading."""
    levels = len(streamed.first.sizes.level_bytes)

    def engine_of(launch: Launch) -> str:
        setup = streamed.setup(launch.mix, launch.machines[0], **launch.options)
        return choose_engine(Asked(setup, launch.mix, levels, streamed=True), engine)

    engines = {id(launch): engine_of(launch) for launch in planned}
    ready: dict[int, Totals] = {}

    def replay(launch: Launch) -> Totals:
        name = engines[id(launch)]
        if name == "scan":
            return stream_totals(
                streamed, launch.mix, launch.budgets, launch.machines, host_budget=launch.host_budget, **launch.options
            )
        if id(launch) not in ready:
            together = [other for other in planned if engines[id(other)] == name]
            ready.update(zip(map(id, together), _curves_together(streamed, together), strict=True))
        return ready.pop(id(launch))

    return replay


def _curves_together(streamed: Streamed, together: list[Launch]) -> list[Totals]:
    """Gives the totals of demand-only launches, in one reading of the file."""
    sizes = streamed.first.sizes
    wanted = [
        Curve(choice, [sizes.budget(budget) for budget in launch.budgets], launch.options["hold"])
        for launch in together
        for choice in each_value(launch.mix)
    ]
    found = iter(stream_curves(streamed, wanted))
    return [
        stacked([list(map(as_totals, next(found))) for _ in each_value(launch.mix)], points(launch.mix) is not None)
        for launch in together
    ]


# ---------------------------------------------------------------------------------------------------------- the rows


def _rows(source: Trace | TraceFile, cells: list[Cell], engine: str) -> Iterator[dict[str, Any]]:
    head = _head(source)
    shown = {"expert_bytes": head.expert_bytes, "experts": head.experts, "top_k": head.top_k}
    ends: dict[Any, dict[str, int]] = {}
    for cell, found in _replayed(source, cells, engine):
        named = cell.setting.row()
        if cell.mix.eviction.name in GAP_BETWEEN:
            ends.setdefault(_apart_from_eviction(cell), {})[cell.mix.eviction.name] = found.hits
        size = describe_capacity(cell.budget, **shown)
        # what fits, and what a token cycle takes, is of experts as they are stored: at their highest precision
        stored_bytes = _stored_bytes(head, cell)
        stored = describe_capacity(cell.budget, expert_bytes=stored_bytes, experts=head.experts, top_k=head.top_k)
        yield {
            "model": head.model,
            **named,
            "capacity_bytes": int(size["bytes"]),
            "capacity_pct": float(size["percent"]),
            "capacity_slots": int(stored["slots"]),
            "capacity_slots_per_layer": float(stored["slots_per_layer"]),
            "cycles": float(stored["cycles"]),
            "host_bytes": None if cell.host_budget is None else int(np.sum(cell.host_budget)),
            **found.row(),
            "gap_closed": _gap(found.hits, ends.get(_apart_from_eviction(cell), {})),
            "evidence": "simulated" if not cell.setting.drafts else f"simulated, {DRAFT_NOTE}",
        }


def _stored_bytes(head: Trace, cell: Cell) -> npt.NDArray[np.int64]:
    """Gives the bytes of an expert of each layer, at the highest precision that is stored."""
    precisions = cell.setting.schedule["precisions"]
    return sizes(head.expert_bytes, head.experts, precisions, native_bits(head)).level_bytes[-1]


def _apart_from_eviction(cell: Cell) -> Any:
    """Gives what cells have in common that differ in their eviction policy only."""
    others = [(choice.name, choice.texts, tuple(map(key_of, choice.numbers.values()))) for choice in cell.mix[1:]]
    setting = cell.setting
    return (
        tuple(others), tuple(setting.schedule.items()), tuple(setting.options.items()), setting.scope,
        key_of(cell.budget), machine_key(cell.machine), setting.host_scope,
        None if cell.host_budget is None else key_of(cell.host_budget),
    )  # fmt: skip


def _gap(hits: int, ends: Mapping[str, int]) -> float | None:
    """Gives the share of the hits between the two ends that a cell gains."""
    if len(ends) < len(GAP_BETWEEN):
        return None
    low, high = (ends[name] for name in GAP_BETWEEN)
    return (hits - low) / (high - low) if high > low else None
