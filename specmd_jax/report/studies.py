"""Every study and what draws its result folder: its commands and `experiments.report` call the same function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError
from specmd_jax.report.document import UNFINISHED
from specmd_jax.report.pages import (
    benchmark,
    calibrate,
    capture,
    completion,
    evaluate_learned,
    learn_policy,
    offload,
    pack_moe,
    starts,
    study,
    train_moe,
    validate,
)
from specmd_jax.report.pages.hidden_prefetch import page as hidden_prefetch
from specmd_jax.report.pages.least_stale import page as least_stale
from specmd_jax.report.pages.paper import page as paper
from specmd_jax.report.pages.quality import page as quality
from specmd_jax.report.pages.recommend import page as recommend
from specmd_jax.report.pages.routing import page as routing
from specmd_jax.report.pages.sweep import page as sweep
from specmd_jax.report.pages.sweep.table import FIRST_KEY as SWEEP_KEY
from specmd_jax.report.reader import read_manifest, read_rows

DRAW: dict[str, Callable[[Path], str]] = {
    "sweep": sweep.draw,
    "recommend": recommend.draw,
    "paper": paper.draw,
    "least_stale": least_stale.draw,
    "study": study.draw,
    "starts": starts.draw,
    "routing": routing.draw,
    "evaluate_learned": evaluate_learned.draw,
    "learn_policy": learn_policy.draw,
    "hidden_prefetch": hidden_prefetch.draw,
    "offload": offload.draw,
    "pack_moe": pack_moe.draw,
    "quality": quality.draw,
    "completion": completion.draw,
    "calibrate": calibrate.draw,
    "capture": capture.draw,
    "train_moe": train_moe.draw,
    "benchmark": benchmark.draw,
    "validate": validate.draw,
}
"""Study -> a function that draws what it draws into the result folder and returns its text for a terminal."""


def redraw(out: Path) -> str:
    """Draws a result folder again; its text for a terminal.

    Raises `SpecmdError` for a folder without results or of a study that draws nothing, for a table without rows, and
    for one that was written before it had a column that is drawn.
    """
    manifest = read_manifest(out)
    name = _study_of(out, manifest)
    if not read_rows(out):
        raise SpecmdError(f"{out}: the table has no rows yet")
    try:
        text = DRAW[name](out)
    except KeyError as error:
        column = error.args[0]
        if column in manifest["columns"]:
            raise
        raise SpecmdError(f"{out}: the table has no column {column!r}: an older version of {name} wrote it") from error
    return text if manifest["complete"] else f"{text}\n! {UNFINISHED}"


def _study_of(out: Path, manifest: Mapping[str, Any]) -> str:
    """Names the study that made a folder. A sweep is told by its columns if its manifest is older than its name."""
    name = manifest.get("study")
    if name is None and manifest["key"] == list(SWEEP_KEY):
        return "sweep"
    if name is None:
        raise SpecmdError(f"{out}: its manifest does not say which study made it: run that study again")
    if name not in DRAW:
        raise SpecmdError(f"{out}: {name} draws nothing (expected results of {', '.join(DRAW)})")
    return name
