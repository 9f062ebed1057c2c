"""A path that no system takes ends in one line, wherever it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import options
from specmd_jax import (
    Trace,
    import_trace,
    load_profile,
    load_trace,
    open_trace,
    profile_of,
    run,
    save_profile,
    save_trace,
    sweep,
    synthesize,
)
from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Column, Table
from specmd_jax.report.reader import read_rows
from specmd_jax.report.writer import ResultWriter
from specmd_jax.schedule.export import export_trace
from specmd_jax.specs.hardware import hardware
from specmd_jax.specs.models import model
from specmd_jax.timelines.chrome import check_timeline_path
from specmd_jax.trace.bundled import is_bundled, load_named

LONG = "long" * 2_000


def _written(trace: Trace) -> None:
    del trace
    with ResultWriter(LONG, {}, Table("toy", {"a": Column("int", "")}, ("a",))) as writer:
        writer.write({"a": 1})


CALLS: dict[str, Callable[[Trace], Any]] = {
    "run": lambda trace: run(f"{LONG}.npz"),
    "run, no ending": lambda trace: run(LONG),
    "sweep": lambda trace: list(sweep(Path(LONG), eviction="lru")),
    "load_trace": lambda trace: load_trace(LONG),
    "open_trace": lambda trace: open_trace(f"{LONG}.npz"),
    "save_trace": lambda trace: save_trace(trace, f"{LONG}.npz"),
    "load_named": lambda trace: load_named(f"{LONG}.npz"),
    "is_bundled": lambda trace: is_bundled(LONG),
    "import_trace": lambda trace: import_trace(LONG),
    "export_trace": lambda trace: export_trace(trace, LONG),
    "load_profile": lambda trace: load_profile(LONG),
    "save_profile": lambda trace: save_profile(profile_of(trace), f"{LONG}.json"),
    "warm start": lambda trace: run(trace, warm_start=f"{LONG}.npz"),
    "model": lambda trace: model(LONG),
    "model, a file": lambda trace: model(Path(LONG)),
    "hardware": lambda trace: hardware(f"{LONG}.json"),
    "timeline": lambda trace: check_timeline_path(Path(f"{LONG}.json")),
    "read_rows": lambda trace: read_rows(LONG),
    "results": _written,
    "a trace by option": lambda trace: options.TRACES.find(f"{LONG}.npz"),
    "a model by option": lambda trace: options.MODELS.find(f"folder/{LONG}"),
    "a machine by option": lambda trace: options.HARDWARE.find(f"{LONG}.json"),
    "a folder by option": lambda trace: options.folder(LONG, "config.json"),
}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthesize(layers=2, experts=4, top_k=1, tokens=4, seed=0)


@pytest.mark.parametrize("name", CALLS)
def test_it_is_one_line(name: str, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecmdError) as caught:
        CALLS[name](trace)
    assert str(caught.value).isprintable() and "long" in str(caught.value)
    assert not list(tmp_path.iterdir())
