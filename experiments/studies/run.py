"""The work of `experiments.run`: one replay, the file that draws it over time, and the tables of its page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.timelines import write_timelines
from specmd_jax import sweep, timeline
from specmd_jax.errors import SpecmdError
from specmd_jax.report.pages.run.table import RESIDENCY, Stay, table_of, write_stays
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting, make_setting
from specmd_jax.timelines.residency import STATES, residency
from specmd_jax.trace.bundled import load_named
from specmd_jax.types import Trace


def run(
    given: Mapping[str, Any],
    trace: str,
    tokens: int,
    path: Path | None,
    passes: int,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> tuple[dict[str, Any], str]:
    """Replays the first `tokens` (0: all) with the given fields of `Setting`.

    Gives the metrics by name, and what was written to the timeline at `path`; "" for none. With `out` the metrics and
    who was in the cache are written there, for the page.
    """
    setting = make_setting(**given)
    if path is not None and setting.hardware is None:
        raise SpecmdError("--timeline with --hardware none: a timeline is made of seconds, expected a machine")
    replayed, digest = load_named(trace, tokens or None)
    drawn = None if path is None else timeline(replayed, setting, passes=passes)
    if out is None:
        (row,) = sweep(replayed, [setting])
    else:
        told = {"trace": Path(trace).name, "tokens": tokens} | {name: str(value) for name, value in given.items()}
        with ResultWriter(out, told, table_of(setting.row()), overwrite, resume, digest) as writer:
            (row,) = sweep(replayed, [setting])
            _write(writer, replayed, setting, row)
    told = "" if path is None or drawn is None else write_timelines(path, drawn)
    return {name: value for name, value in row.items() if value is not None}, told


def _write(writer: ResultWriter, trace: Trace, setting: Setting, row: Mapping[str, Any]) -> None:
    """Writes what the page is drawn from: the row last, as it says that the rest is there."""
    seen = residency(trace, setting)
    stays, shown = seen.stays()
    more = {"passes": seen.passes, "first_shown": seen.first_pass, "shown": shown}
    more |= {"layers": trace.layers, "experts": trace.experts}
    writer.begin()
    write_stays(writer.out_dir / RESIDENCY, [Stay(*stay[:4], STATES[stay.state]) for stay in stays])
    writer.write({name: more.get(name, row.get(name)) for name in writer.table.columns})
