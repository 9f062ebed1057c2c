"""The compiled curves equal the plain-Python reference and the scan, and their two kernels equal each other."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pytest
import reference
from handmade import pass_schedule
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from parity import small_trace

from specmd_jax.engines import curves as curves_module
from specmd_jax.engines.curves import CurveTotals, curves
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import EVICTION
from specmd_jax.policies.choice import Mix
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.demand import pack
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.trace import bundled, first_tokens
from specmd_jax.types import Schedule

CURVES = frozenset(name for name in EVICTION if EVICTION[name]().curve is not None)
UNITS = np.array([10, 9, 10, 11])
SCHEDULES: dict[str, dict[str, Any]] = {
    "event": {"warmup_tokens": 6},
    "sequential": {"contract": "sequential", "phase": "decode"},
    "sequential-id": {"contract": "sequential-id"},
    "resets": {"reset_per_request": True, "warmup_tokens": 2},
    "batch": {"batch": 2, "prefill_chunk": 2, "phase": "prefill"},
    "drafts": {"batch": 2, "drafts": Drafts(3, 0.6), "phase": "decode"},
}


def reference_totals(
    schedule: Schedule,
    units: npt.ArrayLike,
    budget: Any,
    eviction: str,
    numbers: dict[str, Any] | None = None,
    hold: bool = False,
) -> CurveTotals:
    out = reference.replay(
        schedule,
        eviction=eviction,
        numbers=numbers,
        budget=int(budget) if np.ndim(budget) == 0 else [int(b) for b in budget],
        level_bytes=[np.asarray(units).tolist()],
        oversize="hold" if hold else "stream",
    )
    layers, counted = schedule.layers, schedule.counted

    def by_layer(mask: Any) -> Any:
        return np.bincount(schedule.layer[counted], np.asarray(mask)[counted].sum(axis=1), layers).astype(np.int64)

    evicted = [f // schedule.experts for v in np.flatnonzero(counted) for f in out.evicted[v]]
    misses = by_layer(out.outcome == reference.FETCHED)
    demand = by_layer(out.outcome != reference.NOT_DEMANDED)
    return CurveTotals(
        demand,
        demand - misses,
        misses,
        by_layer(out.collision),
        np.bincount(evicted, minlength=layers).astype(np.int64),
    )


def same(found: CurveTotals, expected: CurveTotals, what: object) -> None:
    for name, a, b in zip(CurveTotals._fields, found, expected, strict=True):
        np.testing.assert_array_equal(a, b, f"{name} by layer at {what}")


def without_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves_module, "_NEEDS_RESIDENCY", range(100))


def test_only_policies_of_the_table_are_served() -> None:
    assert set(EVICTION) >= CURVES


@pytest.mark.parametrize("scope", ["global", "global, equal sizes", "layer"])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("eviction", sorted(CURVES))
def test_equals_the_reference(eviction: str, kind: str, scope: str) -> None:
    schedule = build_schedule(small_trace(len(kind)), **SCHEDULES[kind])
    units = np.full(4, 10) if "equal" in scope else UNITS
    budgets: list[Any] = [0, 15, 100, 215] if kind == "event" else [45, 200]
    if scope == "layer":
        budgets = [np.array(b) for b in ([0, 9, 25, 5], [31, 20, 28, 23], [60, 54, 65, 88])]
    for hold in (False, True) if "event" in kind or "sequential" in kind else (False,):
        found = curves(schedule, units, budgets, eviction, hold=hold)
        for budget, totals in zip(budgets, found, strict=True):
            same(totals, reference_totals(schedule, units, budget, eviction, hold=hold), (budget, hold))


@pytest.mark.parametrize(
    ("eviction", "numbers"),
    [
        ("random", {"seed": 7}),
        ("lfu_decay", {"decay": 0.5}),
        ("slru", {"protected": 0.25}),
        ("fld", {"distance": "absolute"}),
        ("least_stale", {"reading": "left_first"}),
    ],
)
def test_numbers_of_a_policy(eviction: str, numbers: dict[str, Any]) -> None:
    schedule = build_schedule(small_trace(2))
    budgets = [9, 13, 20]
    plain = curves(schedule, np.ones(4, int), budgets, eviction)
    set_ = curves(schedule, np.ones(4, int), budgets, eviction, numbers)
    assert any((a.hits != b.hits).any() for a, b in zip(plain, set_, strict=True))
    for budget, totals in zip(budgets, set_, strict=True):
        same(totals, reference_totals(schedule, [1] * 4, budget, eviction, numbers), budget)


@pytest.mark.parametrize("eviction", sorted(CURVES - {"fifo", "lfu_resident", "slru"}))
def test_both_kernels_agree_at_every_capacity(eviction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = build_schedule(first_tokens(bundled(), 300), warmup_tokens=20)
    budgets: list[Any] = [
        *range(schedule.most, 769, 1 if eviction == "lru" else 19),
        *(np.full(24, b) for b in range(4, 33, 4)),
    ]
    units, demand = np.ones(24, int), pack(schedule)
    stacked = curves(schedule, units, budgets, eviction, demand=demand)
    without_stack(monkeypatch)
    for budget, a, b in zip(budgets, stacked, curves(schedule, units, budgets, eviction, demand=demand), strict=True):
        same(a, b, budget)


@pytest.mark.parametrize("eviction", ["lfu_decay", "slru", "least_stale"])
def test_equals_the_scan(eviction: str) -> None:
    # with decay 0.5, values of lfu_decay become smaller than the smallest normal float32
    replays = prepare(first_tokens(bundled(), 300), warmup_tokens=100)
    numbers = {"eviction": {"decay": 0.5}} if eviction == "lfu_decay" else {}
    mix = Mix.of(eviction, numbers=numbers)
    setup = replays.setup(mix, None)
    size = int(replays.trace.expert_bytes[0])
    budgets = [100, 400]
    found = curves(replays.schedule, replays.sizes.units[1], budgets, eviction, numbers.get("eviction"))
    for slots, totals in zip(budgets, found, strict=True):
        given_ = replays.numbers(slots * size, None)
        (_, scan), _ = replay_many(setup, (), given_, mix.traced(), replays.visits(setup, mix))
        experts = jax.tree.map(np.asarray, scan.experts)
        expected = CurveTotals(
            experts.demand, experts.reused, experts.fetched, experts.collisions, np.asarray(scan.evictions)
        )
        same(totals, expected, slots)


@st.composite
def routings(draw: st.DrawFn) -> Schedule:
    """8 passes of one or two tokens over 3 layers of 5 experts, top-2, some layers skipped, some resets."""
    pair = st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)
    token = st.lists(st.one_of(pair, pair, st.just([])), min_size=3, max_size=3)
    passes = draw(st.lists(st.lists(token, min_size=1, max_size=2), min_size=8, max_size=8))
    order = draw(st.sampled_from(["atomic", "sequential", "sequential-id"]))
    return pass_schedule(passes, 3, 5, order=order, resets=draw(st.sets(st.integers(0, 7), max_size=2)))


@pytest.mark.parametrize("eviction", sorted(CURVES))
@hypothesis_settings(max_examples=10)
@given(schedule=routings(), units=st.sampled_from([[1, 1, 1], [2, 2, 2], [2, 1, 3]]))
def test_any_routing(eviction: str, schedule: Schedule, units: list[int]) -> None:
    budgets = [2, 5, 9, np.array([2, 1, 4]), np.array([6, 4, 12])]
    for budget, totals in zip(budgets, curves(schedule, units, budgets, eviction), strict=True):
        same(totals, reference_totals(schedule, units, budget, eviction), budget)


def test_laws() -> None:
    schedule = build_schedule(first_tokens(bundled(), 300))
    units, budgets = np.ones(24, int), [4, 50, 150, 400, 768]
    found = {name: curves(schedule, units, budgets, name) for name in CURVES}
    misses = {name: [int(t.misses.sum()) for t in totals] for name, totals in found.items()}
    demanded = np.zeros((24, schedule.experts), bool)
    np.logical_or.at(demanded, schedule.layer, schedule.count > 0)
    compulsory = int(demanded.sum())
    for name, totals in found.items():
        for t in totals:
            np.testing.assert_array_equal(t.hits + t.misses, t.demand)
            assert (t.misses - t.evictions >= 0).all() and (t.collisions <= t.misses).all()
        assert all(a <= b for a, b in zip(misses["belady_bypass"], misses[name], strict=True)), name
        if name != "belady_bypass":
            assert all(a <= b for a, b in zip(misses["belady"], misses[name], strict=True)), name
        assert misses[name][-1] == compulsory
        assert found[name][-1].evictions.sum() == 0


def test_progress_counts_every_budget() -> None:
    schedule = build_schedule(small_trace(1))
    seen: list[int] = []
    curves(schedule, np.ones(4, int), [1, 9, 20, np.full(4, 8)], "lru", progress=seen.append)
    assert sum(seen) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eviction": "lro"}, "did you mean 'lru'"),
        ({"settings": {"seed": 1}}, "no number 'seed'"),
        ({"eviction": "lfu_decay", "settings": {"decay": -1.0}}, "decay is -1.0"),
        ({"eviction": "fld", "settings": {"distance": "far"}}, "far"),
        ({"units": [1, 1]}, "units: shape"),
        ({"units": [1, 1, 0, 1]}, "units is"),
        ({"budgets": [3, 2.5]}, r"budgets\[1\] is 2.5"),
        ({"budgets": [[1, 2]]}, r"budgets\[0\]: shape"),
        ({"budgets": [-1]}, r"budgets\[0\] is -1"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    schedule = build_schedule(small_trace(1))
    arguments: dict[str, Any] = {"units": [1] * 4, "budgets": [3], "eviction": "lru", **change}
    with pytest.raises(SpecmdError, match=message):
        curves(schedule, **arguments)


def test_kernels_are_usable_where_nothing_can_be_written() -> None:
    script = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"  # as when no place is writable
        "from specmd_jax.engines.curves_kernels import _hash31\n"
        "print(_hash31(1, 2, 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(reference.hash31(1, 2, 3)), done.stderr
