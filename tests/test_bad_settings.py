"""A setting that makes no sense ends in one line that says what was expected, before anything is computed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command
from parity import LINK, small_trace

from specmd_jax.api import run, sweep
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import MISS
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.numbers import Range
from specmd_jax.setting import Setting
from specmd_jax.specs.hardware import hardware
from specmd_jax.types import Trace

ROOT = Path(__file__).parents[1]


@lru_cache
def trace(kind: str) -> Trace:
    """Small traces that carry logits and ahead scores, both, or neither."""
    return small_trace(0, tokens=6, prompt_tokens=2, with_logits="logits" in kind, with_ahead="ahead" in kind)


PLAIN, LOGITS, AHEAD = "plain", "logits", "ahead"

BAD: list[tuple[str, dict[str, Any], str]] = [
    # names
    (PLAIN, {"eviction": "lruu"}, "unknown eviction policy 'lruu'; did you mean 'lru'?"),
    (PLAIN, {"eviction": "least_stael"}, "did you mean 'least_stale'?"),
    (PLAIN, {"prefetch": "previuos"}, "unknown prefetch policy 'previuos'; did you mean 'previous'?"),
    (PLAIN, {"selection": "top_k"}, "unknown prefetch selection 'top_k'; did you mean 'topk'?"),
    (PLAIN, {"miss": "fecth"}, "unknown miss policy 'fecth'; did you mean 'fetch'?"),
    (PLAIN, {"routing": "standrad"}, "unknown routing policy 'standrad'; did you mean 'standard'?"),
    (PLAIN, {"hardware": "rtx409"}, "unknown hardware 'rtx409'; did you mean 'rtx4090'?"),
    (PLAIN, {"contract": "events"}, "unknown contract 'events'; did you mean 'event'?"),
    (PLAIN, {"scope": "globl"}, "unknown scope 'globl'; did you mean 'global'?"),
    (PLAIN, {"oversize": "holds"}, "unknown oversize 'holds'; did you mean 'hold'?"),
    (PLAIN, {"phase": "decod"}, "unknown phase 'decod'; did you mean 'decode'?"),
    # capacity
    (PLAIN, {"capacity": 45_055}, "expected at least one expert of the largest layer (45056 bytes)"),
    (PLAIN, {"capacity": "0 slots/layer", "scope": "layer"}, "expected at least one expert of that layer"),
    (PLAIN, {"capacity": "-1 slots"}, "is negative"),
    (PLAIN, {"capacity": "half"}, "cannot be read"),
    # schedule
    (PLAIN, {"batch": 0}, "batch is 0, expected at least 1"),
    (PLAIN, {"batch": 2, "reset_per_request": True}, "reset_per_request with batch 2, expected batch 1"),
    (PLAIN, {"prefill_chunk": 0}, "prefill_chunk is 0"),
    (PLAIN, {"warmup_tokens": -1}, "warmup_tokens is -1"),
    # prefetch
    (PLAIN, {"prefetch": "previous", "selection": "percentile", "percentile": 140}, "percentile is 140"),
    (PLAIN, {"percentile": -1}, "percentile is -1"),
    (PLAIN, {"percentile": float("nan")}, "percentile is nan"),
    (PLAIN, {"overfetch": 0}, "overfetch is 0, expected above 0"),
    (PLAIN, {"overfetch": float("inf")}, "expected above 0"),
    (PLAIN, {"prefetch": "previous", "horizon": 4}, "horizon is 4, expected 1..3"),
    (PLAIN, {"prefetch": "previous", "horizon": 0}, "horizon is 0, expected 1..3"),
    (PLAIN, {"prefetch": "gate_ahead"}, "'gate_ahead' needs a trace with `ahead` scores"),
    (AHEAD, {"prefetch": "gate_ahead", "horizon": 2}, "'gate_ahead' looks one layer ahead, not horizon 2"),
    # logits
    (PLAIN, {"routing": "cache_aware"}, "'cache_aware' needs a trace with the router's full logits"),
    (PLAIN, {"miss": "substitute"}, "'substitute' needs a trace with the router's full logits"),
    (LOGITS, {"routing": "cache_aware", "contract": "sequential"}, "logits with contract 'sequential'"),
    (LOGITS, {"routing": "cache_aware", "eviction": "belady"}, "'belady' knows the recorded routing"),
    (LOGITS, {"routing": "cache_aware", "eviction": "belady_bypass"}, "'belady_bypass' knows the recorded routing"),
    # precisions
    (PLAIN, {"precisions": (8, 4)}, "expected ascending bits"),
    (PLAIN, {"precisions": (8, 8)}, "expected ascending bits"),
    (PLAIN, {"precisions": (-4, 8)}, "expected ascending bits"),
    (PLAIN, {"precisions": ()}, "expected ascending bits"),
    (PLAIN, {"precisions": (4, float("nan"))}, "expected ascending bits"),
    *[
        (PLAIN, {"miss": name}, "that precision is not stored")
        for name in sorted(MISS)
        if MISS[name]().least_levels > 1
    ],
    (PLAIN, {"miss": "cascade", "precisions": (16,)}, "that precision is not stored"),
    # numbers of policies
    (PLAIN, {"dceay": 0.5, "eviction": "lfu_decay"}, "unknown policy number 'dceay'; did you mean 'decay'?"),
    (PLAIN, {"decay": 0.5}, "unknown policy number 'decay'"),
    (PLAIN, {"eviction": "lfu_decay", "decay": 1.01}, "eviction 'lfu_decay': decay is 1.01, expected 0 up to 1"),
    (PLAIN, {"eviction": "lfu_decay", "decay": -0.1}, "decay is -0.1, expected 0 up to 1"),
    (PLAIN, {"eviction": "lfu_decay", "decay": float("nan")}, "decay is nan"),
    (PLAIN, {"eviction": "lfu_decay", "decay": "slow"}, "decay is 'slow', expected 0 up to 1"),
    (PLAIN, {"eviction": "lfu_decay", "decay": np.array([0.5, 1.5])}, "decay is 1.5, expected 0 up to 1"),
    (PLAIN, {"eviction": "slru", "protected": 1.2}, "eviction 'slru': protected is 1.2, expected 0 up to 1"),
    (PLAIN, {"eviction": "slru", "protected": -0.2}, "protected is -0.2"),
    (PLAIN, {"eviction": "random", "seed": -1}, "seed is -1, expected a whole number from 0"),
    (PLAIN, {"eviction": "random", "seed": 0.5}, "seed is 0.5, expected a whole number from 0"),
    (
        PLAIN,
        {"eviction": "least_stale", "reading": "cyclical"},
        "unknown least_stale reading 'cyclical'; did you mean 'cyclic'?",
    ),
    (PLAIN, {"eviction": "least_stale", "reading": 3}, "eviction 'least_stale': reading is 3, expected a name"),
    (PLAIN, {"eviction": "fld", "distance": "far"}, "unknown fld distance 'far'"),
    (PLAIN, {"prefetch": "noisy", "precision": 0.0}, "prefetch 'noisy': precision is 0.0, expected above 0 up to 1"),
    (PLAIN, {"prefetch": "noisy", "precision": 1.5}, "precision is 1.5"),
    (PLAIN, {"prefetch": "noisy", "recall": 0}, "recall is 0, expected above 0 up to 1"),
    (PLAIN, {"prefetch": "noisy", "recall": 2}, "recall is 2"),
    (PLAIN, {"miss": "drop", "keep": -1}, "miss 'drop': keep is -1, expected a whole number from 0"),
    (PLAIN, {"miss": "fetch_priority", "precisions": (4, 16), "bottom": 60}, "bottom is 60, expected 0 up to 1"),
    (PLAIN, {"miss": "cascade", "precisions": (4, 16), "high": 1.1}, "high is 1.1, expected 0 up to 1"),
    (LOGITS, {"miss": "substitute", "tolerance": -0.1}, "tolerance is -0.1, expected 0 up to 1"),
    (LOGITS, {"routing": "cache_aware", "strength": -0.3}, "strength is -0.3, expected of at least 0"),
    # hardware
    (PLAIN, {"hardware": LINK.replace(link_bytes_per_s=-1.0)}, "link_bytes_per_s is -1.0: expected a positive rate"),
    (PLAIN, {"hardware": LINK.replace(memory_bytes_per_s=0.0)}, "memory_bytes_per_s is 0.0: expected a positive rate"),
    (PLAIN, {"hardware": LINK.replace(link_latency_s=-1e-6)}, "link_latency_s is -1e-06"),
]


def _one_line(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad setting must be found before a replay starts."""

    def started(*args: Any, **rest: Any) -> Any:
        raise AssertionError("a replay has started")

    monkeypatch.setattr("specmd_jax.engines.table.replay_spread", started)
    monkeypatch.setattr("specmd_jax.engines.curves.curves", started)


