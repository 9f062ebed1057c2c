"""`timeline`: some passes of a replay, with the begin and end of everything that happens in them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import simulate
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import Mix
from specmd_jax.progress import heartbeat
from specmd_jax.replay.state import Numbers, Setup, State, Visit
from specmd_jax.replay.state import begin as begin_replay
from specmd_jax.replay.totals import Events, Totals
from specmd_jax.setting import Setting, make_setting
from specmd_jax.timelines.drawing import Drawing, Start
from specmd_jax.timelines.parts import PASSES_SHOWN, Timeline
from specmd_jax.trace import as_trace
from specmd_jax.trace.door import Source
from specmd_jax.trace.stream import TraceFile
from specmd_jax.types import Schedule


def timeline(
    trace: Source,
    setting: Setting | None = None,
    /,
    *,
    passes: int = PASSES_SHOWN,
    first_pass: int | None = None,
    **changes: Any,
) -> Timeline:
    """Replays `trace` up to some passes, and gives what happens in these: every copy and computation with its begin and
    end, every stall, eviction and collision. What comes before them is replayed, too, but not shown.

    Args:
      trace, setting, changes: as for `run`; a trace in memory, and a setting with hardware.
      passes: how many at most.
      first_pass: where they begin; None: at the first one that is counted (`warmup_tokens`, `phase`).

    Raises:
      SpecmdError: as for `run`; a setting without hardware, a trace that is streamed, or passes that are not there.
    """
    source = as_trace(trace)
    if isinstance(source, TraceFile):
        raise SpecmdError(f"{source.path}: a timeline takes a trace in memory, expected one of load_trace")
    cell = make_setting(setting, **changes)
    machine, mix = cell.machine, cell.mix(source.top_k)
    if machine is None:
        raise SpecmdError("hardware is None, expected a machine: a timeline is made of seconds")
    prepared = prepare(source, logits=mix.declared().needs_logits, **cell.schedule)
    begin, end = window(prepared.schedule, passes, first_pass)
    setup = prepared.setup(mix, machine, **cell.options)
    numbers = prepared.numbers(cell.budget(source), machine, cell.host_budget(source))
    columns = prepared.columns(setup, mix, prepared.schedule.most)
    with heartbeat(f"replaying {int(prepared.schedule.pass_id[end - 1]) + 1:,} passes of {source.model}"):
        start, events = _replay(setup, numbers, mix, columns, begin, end)
    named = {name: value for name, value in cell.row().items() if value is not None}
    shown = prepared.schedule.pass_id[[begin, end - 1]].tolist()
    about = {"model": source.model, **named, "capacity": str(cell.capacity), "first pass": shown[0]}
    about |= {"last pass": shown[1], "passes of the replay": int(prepared.schedule.pass_id[-1]) + 1}
    parts = [source.model, named["eviction"], *([named["prefetch"]] if named["prefetch"] != "none" else [])]
    drawing = draw(prepared, setup, mix, numbers, events, begin, start)
    return drawing.finish(f"{', '.join(map(str, parts))}, {cell.capacity}", about)


def window(schedule: Schedule, passes: int, first_pass: int | None) -> tuple[int, int]:
    """Gives the first visit of some passes, and the one behind the last. Raises SpecmdError for passes that are not
    there.
    """
    last = int(schedule.pass_id[-1])
    if first_pass is None:
        counted = np.flatnonzero(schedule.counted)
        first_pass = int(schedule.pass_id[counted[0]]) if counted.size else 0
    if passes < 1:
        raise SpecmdError(f"passes is {passes}, expected at least 1")
    if not 0 <= first_pass <= last:
        raise SpecmdError(f"first_pass is {first_pass}, expected 0..{last}: the replay has {last + 1} passes")
    begin, end = np.searchsorted(schedule.pass_id, [first_pass, first_pass + passes])
    return int(begin), int(end)


def draw(
    prepared: Prepared,
    setup: Setup,
    mix: Mix,
    numbers: Numbers,
    events: Events,
    first_visit: int = 0,
    start: Start | None = None,
) -> Drawing:
    """Draws visits from what a timed replay gives of them in full (numpy, leading axis: visits).

    Args:
      setup, mix, numbers: of the replay.
      first_visit: of the events.
      start: what this visit finds; None: the beginning of a replay.

    Raises:
      SpecmdError: a visit whose pieces do not add up to the replay's seconds.
    """
    begins = begin_replay(setup, mix.traced().build(), numbers)
    level, in_host = (
        np.asarray(begins.cache.level),
        None if begins.host is None else np.asarray(begins.host.cache.level),
    )
    drawing = Drawing(prepared, setup, numbers, level, start or Start(), first_visit, in_host)
    for place in range(len(events.outcome)):
        drawing.visit(first_visit + place, jax.tree.map(lambda column, at=place: column[at], events))
    return drawing


def _replay(setup: Setup, numbers: Numbers, mix: Mix, visits: Visit, begin: int, end: int) -> tuple[Start, Events]:
    """Replays the visits before `begin` for their end alone, and those up to `end` in full, [end - begin, ...]."""

    def cut(first: int, last: int) -> Visit:
        return jax.tree.map(lambda column: column[first:last], visits)

    carry, start = None, Start()
    if begin:
        carry, _ = _stretch(setup, numbers, mix.traced(), cut(0, begin))
        state = carry[0]
        level = np.asarray(state.cache.level)
        fresh = (np.asarray(state.fresh) > 0) & (level > 0)
        start = Start(float(state.flight.link_s), int(state.flight.expert), level, fresh)
        if state.host is not None:
            in_host = np.asarray(state.host.cache.level)
            start = replace(start, storage_s=float(state.host.storage_s), in_host=in_host)
            if (early := state.host.early) is not None:
                read = (np.asarray(early.fresh) > 0) & (in_host > 0)
                start = replace(start, reading=int(early.flight.expert), read=read)
    _, events = _stretch(setup._replace(detail="full"), numbers, mix.traced(), cut(begin, end), carry)
    assert events is not None
    return start, jax.tree.map(np.asarray, events)


@partial(jax.jit, static_argnames="setup")
def _stretch(
    setup: Setup, numbers: Numbers, mix: Mix, visits: Visit, carry: tuple[State, Totals] | None = None
) -> tuple[tuple[State, Totals], Events | None]:
    return simulate(setup, mix.build(), numbers, visits, carry)
