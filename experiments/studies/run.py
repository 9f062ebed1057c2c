"""The work of `experiments.run`: one replay, and the file that draws it over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.timelines import write_timelines
from specmd_jax import sweep, timeline
from specmd_jax.errors import SpecmdError
from specmd_jax.setting import make_setting
from specmd_jax.trace.bundled import load_named


def run(
    given: Mapping[str, Any], trace: str, tokens: int, path: Path | None, passes: int
) -> tuple[dict[str, Any], str]:
    """Replays the first `tokens` (0: all) with the given fields of `Setting`.

    Gives the metrics by name, and what was written to the timeline at `path`; "" for none.
    """
    setting = make_setting(**given)
    if path is not None and setting.hardware is None:
        raise SpecmdError("--timeline with --hardware none: a timeline is made of seconds, expected a machine")
    replayed, _ = load_named(trace, tokens or None)
    drawn = None if path is None else timeline(replayed, setting, passes=passes)
    (row,) = sweep(replayed, [setting])
    told = "" if path is None or drawn is None else write_timelines(path, drawn)
    return {name: value for name, value in row.items() if value is not None}, told