def _id(value: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("kind", "setting", "message"), BAD, ids=_id)
def test_run_refuses(kind: str, setting: dict[str, Any], message: str) -> None:
    _one_line(lambda: run(trace(kind), **setting), message)


SWEEPS = [case for case in BAD if not case[1].keys() & {"eviction", "capacity", "hardware"}]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("kind", "setting", "message"), SWEEPS[::4], ids=_id)
def test_sweep_refuses_before_the_first_row(kind: str, setting: dict[str, Any], message: str) -> None:
    settings = {"selection", "overfetch", "percentile", "horizon", "prefetch", "miss", "routing", "precisions", "batch"}
    settings |= {"scope", "contract", "phase", "reset_per_request", "warmup_tokens", "prefill_chunk", "oversize"}
    numbers = {k: v for k, v in setting.items() if k not in settings}
    named = {k: v for k, v in setting.items() if k in settings}
    _one_line(lambda: sweep(trace(kind), numbers={"lru": numbers}, **named), message)


def test_the_edges_of_a_range_are_allowed() -> None:
    Setting(eviction="lfu_decay", numbers={"decay": 1.0})
    Setting(eviction="slru", numbers={"protected": 0})
    Setting(eviction="lru", prefetch="noisy", numbers={"precision": 1, "recall": 1.0})
    Setting(eviction="random", numbers={"seed": np.arange(5)})
    Setting(eviction="lru", percentile=0, selection="percentile")


