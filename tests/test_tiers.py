"""Storage, host memory, device: two caches and two links. The scan equals the reference; then timelines and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from parity import LINK, compare, small_trace

import specmd_jax
from specmd_jax import explain, run, sweep
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.eviction import lfu_decay
from specmd_jax.replay.state import Tier
from specmd_jax.setting import Setting
from specmd_jax.trace import save_trace

SSD = LINK.replace(storage_bytes_per_s=0.71e9, storage_latency_s=2.3e-5)
"""Storage half as fast as the link."""
QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])
THREE: dict[str, Any] = {"selection": {"count": 3.0}}


# ------------------------------------------------------------------------------------------- event for event

CASES = [
    # eviction, prefetch, eviction of host memory, tier, options
    ("lru", "none", "lru", Tier(), {}),
    ("lru", "previous", "weighted", Tier(uses=True), {"horizon": 2}),
    ("fld", "transition", "lru", Tier(exclusive=True), {"horizon": 3}),
    ("least_stale", "previous", "least_stale", Tier(uses=True, exclusive=True), {"horizon": 2}),
    ("belady", "perfect", "belady", Tier(), {}),
    ("slru", "popular", "belady_bypass", Tier(exclusive=True), {"hold": True}),
    ("lfu", "previous", "least_stale", Tier(), {"may_evict": False, "horizon": 2}),
    ("belady_bypass", "shuffled", "slru", Tier(uses=True), {"hold": True, "horizon": 2}),
]
PLACES: list[tuple[dict[str, Any], int, int]] = [
    # schedule, bytes on the device and in host memory; prompts demand more than the last have
    ({"contract": "sequential"}, 180_000, 430_000),
    ({"batch": 2}, 420_000, 700_000),
    ({"prefill_chunk": 4}, 90_000, 95_000),
]


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(("eviction", "prefetch", "host", "tier", "options"), CASES)
def test_the_scan_is_the_reference(
    eviction: str, prefetch: str, host: str, tier: Tier, options: dict[str, Any]
) -> None:
    mix = Mix.of(eviction, prefetch, host_eviction=host, numbers=THREE)
    reads = ahead = left = 0
    for seed, (schedule, budget, of_host) in enumerate(PLACES):
        trace = small_trace(seed, requests=3, tokens=14, prompt_tokens=6)
        slow = compare(trace, mix, budget, hardware=SSD, schedule=schedule, host_budget=of_host, tier=tier, **options)
        reads += sum(map(len, slow.read))
        ahead += sum(map(len, slow.read_ahead))
        left += sum(slow.host_evictions)
    assert reads > 50
    assert left > 50
    # host memory begins full, so that reading ahead has to evict there
    assert (ahead > 0) == (prefetch != "none" and (tier.exclusive or options.get("may_evict", True)))


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(
    ("scope", "host_scope", "tier"),
    [
        ("layer", "global", Tier()),
        ("global", "layer", Tier(exclusive=True)),
        ("layer", "layer", Tier(uses=True)),
    ],
)
def test_pools_of_layers(scope: str, host_scope: str, tier: Tier) -> None:
    mix = Mix.of("lru", "previous", host_eviction="lfu_resident", numbers=THREE)
    for scale in (1, 2):
        budget: Any = QUOTAS * scale if scope == "layer" else 420_000 * scale
        of_host: Any = QUOTAS * scale * 5 // 4 if host_scope == "layer" else 500_000 * scale
        compare(small_trace(4), mix, budget, hardware=SSD, host_budget=of_host, tier=tier, horizon=2)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(
    ("tier", "schedule"), [(Tier(), {"reset_per_request": True}), (Tier(uses=True, exclusive=True), {})]
)
def test_precisions_and_resets(tier: Tier, schedule: dict[str, Any]) -> None:
    trace = small_trace(5, tokens=24, top_k=3, with_logits=True)
    mix = Mix.of("lhu", "transition", miss="cascade", host_eviction="lhu")
    for of_host in (450_000, 800_000):
        compare(
            trace, mix, 390_000, hardware=SSD, precisions=(4.0, 8.0, 16.0), schedule=schedule, host_budget=of_host,
            tier=tier,
        )  # fmt: skip


@pytest.mark.usefixtures("strict_promotion")
def test_other_rules_and_no_seconds() -> None:
    trace = small_trace(6, tokens=20, top_k=3, with_logits=True)
    for miss, routing, hardware, exclusive in (
        ("drop", "standard", None, True),
        ("substitute", "cache_aware", SSD, False),
    ):
        mix = Mix.of("lru", "popular", miss=miss, routing=routing, host_eviction="random", numbers=THREE)
        compare(trace, mix, 390_000, hardware=hardware, host_budget=500_000, tier=Tier(exclusive=exclusive))


# --------------------------------------------------------------------------------------------- through the doors

TRACE = small_trace(3)
ASKED = Setting(capacity="25%", hardware=SSD, host_capacity="50%")


def test_metrics_say_where_copies_came_from() -> None:
    plain = run(TRACE, ASKED, host_capacity=None)
    found = run(TRACE, ASKED)
    assert (plain.host_hits, plain.storage_reads, plain.stall_storage_s) == (plain.misses, 0, 0.0)
    assert found.hits == plain.hits
    assert found.host_hits + found.host_misses == found.misses == plain.misses
    assert found.storage_reads == found.host_misses > 0
    assert found.bytes_storage > 0 and found.host_evictions > 0
    causes = (found.stall_late_s, found.stall_miss_s, found.stall_link_busy_s, found.stall_storage_s)
    assert found.stall_s == pytest.approx(sum(cause or 0.0 for cause in causes))
    assert found.stall_s is not None and plain.stall_s is not None and found.stall_storage_s is not None
    assert found.stall_s == pytest.approx(plain.stall_s + found.stall_storage_s)
    assert 0 < (found.storage_utilisation or 0) < 1 and 0 < (found.link_utilisation or 0) < 1
    assert run(TRACE, ASKED, hardware=None).storage_reads == found.storage_reads


def test_a_sweep_over_host_memory() -> None:
    axes: dict[str, Any] = {"host_capacity": [None, "30%", "60%"], "host_eviction": ["lru", "lfu_decay"]}
    rows = list(sweep(TRACE, ASKED, decay=0.5, **axes))
    found = {(row["host_bytes"], row["host_eviction"]): row["storage_reads"] for row in rows}
    sizes = [None, 393216, 786432]
    assert list(found) == [(size, name) for size in sizes for name in axes["host_eviction"]]
    for name in axes["host_eviction"]:
        assert found[None, name] == 0
        assert found[393216, name] > found[786432, name] > 0
    alone = run(TRACE, ASKED, host_capacity=393216, host_eviction="lfu_decay", decay=0.5).row()
    assert {name: rows[3][name] for name in alone} == pytest.approx(alone)


def test_a_streamed_trace(tmp_path: Any) -> None:
    save_trace(TRACE, tmp_path / "mine.npz")
    streamed = run(specmd_jax.open_trace(tmp_path / "mine.npz"), ASKED, inclusion="exclusive", prefetch="previous")
    assert streamed == run(TRACE, ASKED, inclusion="exclusive", prefetch="previous")


def test_other_engines_say_why_not() -> None:
    found = explain(TRACE, ASKED, hardware=None)
    assert found.engine == "scan"
    assert "they have one cache" in (found.refusals["curves"] or "")
    assert "it has one cache" in (explain(TRACE, ASKED).refusals["gpu"] or "")


def test_a_policy_of_ones_own_in_host_memory() -> None:
    named = run(TRACE, ASKED, host_eviction="lfu_decay", decay=0.7)
    assert run(TRACE, ASKED, host_eviction=lfu_decay, decay=0.7) == named
    assert run(TRACE, ASKED, host_eviction=lfu_decay(0.7)) == named != run(TRACE, ASKED)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"host_capacity": "20%"}, "host_capacity is 262144 bytes, less than the resident set of the device"),
    ({"host_capacity": "200%"}, "host_capacity '200%' is above everything"),
    ({"host_capacity": "some"}, "host_capacity 'some' cannot be read"),
    ({"host_capacity": "1%", "inclusion": "exclusive"}, "expected at least one expert of the largest layer"),
    ({"hardware": SSD.replace(storage_bytes_per_s=0.0)}, "storage_bytes_per_s is 0.0: expected a positive rate"),
    ({"hardware": LINK}, "host_capacity needs the rate of the storage behind it"),
    ({"hardware": "rtx4090"}, "host_capacity needs the rate of the storage behind it"),
    ({"storage": "nvme4"}, "did you mean 'nvme-4'"),
    ({"host_eviction": "none"}, "host_eviction is none with a host_capacity"),
    ({"host_eviction": "lrru"}, "unknown eviction policy 'lrru'"),
    ({"host_hears": "all"}, "unknown host_hears 'all'"),
    ({"inclusion": "both"}, "unknown inclusion 'both'"),
    ({"host_scope": "both"}, "unknown host_scope 'both'"),
    ({"miss": "cpu"}, "miss 'cpu' runs experts from host memory"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        run(TRACE, ASKED, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
