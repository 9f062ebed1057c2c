"""Experts that run on the host out of a host tier: they are read first. The scan equals the reference; then timelines
drawn by hand, as in `test_tier_timelines`, and the limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import LINK, compare, engine, small_trace
from reference import HIT_LATE, ON_CPU
from reference.sharing import Waits
from reference.timing import Engine, HostWork, Job, done_beside
from test_tier_timelines import AHEAD, EVERY_BYTE, SSD, one_layer, reads, same
from test_timelines import BYTES, EVERYTHING, NOTHING, drawn, machine, seconds

from specmd_jax.engines.prepared import prepare
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.sharing import HostTimes, Line, side_by_side
from specmd_jax.replay.state import Tier
from specmd_jax.replay.totals import FETCHED, HOST, HOST_S, Events, Totals
from specmd_jax.types import Trace

QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])
MACHINES = (
    SSD,
    SSD.replace(overlaps=0.37, host_bytes_per_s=1.3e9, storage_bytes_per_s=3e9),  # less than the host takes alone
    SSD.replace(host_bytes_per_s=9e9, host_moe_bytes_per_s=np.inf, host_flops_per_s=5e9, overlaps=0.0),
)
COUNT: dict[str, Any] = {"selection": {"count": 3.0}}

CASES: tuple[tuple[Mix, Any, Any, Tier, dict[str, Any]], ...] = (
    (
        Mix.of("lru", "perfect", miss="split", host_eviction="lru", numbers=COUNT), 420_000, 600_000,
        Tier(uses=True, exclusive=True), {"horizon": 2, "schedule": {"batch": 2}},
    ),
    (
        Mix.of("least_stale", "previous", miss="cpu", host_eviction="belady", numbers=COUNT), QUOTAS, QUOTAS * 4 // 3,
        Tier(), {"hold": True, "schedule": {"contract": "sequential"}},
    ),
    (
        Mix.of("lru", "perfect", miss="cpu", host_eviction="lru", numbers=COUNT), 200_000, 210_000, Tier(),
        {"horizon": 3, "schedule": {"reset_per_request": True}},
    ),
)  # fmt: skip
"""The first and the last without a host tier are programs of `test_parity_host`."""


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_scan_is_the_reference(number: int) -> None:
    mix, budget, of_host, tier, options = CASES[number]
    late = host = read = 0
    for machine_of in MACHINES:
        trace = small_trace(number, tokens=20, top_k=3)
        found = compare(trace, mix, budget, hardware=machine_of, host_budget=of_host, tier=tier, **options)
        late += (found.outcome == HIT_LATE).sum()
        host += (found.outcome == ON_CPU).sum()
        read += sum(map(len, found.read))
        assert max(found.stall_storage_s) > 0
    assert host > 20 and read > 50
    assert late > 0


# ------------------------------------------------------------------------------------------- timelines by hand

CPU = AHEAD._replace(miss=Mix.of("lru", miss="cpu").miss)
"""Also foresees what a drawing says, which mostly is nothing."""
SPLIT = Mix.of("lru", miss="split", host_eviction="lru")


def replay(
    trace: Trace, *, copy_s: float, read_s: float, host_s: float, mix: Mix = CPU, budget: int = BYTES,
    memory: float = np.inf,
) -> tuple[Totals, Events]:  # fmt: skip
    """Room for one expert on the device; six in host memory, which begins with 0 and 1 of each layer."""
    hardware = machine(copy_s, host_s=host_s).replace(
        storage_bytes_per_s=BYTES / read_s if read_s else np.inf, host_bytes_per_s=memory
    )
    totals, events, _ = engine(prepare(trace), mix, budget, hardware, 6 * BYTES, tier=Tier())
    return totals, events


def close(events: Events, number: int, /, **expected: float) -> None:
    """Compares the seconds of a visit; those that are not named are zero."""
    found = seconds(events, number) | {"host": float(events.seconds[number, HOST_S])}
    assert found == pytest.approx(dict.fromkeys(found, 0.0) | expected, abs=1e-5)


def test_what_runs_on_the_host_is_read_first_and_stays_there() -> None:
    # second  0123456 01234567 0123
    # storage 222     333
    # link    00                       0 fills the device
    # host    ...2222 11113333 3333    1 is there, and 3 read beside it; then it is there, too
    routes = ({0: 0.7, 2: 0.3}, {1: 0.6, 3: 0.4}, {3: 1.0})
    _, events = replay(one_layer(*routes), copy_s=2, read_s=3, host_s=4)
    assert events.outcome[[0, 3, 6]].tolist() == [[FETCHED, 0, HOST, 0], [0, HOST, 0, HOST], [0, 0, 0, HOST]]
    close(events, 0, visit=7, link=2, host=4)  # read for 3, then 4; in host memory it would have taken 4
    reads(events, 0, storage=3, read=3)
    close(events, 3, visit=8, host=8)  # the read hides behind the work on 1
    reads(events, 3, storage=0, read=3)
    close(events, 6, visit=4, host=4)
    reads(events, 6, storage=0, read=0)
    assert events.tier is not None and events.tier.level is not None
    assert events.tier.level[6, 0].tolist() == [1, 1, 1, 1]  # 0 on the device, too


def test_a_host_that_waits_slows_nobody_down() -> None:
    # 500 bytes a second by link and 250 by host, of 500: together they take half as long again
    # second  012345678
    # storage 222         read while 0 is copied: 2 s, as nobody else draws on the memory
    # link    00
    # host    ...2222
    trace = one_layer({0: 0.7, 2: 0.3})
    _, events = replay(trace, copy_s=2, read_s=3, host_s=4, memory=500)
    close(events, 0, visit=7, miss=1, link=2, host=4)
    # in host memory the copy would have taken 3 s and the host 5, one of which is a stall: 2 more by reading
    reads(events, 0, storage=2, read=3)


def test_link_and_host_share_the_memory_from_the_read_on() -> None:
    # second  0123456
    # storage 22
    # link    00000       half of its work alone, the rest a third longer: 2 + 2 * 4/3
    # host    ..22222     2 s of its work beside that, and 2 s alone: 2 + 2 * 4/3 + 2
    _, events = replay(one_layer({0: 0.7, 2: 0.3}), copy_s=4, read_s=2, host_s=4, memory=375)
    third = 1 / 3
    # in host memory both would have taken 4 * 4/3, and 0 a second on the device behind that
    close(events, 0, visit=6 + 2 * third, miss=2 + third, link=4 + 2 * third, host=4 + 2 * third)
    reads(events, 0, storage=third, read=2)


def test_a_prefetch_read_waits_for_one_on_demand() -> None:
    # second  0123456789
    # storage 222233334
    # host    ....2222     room for two on the device; 3 of the next layer is foreseen: read from 4 to 8
    # device  ........ddd
    # link            33
    trace = drawn([[{0: 1.0}, NOTHING, NOTHING], [{2: 1.0}, {3: 1.0}, NOTHING]], dense_s=3, ahead={(1, 0): {3: 0.9}})
    _, events = replay(trace, copy_s=2, read_s=4, host_s=4)
    close(events, 3, visit=11, link=2, host=4)
    reads(events, 3, storage=4, read=8)
    assert events.tier is not None and events.tier.ahead[3, 0].tolist() == [False, False, False, True]


def test_split_counts_reads() -> None:
    # a second each on link and device, two on the host; without reads one is copied and the other runs on the host
    trace = drawn([[{2: 0.6, 3: 0.4}, NOTHING, NOTHING]])
    _, events = replay(trace, copy_s=1, read_s=0, host_s=2, mix=SPLIT, budget=EVERYTHING)
    assert events.outcome[0].tolist() == [0, 0, FETCHED, HOST]
    close(events, 0, visit=2, link=1, host=2)
    # second  012345678
    # storage 222333
    # link       2  3
    # device      2  3      both copied: 8 s, as with 3 on the host, which takes 2 s; of equals the most copies
    _, events = replay(trace, copy_s=1, read_s=3, host_s=2, mix=SPLIT, budget=EVERYTHING)
    assert events.outcome[0].tolist() == [0, 0, FETCHED, FETCHED]
    close(events, 0, visit=8, miss=1, link=2)
    reads(events, 0, storage=5, read=6)
    # a host that is faster gets the last one, and with it both: the copy of 2 is no help
    _, events = replay(trace, copy_s=1, read_s=3, host_s=1.5, mix=SPLIT, budget=EVERYTHING)
    assert events.outcome[0].tolist() == [0, 0, FETCHED, HOST]
    close(events, 0, visit=7.5, link=1, host=1.5, miss=0.5)


@pytest.mark.parametrize(("some_read", "best", "later"), [(False, 1.0, 1.0), (True, 0.8, 1.03)])
def test_how_good_the_division_is(some_read: bool, best: float, later: float) -> None:
    """Without reads it is the best of all assignments; with them a rule that is seldom much worse."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        misses, (copy_s, host_s, read_s) = int(rng.integers(2, 6)), rng.uniform(0.1, 2, 3).tolist()
        run_s, limit = 0.2 * float(rng.uniform(0.1, 2)), float(rng.uniform(0.5, 5))
        read = np.flatnonzero(rng.random(misses) < 0.5).tolist() if some_read else []
        waits = Waits({e: (place + 1) * read_s for place, e in enumerate(read)})

        def end_s(sides: Sequence[bool]) -> float:
            each = tuple((e, host_s) for e, copied in enumerate(sides) if not copied)  # noqa: B023
            order = [e for e, copied in enumerate(sides) if copied]
            host = HostWork(host_s * len(each), 1 / host_s if each else 0.0, 0.0, each)  # noqa: B023
            jobs = [Job(e, run_s, copy_s=copy_s) for e in order]  # noqa: B023
            return done_beside(jobs, Engine(host, 1 / copy_s, limit), order, waits)  # noqa: B023

        rule = min(end_s([e < k for e in range(misses)]) for k in range(misses + 1))
        found.append(rule / min(map(end_s, itertools.product((True, False), repeat=misses))))
    assert np.mean(np.array(found) <= 1 + 1e-6) >= best and np.mean(found) <= later + 1e-6