def test_traced_numbers_are_let_through() -> None:
    def decay(value: jax.Array) -> jax.Array:
        return Setting(eviction="lfu_decay", numbers={"decay": value}).mix(2).traced().eviction.numbers["decay"]

    np.testing.assert_array_equal(jax.jit(decay)(jnp.float32(0.5)), 0.5)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(0, 1), (0, 0.5, 1), (-0.1, 1.1, np.nan, np.inf)),
        (Range(0, 1, low_open=True), (0.1, 1), (0, -1)),
        (Range(0, 100, high_open=True), (0, 99.9), (100, 140)),
        (Range(0), (0, 1e9), (-1, np.inf)),
        (Range(1, whole=True), (1, 7), (0, 1.5)),
    ],
    ids=str,
)
def test_range(allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert allowed.holds(np.array(inside, float)).all()
    assert not allowed.holds(np.array(outside, float)).any()


def test_logits_that_nobody_reads_are_no_obstacle() -> None:
    """A trace with logits replays under the sequential contract, which cannot carry them."""
    shown = run(trace(LOGITS), eviction="lru", capacity=100_000, contract="sequential", hardware=None)
    assert shown.demand == shown.hits + shown.misses


def test_logits_left_out_of_the_schedule_are_named() -> None:
    replays = prepare(trace(LOGITS))
    _one_line(lambda: replays.setup(Mix.of("lru", miss="substitute"), None), "logits=True")


def test_unknown_numbers_of_a_hand_made_mix_are_refused() -> None:
    _one_line(
        lambda: Mix.of("lru", numbers={"eviction": {"decay": 0.5}}),
        "eviction 'lru' has no number 'decay'; it takes: none",
    )


@pytest.mark.parametrize(
    "broken", [{"link_bytes_per_s": 0.0}, {"peak_flops_per_s": float("nan")}, {"launch_s": float("inf")}], ids=str
)
def test_hardware_refuses(broken: dict[str, float]) -> None:
    _one_line(lambda: hardware(LINK.replace(**broken)), next(iter(broken)))


COMMANDS = [
    (("--evictions", "lru,least_stael"), "did you mean 'least_stale'?"),
    (("--capacities", "1MiB"), "expected at least one expert"),
    (("--capacities", "-3 slots,5%"), "-3 slots"),
    (("--hardware", "rtx409"), "did you mean 'rtx4090'?"),
    (("--batch", "2", "--reset-per-request"), "reset_per_request with batch 2, expected batch 1"),
    (("--batch", "-1"), "batch is -1, expected at least 1"),
    (("--batch", "two"), "invalid int value: 'two'"),
    (("--warmup-tokens", "-1"), "warmup_tokens is -1"),
    (("--warmup-tokens", "1000000"), "warmup_tokens"),
    (("--contract", "events"), "did you mean 'event'?"),
    (("--phase", "prefill"), "prefill"),
]


@pytest.mark.parametrize(("options", "message"), COMMANDS, ids=lambda value: " ".join(value))
def test_the_command_line_refuses(
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, "sweep", "--smoke", *options)
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert message in shown.err
    assert not any(tmp_path.iterdir())


def test_a_real_process_ends_with_status_2(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "experiments.sweep",
        "--smoke",
        "--scope",
        "galactic",
        "--out",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.stderr
    assert not any(tmp_path.iterdir())
