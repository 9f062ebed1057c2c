"""Predictions that are read into host memory and go no further. The scan equals the reference; then timelines drawn by
hand, as in `test_tier_timelines`, the limits, and the doors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from parity import LINK, compare, engine, small_trace
from test_tier_timelines import AHEAD, EVERY_BYTE, SIX, SSD, reads, replay, same
from test_timelines import BYTES, NOTHING, close, drawn, seconds

from specmd_jax import explain, run, sweep
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.pins import pinned
from specmd_jax.replay.state import Tier
from specmd_jax.replay.totals import Events, Totals
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.setting import Setting
from specmd_jax.trace.profile import profile_of

QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])
OTHERS = profile_of(small_trace(77, tokens=20))
THREE: dict[str, Any] = {"selection": {"count": 3.0}}
TO_HOST = Tier(to_host=True)
SCARCE = SSD.replace(overlaps=0.37, host_bytes_per_s=1.3e9, storage_bytes_per_s=3e9)

CASES: tuple[tuple[Mix, Any, Any, Any, Tier, dict[str, Any], dict[str, Any]], ...] = (
    # mix, bytes on the device and in host memory, hardware, tier, options, trace
    (
        Mix.of("lru", "perfect", miss="split", host_eviction="lru", numbers=THREE), 420_000, 600_000, SCARCE,
        Tier(uses=True, exclusive=True, to_host=True), {"horizon": 2, "schedule": {"batch": 2}}, {"top_k": 3},
    ),
    (
        Mix.of("lru", "perfect", miss="cpu", host_eviction="lru", numbers=THREE), 200_000, 210_000, SSD, TO_HOST,
        {"horizon": 3, "schedule": {"reset_per_request": True}}, {"top_k": 3},
    ),
    (
        Mix.of(
            pinned("lru", 0.3, profile=OTHERS), "perfect", admission="limited", host_eviction="lfu_resident",
            numbers=THREE,
        ),
        QUOTAS, QUOTAS * 5 // 4, SSD.replace(overlaps=0.3), Tier(exclusive=True, to_host=True),
        {"horizon": 2, "schedule": {"drafts": Drafts(2, 0.6, 1, 1e-5)}}, {},
    ),
    (
        Mix.of("lhu", "perfect", miss="cascade", routing="cache_aware", host_eviction="lhu"), 390_000, 450_000, SSD,
        Tier(uses=True, exclusive=True, to_host=True), {"precisions": (4.0, 8.0, 16.0), "may_evict": False},
        {"top_k": 3, "with_logits": True},
    ),
    (
        Mix.of("least_stale", "perfect", admission="margin", host_eviction="belady_bypass", numbers=THREE), 300_000,
        430_000, SSD.replace(overlaps=0.0), TO_HOST,
        {"horizon": 2, "hold": True, "warm_start": OTHERS, "schedule": {"contract": "sequential"}}, {},
    ),
)  # fmt: skip


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_scan_is_the_reference(number: int) -> None:
    mix, budget, of_host, hardware, tier, options, shape = CASES[number]
    ahead = late = 0
    for seed in (number, number + 50):
        trace = small_trace(seed, tokens=20, **shape)
        found = compare(trace, mix, budget, hardware=hardware, host_budget=of_host, tier=tier, **options)
        ahead += sum(map(len, found.read_ahead))
        late += sum(map(len, found.read_late))
        assert found.reads_used > 0
    assert ahead > 5 and late > 0


@pytest.mark.usefixtures("strict_promotion")
def test_without_seconds_all_that_has_room_is_read() -> None:
    mix = Mix.of("lru", "perfect", host_eviction="lru", numbers=THREE)
    found = compare(small_trace(3), mix, 200_000, hardware=None, host_budget=400_000, tier=TO_HOST)
    assert found.reads_used > 10 and not sum(map(len, found.read_late))


# ------------------------------------------------------------------------------------------- timelines by hand


def early(totals: Totals) -> tuple[int, int, int, int, int]:
    """Reads on demand and ahead; of the latter used and late, and those that did not start for want of room."""
    assert totals.tier is not None and totals.tier.early is not None
    counts = totals.tier.reads, totals.tier.reads_ahead, *totals.tier.early
    return tuple(int(count.sum()) for count in counts)  # pyright: ignore[reportReturnType]


def foreseen(expert: int, first: int = 0, *, read_s: float, host: int = SIX) -> tuple[Totals, Events]:
    """Layer 0 asks for `first`, layer 1 for 2; at the gate of layer 0, `expert` of layer 1 is foreseen."""
    trace = drawn([[{first: 1.0}, {2: 1.0}, NOTHING]], dense_s=2, ahead={(0, 0): {expert: 0.9}})
    return replay(trace, copy_s=2, read_s=read_s, mix=AHEAD, host=host, tier=TO_HOST)


def test_what_is_read_ahead_costs_a_miss_the_link_alone() -> None:
    # second  01234 56789
    # storage 222
    # link    00    22
    # device  ..0dd ..2dd    read from the gate on, beside the copy of 0
    totals, events = foreseen(2, read_s=3)
    close(seconds(events, 0), visit=5, miss=2, link=2)
    reads(events, 0, storage=0, read=3)
    close(seconds(events, 1), visit=5, miss=2, link=2)
    reads(events, 1, storage=0, read=0)
    assert early(totals) == (0, 1, 1, 0, 0)
    assert events.prefetched is not None and not events.prefetched.any()


def test_who_is_still_being_read_is_waited_for_and_not_read_again() -> None:
    # second  01234 5678901
    # storage 22222 22
    # link    00      22
    # device  ..0dd ....2dd
    totals, events = foreseen(2, read_s=7)
    close(seconds(events, 1), visit=7, miss=2, link=2)
    reads(events, 1, storage=2, read=0)
    assert early(totals) == (0, 1, 1, 1, 0)


def test_a_read_on_demand_waits_behind_one_in_vain() -> None:
    # second  01234 56789012345678
    # storage 33333 332222222
    # link    00             22
    # device  ..0dd ...........2dd
    totals, events = foreseen(3, read_s=7)
    close(seconds(events, 1), visit=14, miss=2, link=2)
    reads(events, 1, storage=9, read=7)
    assert early(totals) == (1, 1, 0, 0, 0)


def test_reads_on_demand_go_first() -> None:
    # second  01234567 89012
    # storage 333222         3 of the first layer is needed, 2 of the next is foreseen
    # link       33    22
    # device  .....3dd ..2dd
    totals, events = foreseen(2, first=3, read_s=3)
    close(seconds(events, 0), visit=8, miss=2, link=2)
    reads(events, 0, storage=3, read=6)
    close(seconds(events, 1), visit=5, miss=2, link=2)
    reads(events, 1, storage=0, read=0)
    assert early(totals) == (1, 1, 1, 0, 0)


def test_one_without_room_is_skipped() -> None:
    # one slot of host memory has what the first layer needs: nothing may take its place
    totals, events = foreseen(2, read_s=3, host=BYTES)
    assert early(totals) == (1, 0, 0, 0, 1)
    reads(events, 1, storage=3, read=3)


def test_what_is_foreseen_takes_room_at_once() -> None:
    # two slots begin with 0 of the first and of the second layer: the latter, never used, leaves for what is foreseen
    _, events = foreseen(2, read_s=7, host=2 * BYTES)
    assert events.tier is not None and events.tier.level is not None
    assert np.argwhere(events.tier.level[0]).tolist() == [[0, 0], [1, 2]]
    assert events.tier.evictions[0].tolist() == [0, 1, 0]


# ------------------------------------------------------------------------------------------------------- limits


def test_limits() -> None:
    """With room for everything, and with storage that costs nothing, the device notices nothing of it."""
    replays = prepare(small_trace(3))
    plain = engine(replays, Mix.of("lru"), 420_000, LINK, horizon=2)[:2]
    mix = Mix.of("lru", "perfect", host_eviction="lru", numbers=THREE)
    for hardware, of_host in ((SSD, EVERY_BYTE), (LINK, 500_000)):
        totals, events, _ = engine(replays, mix, 420_000, hardware, of_host, horizon=2, tier=TO_HOST)
        assert totals.tier is not None and totals.tier.seconds.sum() == 0
        assert (totals.tier.reads_ahead.sum() > 20) == (of_host < EVERY_BYTE)
        assert not totals.prefetched.any()
        nothing_foreseen = totals.experts._replace(predicted=plain[0].experts.predicted)
        nothing_foreseen = nothing_foreseen._replace(predicted_right=plain[0].experts.predicted_right)
        same(plain, (totals._replace(experts=nothing_foreseen), events._replace(prefetched=None)))


# -------------------------------------------------------------------------------------------------------- doors

TRACE = small_trace(3)
ASKED = Setting(
    capacity="25%", hardware=SSD, host_capacity="50%", prefetch="perfect", overfetch=1.5, prefetch_to="host"
)


def test_metrics_say_what_became_of_reads_ahead() -> None:
    (found,) = sweep(TRACE, [ASKED])
    none = run(TRACE, ASKED, prefetch="none", prefetch_to="device")
    assert found["bytes_prefetch_used"] == found["bytes_prefetch_wasted"] == found["hits_prefetch"] == 0
    assert (found["hits"], found["prefetch_to"]) == (none.hits, "host")
    assert found["reads_ahead"] == found["reads_ahead_used"] + found["reads_ahead_wasted"] > 20
    assert found["storage_reads"] == found["host_misses"] + found["reads_ahead"]
    assert found["host_hits"] + found["host_misses"] == found["misses"]
    assert found["host_hits"] >= found["reads_ahead_used"] >= found["host_hits_late"] > 0
    assert none.stall_storage_s is not None and found["stall_storage_s"] < none.stall_storage_s
    assert none.reads_ahead == 0
    assert none.reads_ahead_used is none.reads_ahead_wasted is none.reads_ahead_skipped is none.host_hits_late is None


def test_other_engines_say_why_not() -> None:
    found = explain(TRACE, ASKED)
    assert found.engine == "scan" and "it has one cache" in (found.refusals["gpu"] or "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host_capacity": None}, "prefetch_to is 'host' without a host_capacity, expected one, such as '64GiB'"),
        ({"prefetch_to": "disk"}, "unknown prefetch_to 'disk'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        run(TRACE, ASKED, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_off_by_default() -> None:
    assert Setting().prefetch_to == "device" and Tier() == Tier(to_host=False)
    plain = dataclasses.replace(ASKED, prefetch_to="device")
    assert plain.options["tier"] == Tier()
