"""The engine equals the plain-Python reference, event for event and time for time, over the whole policy tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from parity import compare, small_trace

from specmd_jax.engines.prepared import prepare
from specmd_jax.policies import EVICTION, MISS, PREFETCH, SELECTION
from specmd_jax.policies.choice import Mix
from specmd_jax.types import Trace

pytestmark = pytest.mark.usefixtures("strict_promotion")

LAYER_QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])


CONTRACTS = ("event", "sequential", "sequential-id")


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("eviction", EVICTION)
def test_eviction(eviction: str, scope: str) -> None:
    for seed, budget in enumerate((180_000, 420_000, 900_000)):
        for contract in CONTRACTS:
            size = budget if scope == "global" else LAYER_QUOTAS * (seed + 1) // 2
            compare(small_trace(seed), Mix.of(eviction), size, schedule={"contract": contract})


MIXES = [
    (prefetch, selection, eviction)
    for prefetch in PREFETCH
    for selection, eviction in zip([*SELECTION, *SELECTION], ["lru", "least_stale", "belady", "slru"], strict=True)
]


@pytest.mark.parametrize(("prefetch", "selection", "eviction"), MIXES)
def test_prefetch(prefetch: str, selection: str, eviction: str) -> None:
    horizon = 1 if prefetch == "gate_ahead" else 2
    count: dict[str, Any] = {"count": 3.0} if selection == "topk" else {"percentile": 60.0}
    mix = Mix.of(eviction, prefetch, selection, numbers={"selection": count})
    for seed, budget in enumerate((200_000, 450_000, 900_000)):
        compare(small_trace(seed, tokens=30), mix, budget, horizon=horizon)


def test_noise_with_numbers_of_its_own() -> None:
    numbers: dict[str, Any] = {"prefetch": {"precision": 0.4, "recall": 0.55, "seed": 3}, "selection": {"count": 3.0}}
    compare(small_trace(2), Mix.of("lru", "noisy", numbers=numbers), 450_000, horizon=2)


@pytest.mark.parametrize("may_evict", [True, False])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prefetch_in_every_contract(scope: str, may_evict: bool) -> None:
    budget = 420_000 if scope == "global" else LAYER_QUOTAS
    mix = Mix.of("least_stale", "previous", numbers={"selection": {"count": 2.0}})
    for contract in CONTRACTS:
        compare(small_trace(3), mix, budget, schedule={"contract": contract}, may_evict=may_evict, horizon=3)


@pytest.mark.parametrize("prefetch", ["none", "perfect"])
def test_untimed(prefetch: str) -> None:
    compare(small_trace(4), Mix.of("lfu", prefetch, numbers={"selection": {"count": 2.0}}), 400_000, hardware=None)


@pytest.mark.parametrize("prefetch", ["none", "transition"])
@pytest.mark.parametrize("miss", MISS)
def test_miss(miss: str, prefetch: str) -> None:
    trace = small_trace(5, tokens=30, top_k=3, with_logits=True)
    mix = Mix.of("lhu", prefetch, miss=miss, numbers={"miss": {"keep": 1}} if miss == "drop" else None)
    for precisions in ((4.0, 8.0, 16.0), *([] if MISS[miss]().least_levels > 1 else [(16.0,)])):
        compare(trace, mix, 390_000, precisions=precisions)


def test_cache_aware_routing() -> None:
    trace = small_trace(6, prompt_tokens=0, with_logits=True)
    slow = compare(trace, Mix.of("lru", routing="cache_aware", numbers={"routing": {"strength": 0.4}}), 500_000)
    plain = compare(trace, Mix.of("lru"), 500_000)
    assert (slow.outcome == 4).sum() < (plain.outcome == 4).sum()


@pytest.mark.parametrize("schedule", [{}, {"batch": 3}, {"prefill_chunk": 3, "reset_per_request": True}])
@pytest.mark.parametrize(("eviction", "miss"), [("lru", "fetch"), ("score", "drop")])
def test_cache_aware_routing_of_several_tokens(eviction: str, miss: str, schedule: dict[str, Any]) -> None:
    trace = small_trace(6, requests=3, tokens=20, prompt_tokens=9, top_k=3, with_logits=True)
    numbers: dict[str, Any] = {"routing": {"strength": 0.6}}
    mix = Mix.of(eviction, "previous", miss=miss, routing="cache_aware", numbers=numbers)
    slow = compare(trace, mix, 400_000, schedule=schedule)
    prefills = prepare(trace, **schedule).schedule.tokens > 1
    plain = compare(trace, mix._replace(routing=Mix.of().routing), 400_000, schedule=schedule)
    assert ((slow.outcome > 0) != (plain.outcome > 0))[prefills].any()  # prompts demand others, too


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("eviction", ["lfu", "belady", "least_stale_literal", "belady_bypass"])
def test_demand_larger_than_the_budget(eviction: str, hold: bool) -> None:
    compare(small_trace(7, prompt_tokens=20), Mix.of(eviction, "previous"), 95_000, hold=hold)


@pytest.mark.parametrize("prefetch", ["none", "previous", "perfect"])
@pytest.mark.parametrize("eviction", ["lru", "belady", "least_stale"])
def test_schedules(eviction: str, prefetch: str) -> None:
    trace = small_trace(8, requests=3, tokens=16)
    for schedule in ({"batch": 2}, {"prefill_chunk": 2}, {"reset_per_request": True}):
        compare(trace, Mix.of(eviction, prefetch), 420_000, schedule=schedule)


@st.composite
def routings(draw: st.DrawFn) -> Trace:
    """Any routing at all: 12 decoded tokens, 3 layers of 6 experts, top-2, some layers skipped."""
    pair = st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True)
    ids = draw(st.lists(st.one_of(pair, pair, pair, st.just([-1, -1])), min_size=36, max_size=36))
    shares = draw(st.lists(st.integers(1, 99), min_size=36, max_size=36))
    gates = np.array([[s / 100, 1 - s / 100] for s in shares], np.float32).reshape(12, 3, 2)
    routed = np.array(ids, np.int16).reshape(12, 3, 2)
    return Trace(
        routed,
        np.array([7, 5], np.int32),
        np.zeros(2, np.int32),
        6,
        np.array([4096, 8192, 4096]),
        np.where(routed >= 0, gates, 0).astype(np.float32),
    )


@pytest.mark.parametrize("eviction", EVICTION)
@hypothesis_settings(max_examples=15)
@given(trace=routings(), budget=st.integers(8192, 110_000))
def test_any_routing(eviction: str, trace: Trace, budget: int) -> None:
    compare(trace, Mix.of(eviction, "popular", numbers={"selection": {"count": 2.0}}), budget, horizon=2)
