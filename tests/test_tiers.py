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
from specmd_jax.policies.pins import pinned
from specmd_jax.replay.state import Tier
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.setting import Setting
from specmd_jax.trace import save_trace
from specmd_jax.trace.profile import profile_of

SSD = LINK.replace(storage_bytes_per_s=0.71e9, storage_latency_s=2.3e-5)
"""Storage half as fast as the link."""
QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])
THREE: dict[str, Any] = {"selection": {"count": 3.0}}
DRAFTS = Drafts(2, 0.6, 1, 1e-5)
OTHERS = profile_of(small_trace(77, tokens=20))


# ------------------------------------------------------------------------------------------- event for event

CASES = [
    # eviction, prefetch, eviction of host memory, tier, options
    ("fld", "transition", "lru", Tier(exclusive=True), {"horizon": 3}),
    ("belady", "perfect", "belady", Tier(), {}),
    ("slru", "popular", "belady_bypass", Tier(exclusive=True), {"hold": True}),
    ("lfu", "previous", "least_stale", Tier(), {"may_evict": False, "horizon": 2}),
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
def test_pools_of_layers() -> None:
    mix = Mix.of("lru", "previous", host_eviction="lfu_resident", numbers=THREE)
    for scale in (1, 2):
        compare(
            small_trace(4), mix, 420_000 * scale, hardware=SSD, host_budget=QUOTAS * scale * 5 // 4,
            tier=Tier(exclusive=True), horizon=2,
        )  # fmt: skip


@pytest.mark.usefixtures("strict_promotion")
def test_precisions_routing_and_resets() -> None:
    trace = small_trace(5, tokens=24, top_k=3, with_logits=True)
    mix = Mix.of("lhu", "transition", miss="cascade", routing="cache_aware", host_eviction="lhu")
    for of_host in (450_000, 800_000):
        compare(
            trace, mix, 390_000, hardware=SSD, precisions=(4.0, 8.0, 16.0), schedule={"reset_per_request": True},
            host_budget=of_host, tier=Tier(uses=True, exclusive=True),
        )  # fmt: skip


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(
    ("admission", "eviction", "tier", "options"),
    [
        ("limited", pinned("lru", 0.3, profile=OTHERS), Tier(exclusive=True), {"schedule": {"drafts": DRAFTS}}),
        ("margin", "lfu", Tier(), {"warm_start": OTHERS, "schedule": {"reset_per_request": True}, "horizon": 2}),
    ],
)
def test_warm_starts_pins_admission_drafts_and_an_engine_that_adds(
    admission: str, eviction: Any, tier: Tier, options: dict[str, Any]
) -> None:
    adds = SSD.replace(overlaps=0.3, layer_s=1e-6, sync_s=2e-6)
    mix = Mix.of(eviction, "previous", admission=admission, host_eviction="lru", numbers=THREE)
    for budget, of_host in ((420_000, 500_000), (200_000, 260_000)):
        found = compare(small_trace(7), mix, budget, hardware=adds, host_budget=of_host, tier=tier, **options)
        assert sum(map(len, found.read)) > 20


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
    streamed = run(specmd_jax.open_trace(tmp_path / "mine.npz"), ASKED)
    assert streamed == run(TRACE, ASKED)


def test_other_engines_say_why_not() -> None:
    found = explain(TRACE, ASKED, hardware=None)
    assert found.engine == "scan"
    assert "they have one cache" in (found.refusals["curves"] or "")
    assert "it has one cache" in (explain(TRACE, ASKED).refusals["gpu"] or "")


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
    ({"host_eviction": pinned("lru", 0.5, profile=OTHERS).build()}, "keeps some experts for good"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        run(TRACE, ASKED, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
