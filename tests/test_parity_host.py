"""The engine equals the reference where the host computes: both rules across what else a replay may do, on machines
whose memory is ample or scarce and whose engines overlap or add.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from parity import LINK, compare, small_trace
from reference import FETCHED, HIT_LATE, ON_CPU

from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.policies.choice import Mix

pytestmark = pytest.mark.usefixtures("strict_promotion")

QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])
MACHINES = (
    LINK,
    LINK.replace(overlaps=0.0, handover_s=3.1e-5),
    LINK.replace(overlaps=0.37, host_bytes_per_s=1.3e9),  # less than the host takes alone
    LINK.replace(host_bytes_per_s=9e9, host_moe_bytes_per_s=np.inf, host_flops_per_s=5e9),
)
COUNT: dict[str, Any] = {"selection": {"count": 3.0}}

CASES: tuple[tuple[Mix, Any, dict[str, Any]], ...] = (
    (Mix.of("lru", "perfect", miss="split", numbers=COUNT), 420_000, {"horizon": 2, "schedule": {"batch": 2}}),
    (Mix.of("least_stale", "previous", miss="cpu", numbers=COUNT), QUOTAS, {"schedule": {"contract": "sequential"}}),
    (Mix.of("lfu", "previous", "percentile", miss="split"), QUOTAS, {"may_evict": False, "hold": True}),
    (Mix.of("belady_bypass", "transition", miss="split"), 150_000, {"schedule": {"reset_per_request": True}}),
    (Mix.of("lru", "perfect", miss="cpu", numbers=COUNT), 420_000, {"horizon": 3}),
    (Mix.of("score", "previous", miss="split", routing="cache_aware"), 300_000, {"schedule": {"prefill_chunk": 3}}),
)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_host(number: int) -> None:
    mix, budget, options = CASES[number]
    late = host = fetched = 0
    for machine in MACHINES:
        trace = small_trace(number, tokens=24, top_k=3, with_logits=mix.routing.name != "standard")
        found = compare(trace, mix, budget, hardware=machine, **options)
        late += (found.outcome == HIT_LATE).sum()
        host += (found.outcome == ON_CPU).sum()
        fetched += (found.outcome == FETCHED).sum()
    assert host > 0 and fetched > 0
    assert late > 0 or mix.prefetch.name == "transition"


@pytest.mark.parametrize("eviction", ["lru", "slru"])
def test_an_engine_that_adds_without_the_host(eviction: str) -> None:
    mix = Mix.of(eviction, "perfect", numbers=COUNT)
    for machine in MACHINES[1:3]:
        compare(small_trace(3), mix, 420_000, hardware=machine, horizon=2)


def test_neutral_numbers_change_nothing() -> None:
    """Where nothing is fetched late or computed elsewhere, the younger numbers at their defaults leave the old sums."""
    old = {name: getattr(LINK, name) for name in ("host_flops_per_s", "host_bytes_per_s")}
    plain = LINK.replace(host_moe_bytes_per_s=np.inf, handover_s=0.0, sync_s=0.0, layer_s=0.0, overlaps=1.0, **old)
    other = plain.replace(host_moe_bytes_per_s=1e6, handover_s=1.0, host_bytes_per_s=1e6)
    replays, mix = prepare(small_trace(1)), Mix.of("lru", "previous")
    setup = replays.setup(mix, plain)
    visits = replays.visits(setup, mix)
    found = [
        replay_many(setup, (), replays.numbers(400_000, machine), mix.traced(), visits)[0][1].seconds
        for machine in (plain, other)  # without work on the host its numbers do not matter
    ]
    np.testing.assert_array_equal(*found)