# ------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("number", [0, 2])
def test_limits(number: int) -> None:
    """With room for everything, and with storage that costs nothing, it is the product without storage."""
    behind, _, _, tier, options = CASES[number]
    replays, horizon, scarce = prepare(small_trace(3, top_k=3)), options["horizon"], {"host_bytes_per_s": 1.3e9}
    alone, none = behind._replace(host_eviction=Mix.of("lru").host_eviction), LINK.replace(**scarce)
    plain = engine(replays, alone, 420_000, none, horizon=horizon)[:2]
    cells = ((SSD.replace(**scarce), EVERY_BYTE), (none, 500_000))
    found = [
        engine(replays, behind, 420_000, machine, of_host, horizon=horizon, tier=tier)[:2] for machine, of_host in cells
    ]
    for totals, events in found:
        same(plain, (totals, events))
        assert totals.tier is not None and totals.tier.seconds.sum() == 0
    reads = [totals.tier.reads.sum() for totals, _ in found if totals.tier is not None]
    assert reads[0] == 0 and reads[1] > 20


# ------------------------------------------------------------------------------------------------- moment by moment


def test_pieces_side_by_side() -> None:
    # second  0123456789
    # link    00..1111      0 takes its 2 s alone; 1 from 4 on, 2 s at half the rate beside the host
    # host    ...22222233   2 s until 4, ...
    def line(*pieces: tuple[bool, float, float]) -> Line:
        there, ready_s, work_s = (jnp.array(column) for column in zip(*pieces, strict=True))
        return Line(there, ready_s.astype(jnp.float32), work_s.astype(jnp.float32))

    link = line((True, 0, 2), (False, 0, 0), (True, 4, 2))
    host = line((True, 9, 2), (True, 3, 4), (False, 0, 0))
    ends = jax.jit(side_by_side)(link, host, jnp.float32(1), jnp.array(True))
    assert ends.link_s.tolist() == [2, 0, 8] and ends.host_s.tolist() == [11, 9, 0]
    assert ends.busy_s.tolist() == [6, 8]


@pytest.mark.parametrize("left", [1.0, 0.5, 0.0])
def test_prefetch_copies_beside_a_host_that_waits(left: float) -> None:
    # from 3 on, beside a host that works from 3 to 5 and from 7 to 9
    times = HostTimes(jnp.array([0.0, 3.0, 7.0]), jnp.array([2.0, 5.0, 9.0]), jnp.float32(left))
    found = [float(jax.jit(HostTimes.copied_s)(times, jnp.float32(3), jnp.float32(work))) for work in (2, 3, 7)]
    expected = []
    for work in (2, 3, 7):  # second by second, in sixteenths
        now, done = 3.0, 0.0
        while done < work - 1e-9:
            busy = any(begin <= now < end for begin, end in ((3, 5), (7, 9)))
            now, done = now + 1 / 16, done + (left if busy else 1.0) / 16
        expected.append(now)
    assert found == pytest.approx(expected)
