"""Compiled programs are let go before they hold more memory maps than the system allows, and results stay the same."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import pytest

from specmd_jax import Metrics, bundled, open_trace, prepare, programs, run, save_trace, sweep, timeline, totals
from specmd_jax.engines.requests import replay_requests
from specmd_jax.learn.evaluation import hits_by_request, recall_by_request
from specmd_jax.policies.choice import Mix
from specmd_jax.specs.hardware import HARDWARE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any program at all is one too many."""
    monkeypatch.setattr(programs, "most_maps", lambda: 0)


def test_programs_are_let_go_once_something_was_compiled(crowded: None) -> None:
    @jax.jit
    def more(x: int) -> jax.Array:
        return jax.numpy.int32(x) + 12_345

    assert more(1) == 12_346 and more._cache_size() == 1  # type: ignore[attr-defined]
    assert programs.room_for_programs() and more._cache_size() == 0  # type: ignore[attr-defined]
    assert not programs.room_for_programs(), "nothing was compiled since"
    assert more(1) == 12_346


def test_there_is_room_as_long_as_the_limit_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.jit(lambda x: x + 54_321)(1)
    monkeypatch.setattr(programs, "most_maps", lambda: 1 << 30)
    assert not programs.room_for_programs()
    jax.jit(lambda x: x + 54_322)(1)
    monkeypatch.setattr(programs, "most_maps", lambda: None)
    assert not programs.room_for_programs(), "where the system has no such limit nothing is done"


def test_replays_make_room_and_give_the_same(crowded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = bundled("gpt-oss-20b", tokens=4)

    def once() -> Metrics:
        return run(trace, eviction="lru", capacity="25%", hardware=None, engine="scan")

    first = once()
    cleared: list[bool] = []
    clear = jax.clear_caches
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True) or clear())
    assert once().row() == first.row() and cleared


class LetGo(Exception):
    """Programs were let go."""


@pytest.fixture
def at_once(crowded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something was compiled, and the first that would let programs go ends there: nothing is replayed."""

    def end() -> None:
        raise LetGo

    monkeypatch.setattr(jax, "clear_caches", end)
    monkeypatch.setattr(programs, "_since", [1])


def _file(folder: Path) -> Any:
    save_trace(bundled("gpt-oss-20b", tokens=4), folder / "trace.npz")
    return open_trace(folder / "trace.npz")


FUNCTIONS: dict[str, Callable[[Path], Any]] = {
    "run": lambda folder: run(bundled("gpt-oss-20b", tokens=4)),
    "run, streamed": lambda folder: run(_file(folder), eviction="lru", engine="scan"),
    "sweep": lambda folder: list(sweep(bundled("gpt-oss-20b", tokens=4), eviction=["lru", "lfu"])),
    "totals": lambda folder: totals(prepare(bundled("gpt-oss-20b", tokens=4))),
    "timeline": lambda folder: timeline(bundled("gpt-oss-20b", tokens=4)),
    "by request": lambda folder: replay_requests(
        prepare(bundled("gpt-oss-20b", tokens=4)), Mix.of("lru"), [1 << 30], HARDWARE["rtx4090"]
    ),
    "hits of requests": lambda folder: hits_by_request(bundled("gpt-oss-20b", tokens=4), "lru", [1 << 30]),
    "recall of requests": lambda folder: recall_by_request(bundled("gpt-oss-20b", tokens=4), "transition", [4]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_whatever_replays_lets_programs_go_first(name: str, at_once: None, tmp_path: Path) -> None:
    with pytest.raises(LetGo):
        FUNCTIONS[name](tmp_path)


STUDIES = ("run", "sweep", "study", "recommend", "paper", "least_stale", "starts", "evaluate_learned", "learn_policy")
"""What compiles replays in its smoke run; `validate` and `benchmark` do so in their full ones alone."""


@pytest.mark.parametrize("name", STUDIES)
def test_studies_let_programs_go(name: str, at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LetGo):
        import_module(f"experiments.{name}").main(["--tokens", "4"] if name == "run" else ["--smoke"])


def test_programs_stay_while_a_function_is_traced(crowded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    monkeypatch.setattr(programs, "_since", [1])

    def traced(x: jax.Array) -> jax.Array:
        assert not programs.room_for_programs()
        return x

    jax.eval_shape(traced, jax.numpy.zeros(()))
    assert not cleared and programs.room_for_programs() and cleared, "the next call makes up for it"


MIXES, BY_RUN = 200, 60
HUNDREDS = """
import itertools, json, sys
from specmd_jax import EVICTION, PREFETCH, Setting, bundled, explain, programs, run, sweep
from specmd_jax.errors import SpecmdError

trace, wanted = bundled("gpt-oss-20b", tokens=3), []
for miss, eviction, prefetch in itertools.product(("fetch", "drop"), EVICTION, PREFETCH):
    cell = Setting(eviction=eviction, prefetch=prefetch, miss=miss, capacity="25%", hardware=None)
    try:
        explain(trace, cell)
    except SpecmdError:  # the trace lacks what this policy reads
        continue
    wanted.append(cell)
assert len(wanted) >= int(sys.argv[1]), len(wanted)
alone, wanted = wanted[:int(sys.argv[2])], wanted[int(sys.argv[2]):int(sys.argv[1])]
print(programs.maps(), flush=True)
for cell in alone:
    assert run(trace, cell, engine="scan").demand
    print(programs.maps(), flush=True)
for row in sweep(trace, wanted, engine="scan"):
    assert row["demand"]
    print(programs.maps(), flush=True)
"""


@pytest.mark.long
@pytest.mark.skipif(programs.most_maps() is None, reason="this system has no limit of maps")
def test_one_process_replays_two_hundred_mixes() -> None:
    """Ten minutes or more: it compiles every one of them, and without letting go the system would end the process."""
    words = [sys.executable, "-c", HUNDREDS, str(MIXES), str(BY_RUN)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    held = [int(line) for line in done.stdout.split()]
    assert len(held) == MIXES + 1
    grown = [after - before for before, after in itertools.pairwise(held)]
    most, limit = programs.most_maps(), int(Path("/proc/sys/vm/max_map_count").read_text())
    print(f"at most {max(held):,} maps; {sum(max(0, one) for one in grown):,} were taken, {limit:,} are allowed")
    assert most is not None and most < max(held) < most + 2_000
    assert sum(max(0, one) for one in grown) > limit, "without letting go it would not have come to an end"
