"""Timelines of storage, link and device drawn by hand, and the limits of a host tier.

As in `test_timelines`: one character of a drawing is a second, an expert is 1000 bytes and runs a second a token; here
a read from storage takes `read_s` too. Six slots of host memory begin with experts 0 and 1 of each of the three layers.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from parity import LINK, engine, small_trace
from test_timelines import BYTES, DEMAND, EVERYTHING, FOUR, NOTHING, Route, close, drawn, machine, seconds

from specmd_jax.engines.prepared import prepare
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.state import Tier
from specmd_jax.replay.totals import LATE, READ_S, STORAGE_S, Events, Totals
from specmd_jax.types import Trace

SIX = 6 * BYTES
AHEAD = Mix.of("lru", "gate_ahead", host_eviction="lru", numbers=FOUR)
PLAIN = Mix.of("lru", host_eviction="lru")


def replay(
    trace: Trace,
    *,
    copy_s: float,
    read_s: float,
    mix: Mix = PLAIN,
    budget: int = EVERYTHING,
    host: int = SIX,
    tier: Tier = Tier(),  # noqa: B008
) -> tuple[Totals, Events]:
    hardware = machine(copy_s).replace(storage_bytes_per_s=BYTES / read_s)
    totals, events, _ = engine(prepare(trace), mix, budget, hardware, host, tier=tier)
    return totals, events


def reads(events: Events, visit: int, *, storage: float, read: float) -> None:
    """What storage adds to the stall, and how long it is read."""
    assert events.tier is not None
    found = events.tier.seconds[visit]
    assert (found[STORAGE_S], found[READ_S]) == pytest.approx((storage, read), abs=1e-5)


def one_layer(*routes: Route) -> Trace:
    return drawn([[route, NOTHING, NOTHING] for route in routes])


def test_a_miss_of_both_tiers_is_read_and_then_copied() -> None:
    # second  012345
    # storage 222
    # link       22
    # device  .....2     in host memory it would have taken 3 s
    _, events = replay(one_layer({2: 1.0}), copy_s=2, read_s=3)
    close(seconds(events, 0), visit=6, miss=2, link=2)
    reads(events, 0, storage=3, read=3)


def test_two_reads_and_their_copies_are_a_pipeline() -> None:
    # second  012345678
    # storage 222333
    # link       22.33
    # device  .....2..3
    _, events = replay(one_layer({2: 0.7, 3: 0.3}), copy_s=2, read_s=3)
    close(seconds(events, 0), visit=9, miss=3, link=4)
    reads(events, 0, storage=4, read=6)


def test_copies_slower_than_reads_follow_one_another() -> None:
    # second  01234567
    # storage 2233
    # link      222333
    # device  .....2..3
    _, events = replay(one_layer({2: 0.7, 3: 0.3}), copy_s=3, read_s=2)
    close(seconds(events, 0), visit=9, miss=5, link=6)
    reads(events, 0, storage=2, read=4)


def test_a_copy_waits_behind_the_read_of_a_larger_gate() -> None:
    # second  01234567
    # storage 222
    # link       2200      0 is in host memory
    # device  .....2.0
    _, events = replay(one_layer({2: 0.7, 0: 0.3}), copy_s=2, read_s=3)
    close(seconds(events, 0), visit=8, miss=3, link=4)
    reads(events, 0, storage=3, read=3)


def test_a_read_hides_behind_the_copy_of_a_larger_gate() -> None:
    # second  012345
    # storage 222
    # link    00.22
    # device  ..0..2
    _, events = replay(one_layer({0: 0.7, 2: 0.3}), copy_s=2, read_s=3)
    close(seconds(events, 0), visit=6, miss=3, link=4)
    reads(events, 0, storage=1, read=3)


def test_a_prefetch_copy_is_read_first() -> None:
    # second  01234 56789
    # storage   222
    # link    00    22
    # device  ..0dd ..2dd    the link is the first layer's at 2; the copy of 2 is in flight at the gate
    trace = drawn([[{0: 1.0}, {2: 1.0}, NOTHING]], dense_s=2, ahead={(0, 0): {2: 0.9}})
    totals, events = replay(trace, copy_s=2, read_s=3, mix=AHEAD)
    close(seconds(events, 0), visit=5, miss=2, link=4)
    reads(events, 0, storage=0, read=3)
    close(seconds(events, 1), visit=5, late=2, link=0)
    assert events.outcome[1, 2] == LATE
    assert totals.tier is not None and (totals.tier.reads.sum(), totals.tier.reads_ahead.sum()) == (0, 1)


def test_a_read_on_demand_waits_for_one_ahead() -> None:
    # second  01234 5678901234
    # storage   333 32222
    # link    00     33   22
    # device  ..0dd .......2dd    3 was predicted, 2 is needed: read from 6 on, copied from 10 on
    trace = drawn([[{0: 1.0}, {2: 1.0}, NOTHING]], dense_s=2, ahead={(0, 0): {3: 0.9}})
    _, events = replay(trace, copy_s=2, read_s=4, mix=AHEAD)
    reads(events, 0, storage=0, read=4)
    close(seconds(events, 1), visit=10, miss=2, busy=3, link=2)
    reads(events, 1, storage=2, read=4)


@pytest.mark.parametrize(("exclusive", "read"), [(False, [[], [1], [0]]), (True, [[], [1], []])])
def test_what_the_device_evicts_enters_exclusive_host_memory(exclusive: bool, read: list[list[int]]) -> None:
    # a slot on the device, a slot in host memory, which begins with 0: routes 0, 1, 0
    _, events = replay(
        one_layer({0: 1.0}, {1: 1.0}, {0: 1.0}), copy_s=1, read_s=2, budget=BYTES, host=BYTES,
        tier=Tier(exclusive=exclusive),
    )  # fmt: skip
    assert events.tier is not None and events.tier.level is not None
    assert [np.flatnonzero(events.tier.read[visit]).tolist() for visit in (0, 3, 6)] == read
    there = [np.flatnonzero(events.tier.level[visit]).tolist() for visit in (0, 3, 6)]
    assert there == ([[], [0], [1]] if exclusive else [[0], [1], [0]])
    for visit, found in zip((0, 3, 6), read, strict=True):
        close(seconds(events, visit), visit=2 + 2 * len(found), miss=1, link=1)


# ------------------------------------------------------------------------------------------------------- limits

SIZES = (40960, 36864, 40960, 45056)
EVERY_BYTE = 8 * sum(SIZES)
SSD = LINK.replace(storage_bytes_per_s=0.71e9, storage_latency_s=2.3e-5)


def _both(eviction: str, prefetch: str, hardware: Any, host: int, tier: Tier) -> list[tuple[Totals, Events]]:
    """A replay without a host tier and one with it."""
    replays, numbers = prepare(small_trace(3)), {"selection": {"count": 3.0}}
    alone = Mix.of(eviction, prefetch, numbers=numbers)
    behind = Mix.of(eviction, prefetch, host_eviction="lru", numbers=numbers)
    return [
        engine(replays, alone, 420_000, hardware, horizon=2)[:2],
        engine(replays, behind, 420_000, hardware, host, horizon=2, tier=tier)[:2],
    ]


def same(one: tuple[Totals, Events], other: tuple[Totals, Events]) -> None:
    for name in ("outcome", "collision", "evictions", "level", "prefetched"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one[1], name), getattr(other[1], name))
    for name in ("experts", "fetched_at", "prefetched", "evictions"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one[0], name), getattr(other[0], name))
    np.testing.assert_allclose(one[1].seconds, other[1].seconds, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("eviction", "prefetch", "tier"),
    [
        ("lru", "none", Tier()),
        ("least_stale", "previous", Tier(uses=True, exclusive=True)),
    ],
)
def test_limits_and_laws(eviction: str, prefetch: str, tier: Tier) -> None:
    """With room for everything, and with storage that costs nothing, it is the product without storage."""
    alone, behind = _both(eviction, prefetch, SSD, EVERY_BYTE, tier)
    same(alone, behind)
    assert behind[0].tier is not None
    assert (behind[0].tier.reads.sum(), behind[0].tier.seconds.sum()) == (0, 0)
    alone, behind = _both(eviction, prefetch, LINK, 500_000, tier)
    same(alone, behind)
    assert behind[0].tier is not None
    assert behind[0].tier.reads.sum() > 20
    assert behind[0].tier.seconds.sum() == 0

    _, (totals, events) = _both(eviction, prefetch, SSD, 500_000, tier)
    assert events.tier is not None and events.tier.level is not None and events.level is not None
    held = (events.tier.level * np.array(SIZES)[:, None]).sum(axis=(1, 2))
    assert (held <= 500_000).all()
    if tier.exclusive:
        assert not (events.level.astype(bool) & events.tier.level.astype(bool)).any()
    assert totals.tier is not None
    copies = totals.fetched_at.sum() + totals.prefetched.sum()
    assert 0 < totals.tier.reads.sum() + totals.tier.reads_ahead.sum() < copies


def test_it_is_no_other_program_where_it_is_off() -> None:
    replays = prepare(small_trace(3))
    _, plain, _ = engine(replays, DEMAND, 420_000, LINK)
    _, other, _ = engine(replays, DEMAND, 420_000, SSD)
    assert plain.tier is None
    jax.tree.map(np.testing.assert_array_equal, plain, other)
