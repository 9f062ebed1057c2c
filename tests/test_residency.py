"""Who is in the cache pass by pass: what the replay counts, and what its events say, visit after visit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from parity import small_trace

from specmd_jax import run
from specmd_jax.errors import SpecmdError
from specmd_jax.report.pages.run import views
from specmd_jax.report.pages.run.table import Stay as Drawn
from specmd_jax.report.studies import redraw
from specmd_jax.timelines.residency import (
    ABSENT,
    EARLY_HIT,
    HIT,
    KEPT,
    MISS,
    NOT_COPIED,
    STATES,
    Residency,
    residency,
)
from specmd_jax.trace import save_trace
from specmd_jax.trace.stream import open_trace

CASES: dict[str, dict[str, Any]] = {
    "lru": {},
    "copies ahead": {"prefetch": "transition", "hardware": "pcie4-x16", "capacity": "40%"},
    "a cache for each request": {"reset_per_request": True},
    "what is not copied": {"miss": "drop"},
}


@pytest.mark.parametrize("name", CASES)
def test_states_add_up_to_what_run_counts(name: str) -> None:
    trace = small_trace(3, tokens=24, requests=3)
    given: dict[str, Any] = {"eviction": "lru", "capacity": "50%", "hardware": None} | CASES[name]
    seen, metrics = residency(trace, **given), run(trace, **given, engine="scan")
    count = np.bincount(seen.state.ravel(), minlength=len(STATES))
    assert seen.state.shape == (seen.passes, trace.layers, trace.experts) and seen.first_pass == 0
    assert count[HIT] == metrics.hits_reuse and count[EARLY_HIT] == metrics.hits_prefetch + metrics.hits_late
    assert count[MISS] + count[NOT_COPIED] == metrics.misses and count[NOT_COPIED] == metrics.dropped
    assert (count[NOT_COPIED] > 0) == (name == "what is not copied")
    if name != "lru":
        return
    later = residency(trace, **given, first_pass=2, passes=3)
    assert later.first_pass == 2 and (later.state == seen.state[2:5]).all()


def test_nobody_leaves_a_cache_that_holds_everything() -> None:
    seen = residency(small_trace(3, tokens=24), eviction="lru", capacity="100%", hardware=None).state
    came = (seen == MISS).argmax(axis=0)
    for at in range(1, len(seen)):
        assert set(seen[at][(came < at) & (seen == MISS).any(axis=0)].tolist()) <= {KEPT, HIT}


def test_stays_say_the_same_and_are_cut_where_they_are_too_many() -> None:
    seen = residency(small_trace(5, tokens=24, requests=2), eviction="lru", capacity="30%", hardware=None)
    stays, shown = seen.stays()
    again = np.zeros_like(seen.state)
    for stay in stays:
        again[stay.first : stay.last + 1, stay.layer, stay.expert] = stay.state
    assert shown == seen.passes and (again == seen.state).all()
    few, cut = seen.stays(most=len(stays) // 2)
    assert 0 < cut < shown and len(few) <= len(stays) // 2
    assert max(stay.last for stay in few) == cut - 1
    assert seen.stays(most=0)[1] == 1, "one pass at least"


def test_arrivals_count_every_copy() -> None:
    state = np.array([MISS, MISS, KEPT, ABSENT, MISS, HIT], np.int8).reshape(-1, 1, 1)
    stays, _ = Residency(0, state, 6).stays()
    assert views.arrivals([Drawn(*stay[:4], STATES[stay.state]) for stay in stays]) == [1, 2, 2]


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match="first_pass is 99, expected"):
        residency(small_trace(3), first_pass=99)
    save_trace(small_trace(3), tmp_path / "trace.npz")
    with pytest.raises(SpecmdError, match="residency takes a trace in memory"):
        residency(open_trace(tmp_path / "trace.npz"))


@pytest.mark.slow
def test_a_browser_shows_the_layer_that_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = chromium.found()
    if program is None:
        pytest.skip(f"no browser: expected one of {', '.join(chromium.NAMES)} on the PATH")
    from experiments.run import main

    monkeypatch.chdir(tmp_path)
    save_trace(small_trace(3, tokens=24), tmp_path / "trace.npz")
    main(["--trace", "trace.npz", "--hardware", "none", "--out", "out"])
    redraw(tmp_path / "out")
    canvas = "document.querySelector('#chart-{} canvas').toDataURL()"
    with chromium.browsing(program, tmp_path / "profile") as tab:
        tab.open(tmp_path / "out" / "report.html")
        before = [tab.run(canvas.format(at)) for at in (0, 1)]
        tab.run("(() => { const s = document.querySelector('[data-filter=layer]'); s.value = '1';"
                "s.dispatchEvent(new Event('change')); })()")  # fmt: skip
        tab.drawn(2)
        assert tab.run(canvas.format(0)) != before[0], "another layer"
        assert tab.run(canvas.format(1)) == before[1], "all layers, as before"
        assert tab.errors == []
