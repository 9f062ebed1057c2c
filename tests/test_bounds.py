"""Bounds on the stall: worked by hand, against every policy of the engine, and between each other."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import reference
from handmade import decode_schedule
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from parity import LINK, costs, small_trace

from specmd_jax.bounds.stall import bracket, lower_bound, stall_bounds
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.sizes import sizes, work
from specmd_jax.errors import SpecmdError
from specmd_jax.schedule.future import future_mass
from specmd_jax.specs.hardware import Hardware
from specmd_jax.trace import bundled, first_tokens
from specmd_jax.types import Trace

# a copy takes 2 s, an expert 1 s, the dense part of a layer 1 s (both are a launch): any size and rate would do
COPY_2S = Hardware(
    link_bytes_per_s=2048.0,
    link_latency_s=0.0,
    peak_flops_per_s=np.inf,
    memory_bytes_per_s=np.inf,
    launch_s=1.0,
    host_flops_per_s=1.0,
    host_bytes_per_s=1.0,
)
SIZE = 4096


def by_hand(ids: list[list[list[int]]], layers: int, experts: int, **rest: Any) -> Prepared:
    """Decode passes over experts of `SIZE` bytes."""
    routed = np.array(ids, np.int16)
    one = np.full(layers, SIZE)
    trace = Trace(routed, np.array([len(ids)], np.int32), np.zeros(1, np.int32), experts, one)
    found = sizes(one, experts, None, 16.0)
    return Prepared(trace, decode_schedule(ids, layers, experts, **rest), found, work(trace, found.level_bytes, 16.0))


def both(replays: Prepared, slots: int) -> tuple[float, float]:
    lower_s, best = bracket(replays, slots * SIZE, COPY_2S)
    return lower_s, best.stall_s


def test_a_cold_start() -> None:
    # one visit, one expert, nothing resident: the copy takes 2 s before the expert can run, whatever one does
    assert both(by_hand([[[0]]], 1, 2), 4) == (2.0, 2.0)


def test_what_can_be_hidden_is_not_stall() -> None:
    # gate 0 at 0: copy 0 ends at 2 (2 s of stall), expert until 3, dense until 4. Copy 1 starts at 2 and ends at 4,
    # when its gate opens: no stall. Copy 2 likewise ends at 6, the next gate.
    assert both(by_hand([[[0]], [[1]], [[2]]], 1, 4), 4) == (2.0, 2.0)


def test_a_busy_link_adds_up() -> None:
    # two copies a visit take 4 s, the two experts and the dense part 3 s. From an empty cache three visits need 6
    # copies: the last ends at 12, its expert at 13; the computation up to there is 3 + 3 + 2 = 8, so 5 s of stall at
    # least. The schedule: gates at 0, 6 and 10. Copies end at 2, 4 | 6, 8 | 10, 12: experts are done at 5, 9 and 13.
    assert both(by_hand([[[0, 1]], [[2, 3]], [[4, 5]]], 1, 6), 6) == (5.0, 5.0)


def test_contents_at_the_start_of_a_window_are_free() -> None:
    # Both experts fit: after the cold start, which stalls for 3 s (done at 5 instead of 2), nothing is ever copied.
    assert both(by_hand([[[0, 1]]] * 5, 1, 2), 2) == (3.0, 3.0)


def test_a_reset_makes_cold_again() -> None:
    once, twice = by_hand([[[0, 1]]], 1, 2, resets=[0]), by_hand([[[0, 1]]] * 2, 1, 2, resets=[0, 1])
    assert both(once, 2) == (3.0, 3.0)
    # two windows, one after each reset, add up
    assert both(twice, 2) == (6.0, 6.0)


def test_too_small_a_cache_pays_again_and_again() -> None:
    # One slot, two experts in turn, demand pinned or not: a copy cannot start before the other expert's visit, or the
    # slot would hold two. Each visit is 1 + 1 s of computation, each copy 2 s: it may start when the expert runs (1 s
    # before the dense part), so the policy hides what the contract lets it.
    lower, feasible = both(by_hand([[[0]], [[1]]] * 4, 1, 2), 1)
    assert 2.0 <= lower <= feasible <= 2.0 * 8


MIXES = [
    *((name, "none") for name in reference.EVICTION),
    *((e, "perfect") for e in ("lru", "belady", "belady_bypass")),
]


def stall_s(replays: Prepared, eviction: str, prefetch: str, budget: Any, machine: Hardware, horizon: int = 1) -> float:
    """Total stall by the plain-Python replay, which the engine equals; `perfect` may take all it wants."""
    found = reference.replay(
        replays.schedule,
        eviction=eviction,
        budget=budget if np.ndim(budget) == 0 else [int(b) for b in budget],
        level_bytes=replays.sizes.level_bytes.tolist(),
        prefetch=prefetch,
        select_numbers={"count": 8.0},
        horizon=horizon,
        costs=costs(replays, machine),
        first_use=replays.first_use,
        future=future_mass(replays.schedule, horizon),
    )
    return float((found.stall_late_s + found.stall_miss_s + found.stall_link_busy_s).sum())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("schedule", [{}, {"reset_per_request": True}, {"contract": "sequential"}], ids=str)
def test_no_policy_stalls_less(scope: str, schedule: dict[str, Any]) -> None:
    replays = prepare(small_trace(11, tokens=30, expert_bytes=40960), **schedule)
    for slots, slow, overlaps in ((4, 1.0, 1.0), (12, 4.0, 1.0), (20, 1.0, 0.0)):
        budget: Any = slots * 40960 if scope == "global" else np.full(4, slots // 4 * 40960)
        machine = LINK.replace(link_bytes_per_s=LINK.link_bytes_per_s / slow, overlaps=overlaps)
        lower, best = bracket(replays, budget, machine)
        assert 0 < lower_bound(replays, budget, machine) <= lower <= best.stall_s * (1 + 1e-9)
        for eviction, prefetch in MIXES:
            found = stall_s(replays, eviction, prefetch, budget, machine, horizon=3)
            assert lower <= found * (1 + 1e-6), (eviction, prefetch, slots)


@st.composite
def routings(draw: st.DrawFn) -> Trace:
    """10 decoded tokens in two requests, 3 layers of 6 experts, top-2."""
    pair = st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True)
    ids = draw(st.lists(st.one_of(pair, pair, pair, st.just([-1, -1])), min_size=30, max_size=30))
    routed = np.array(ids, np.int16).reshape(10, 3, 2)
    return Trace(routed, np.array([6, 4], np.int32), np.zeros(2, np.int32), 6, np.full(3, 8192))


@hypothesis_settings(max_examples=60)
@given(
    trace=routings(),
    mix=st.sampled_from(MIXES),
    slots=st.integers(1, 18),
    slow=st.sampled_from([0.1, 0.5, 3.0]),
    layered=st.booleans(),
)
def test_any_routing(trace: Trace, mix: tuple[str, str], slots: int, slow: float, layered: bool) -> None:
    replays = prepare(trace)
    machine = LINK.replace(link_bytes_per_s=LINK.link_bytes_per_s / slow)
    budget: Any = np.full(3, -(-slots // 3) * 8192) if layered else slots * 8192
    lower, best = bracket(replays, budget, machine)
    assert lower <= best.stall_s * (1 + 1e-9) + 1e-12
    assert lower <= stall_s(replays, *mix, budget, machine, horizon=2) * (1 + 1e-6) + 1e-12


@hypothesis_settings(max_examples=60)
@given(trace=routings(), slots=st.integers(3, 12), copy=st.sampled_from([0.3, 1.0, 2.5]))
def test_the_lower_bound_is_no_more_than_exhaustive_search_finds(trace: Trace, slots: int, copy: float) -> None:
    """Windows from an empty cache: their loads are those of a search over all contents a policy may keep."""
    few = first_tokens(trace, 2)
    replays = prepare(few)
    machine = COPY_2S.replace(link_bytes_per_s=8192 / copy)
    demands = [frozenset((layer, int(e)) for e in np.flatnonzero(row)) for layer, row in _rows(replays)]
    least = _fewest_loads(demands, slots)
    total_work = sum(len(d) + 1 for d in demands)
    needed = [v for v, d in enumerate(demands) if d]
    if needed:
        # the whole stretch as one window: no bound that is right may fall below it, as it is among the windows
        window = least * copy + 1 - (total_work - 1)
        assert lower_bound(replays, slots * 8192, machine) >= window - 1e-6


def _rows(replays: Prepared) -> list[tuple[int, Any]]:
    return list(zip(replays.schedule.layer.tolist(), replays.schedule.count, strict=True))


def _fewest_loads(demands: list[frozenset[tuple[int, int]]], slots: int) -> int:
    """Loads on demand from an empty cache, over all ways to drop down to `slots` after each visit."""
    costs: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for demand in demands:
        found: dict[frozenset[tuple[int, int]], int] = {}
        for held, cost in costs.items():
            union, paid = held | demand, cost + len(demand - held)
            keep = [union] if len(union) <= slots else map(frozenset, combinations(sorted(union), slots))
            for kept in keep:
                found[kept] = min(found.get(kept, paid), paid)
        costs = found
    return min(costs.values())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_recorded_trace_is_bracketed(scope: str) -> None:
    """An expert takes half a layer's time to copy and a quarter of all fits: the bracket is closed to 5 %."""
    replays = prepare(first_tokens(bundled("gpt-oss-20b"), 40))
    machine = half_a_layer(replays)
    found = stall_bounds(replays, "25%", scope, machine)
    assert 0 < found.lower_s <= found.feasible_s <= 1.05 * found.lower_s
    budget = replays.trace.experts * int(replays.trace.expert_bytes.sum()) // 4
    each: Any = budget if scope == "global" else np.full(replays.trace.layers, budget // replays.trace.layers)
    for eviction, prefetch in (("lru", "none"), ("belady", "none"), ("belady", "perfect")):
        assert found.feasible_s <= stall_s(replays, eviction, prefetch, each, machine) * (1 + 1e-6)


def half_a_layer(replays: Prepared) -> Hardware:
    """A machine whose link copies an expert in half the time that a layer's computation takes."""
    machine = LINK.replace(link_latency_s=0.0)
    found = costs(replays, machine)
    layer_s = replays.trace.top_k * found.expert_s(0, 1, 1) + found.dense_s(0, 1, requests=1)
    return machine.replace(link_bytes_per_s=float(replays.trace.expert_bytes[0]) / (0.5 * layer_s))


def test_bad_input() -> None:
    trace = small_trace(0, tokens=6)
    with pytest.raises(SpecmdError, match="one stored precision"):
        stall_bounds(prepare(trace, precisions=(4.0, 16.0)))
    with pytest.raises(SpecmdError, match="'batch' was given beside it"):
        stall_bounds(prepare(trace), batch=2)
    with pytest.raises(SpecmdError, match="unknown cache scope"):
        stall_bounds(trace, scope="galaxy")
