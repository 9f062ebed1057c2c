"""Timelines with work on the host, drawn by hand: copies beside it share the host's memory.

The drawings are those of `test_timelines`; `machine` there has a host memory without limit. An expert of 1000 bytes
that takes 4 s on the link or on the host draws 250 bytes a second of it.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from test_timelines import AHEAD, BYTES, EVERYTHING, NOTHING, drawn, machine, replay, seconds

from specmd_jax.policies.choice import Mix
from specmd_jax.replay.timing import Work, costs, host_work
from specmd_jax.replay.totals import FETCHED, HOST, HOST_S, LATE, PREFETCHED, REUSED, Events
from specmd_jax.specs.hardware import Hardware

CPU = Mix.of("lru", miss="cpu")
CPU_AHEAD = AHEAD._replace(miss=CPU.miss)
SPLIT = Mix.of("lru", miss="split")


def close(events: Events, number: int, /, **expected: float) -> None:
    """Compares the seconds of a visit; those that are not named are zero."""
    found = seconds(events, number) | {"host": float(events.seconds[number, HOST_S])}
    wanted = dict.fromkeys(found, 0.0) | expected
    assert found == pytest.approx(wanted, abs=1e-5)


def limited(copy_s: float, host_s: float, bytes_per_s: float, **changes: float) -> Hardware:
    """A machine whose host memory gives so many bytes a second."""
    return machine(copy_s, host_s=host_s).replace(host_bytes_per_s=bytes_per_s, **changes)


def test_cpu_fills_the_cache_and_leaves_it_as_it_is() -> None:
    # second  012 012345      room for one expert: the heavier is copied, the other runs on the host, 3 s a token there
    # link    00
    # host    111 111222
    # device  ..0             then the cache is full
    trace = drawn(
        [[{0: 0.7, 1: 0.3}, NOTHING, NOTHING], [{1: 0.6, 2: 0.4}, NOTHING, NOTHING], [{0: 1.0}] + [NOTHING] * 2]
    )
    totals, events = replay(trace, machine(2, host_s=3), CPU, BYTES)
    close(events, 0, visit=3, link=2, host=3)
    close(events, 3, visit=6, host=6)
    close(events, 6, visit=1)
    assert events.outcome[[0, 3, 6]].tolist() == [[FETCHED, HOST, 0, 0], [0, HOST, HOST, 0], [REUSED, 0, 0, 0]]
    assert (totals.fetched_at.sum(), totals.evictions.sum(), totals.experts.host.sum()) == (1, 0, 3)


def test_a_copy_and_the_host_slow_each_other_down() -> None:
    # 500 bytes a second by link and 250 by host, of 500: together they take one and a half times as long
    # second  01234
    # link    000         2 s of copying
    # host    11111       2 s of work in the first three, then the other two
    # device  ...0
    trace = drawn([[{0: 0.7, 1: 0.3}, NOTHING, NOTHING]])
    _, events = replay(trace, limited(2, 4, 500), CPU, BYTES)
    close(events, 0, visit=5, miss=1, link=3, host=5)


def test_a_late_hit_comes_later_beside_the_host() -> None:
    # second  0123456 7890123
    # link    0000111 1          a third longer beside the host: what was left, 1 s, takes 4/3
    # host            22222      4 s and the third of a second by which the copy held it up
    # device  ....0dd .1 dd
    trace = drawn([[{0: 1.0}, {1: 0.6, 2: 0.4}, NOTHING]], dense_s=2, ahead={(0, 0): {1: 0.9}})
    _, events = replay(trace, limited(4, 4, 375), CPU_AHEAD, 2 * BYTES)
    close(events, 0, visit=7, miss=4, link=8)
    close(events, 1, visit=4 + 1 / 3 + 2, late=1 / 3, link=1 / 3, host=4 + 1 / 3)
    assert events.outcome[1].tolist() == [0, LATE, HOST, 0]


def test_a_wrong_prefetch_holds_up_the_host() -> None:
    # as above, but 3 is on its way where 2 and 1 are needed: the link is to blame
    trace = drawn([[{0: 1.0}, {1: 0.6, 2: 0.4}, NOTHING]], dense_s=2, ahead={(0, 0): {3: 0.9}})
    _, events = replay(trace, limited(4, 4, 375), CPU_AHEAD, 2 * BYTES)
    close(events, 1, visit=8 + 1 / 3 + 2, busy=1 / 3, link=1 / 3, host=8 + 1 / 3)


def test_prefetch_copies_have_what_the_host_leaves() -> None:
    # second  0123456
    # link    2222222|    half its rate for 4 s, then the other 2 s of copying: there before the gate
    # host    1111
    # device  ....ddd
    ahead = {(1, 0): {2: 0.9}}
    trace = drawn([[{0: 1.0}, NOTHING, NOTHING], [{1: 1.0}, {2: 1.0}, NOTHING]], dense_s=3, ahead=ahead)
    _, events = replay(trace, limited(4, 4, 375), CPU_AHEAD, BYTES)
    close(events, 3, visit=7, link=6, host=4)
    close(events, 4, visit=4)
    assert events.outcome[4, 2] == PREFETCHED
    # with nothing left it waits for the host, and is late by a second
    _, events = replay(trace, limited(4, 4, 250), CPU_AHEAD, BYTES)
    close(events, 3, visit=7, link=8, host=4)
    close(events, 4, visit=5, late=1)


def test_the_way_to_the_host_and_back_is_paid_once_a_visit() -> None:
    trace = drawn([[{0: 1.0}, {1: 0.5, 2: 0.5}, {0: 1.0}]], dense_s=1)
    hardware = machine(2, host_s=3).replace(handover_s=0.5, layer_s=0.25, sync_s=0.125)
    _, events = replay(trace, hardware, CPU, BYTES)
    close(events, 0, visit=3 + 1.375, miss=2, link=2)
    close(events, 1, visit=6 + 0.5 + 1.375, host=6)
    close(events, 2, visit=3 + 0.5 + 1.375, host=3)


def test_an_engine_that_adds_waits_for_copies_and_the_host() -> None:
    # second  01234567
    # link    222             1 is resident since the first token; 2 and 3 are missed, room for one more
    # host    3333
    # device  ....12          with overlaps=1: 1..2, done at 4 with the host
    tokens = [[{1: 1.0}, NOTHING, NOTHING], [{2: 0.6, 3: 0.4}, NOTHING, NOTHING], [{1: 0.5, 3: 0.5}, NOTHING, NOTHING]]
    hardware = machine(3, host_s=4)
    for overlaps, second_s, third_s in ((1.0, 4, 4), (0.0, 5, 5), (0.5, 4.5, 4.5)):
        _, events = replay(drawn(tokens), hardware.replace(overlaps=overlaps), CPU, 2 * BYTES)
        close(events, 3, visit=second_s, link=3, host=4)
        close(events, 6, visit=third_s, host=4)  # a resident after the host: work, no stall
    # residents and copies alone: the same second of work behind 3 s of copying
    _, events = replay(drawn([tokens[0], [{1: 0.5, 2: 0.5}, NOTHING, NOTHING]]), hardware.replace(overlaps=0.0))
    close(events, 3, visit=5, miss=3, link=3)


def test_split_ends_a_visit_first() -> None:
    # second  0123
    # link    01          a second each on link and device, two on the host
    # host    22
    # device  .01         all three copied: 4 s; two on the host: 4 s
    trace = drawn([[{0: 0.6, 1: 0.4}, {0: 0.6, 2: 0.4}, NOTHING]])
    totals, events = replay(trace, machine(1, host_s=2), SPLIT)
    close(events, 0, visit=2, link=1, miss=0, host=2)
    assert events.outcome[0].tolist() == [FETCHED, HOST, 0, 0]
    assert totals.experts.host.sum() == 2
    _, events = replay(trace, machine(1, host_s=9), SPLIT)  # a slow host: everything is copied
    close(events, 0, visit=3, link=2, miss=1)
    _, events = replay(trace, machine(9, host_s=1), SPLIT)  # a slow link: nothing is
    close(events, 0, visit=2, host=2)
    assert not np.asarray(events.level).any()


def test_a_split_of_one_memory_is_no_gain() -> None:
    # link and host each take all of the memory's rate: half and half takes as long as either alone
    trace = drawn([[{0: 0.6, 1: 0.4}, NOTHING, NOTHING]])
    _, events = replay(trace, limited(2, 2, 500), SPLIT)
    close(events, 0, visit=4, host=4, miss=0)  # copies would have to be computed after that


def test_the_rates_that_freetoken_measures() -> None:
    """30.0 GB/s of experts on the CPU and 13.1 of the link alone; together 21.9 and 8.4, of 30.3."""
    hardware = Hardware(13.1e9, 0.0, 1e12, 1e12, 0.0, 1e15, 30.3e9, host_moe_bytes_per_s=30.0e9)
    one = jnp.ones(1)
    size = 10e6 * one
    found = costs(hardware, Work(size[None], one, one, one))
    host = host_work(found, jnp.int32(0), found.host_read_s[0], jnp.int32(1))
    longer = 1 + float(host.slow)
    assert 30.0 / longer == pytest.approx(21.9, rel=0.1)
    assert 13.1 / longer == pytest.approx(8.4, rel=0.1)
    assert (30.0 + 13.1) / longer == pytest.approx(30.3, rel=1e-5)


def test_everything_fits_in_the_end() -> None:
    """With room for everything `cpu` is `fetch`."""
    trace = drawn([[{0: 0.7, 1: 0.3}, {2: 1.0}, NOTHING]] * 2, dense_s=1)
    one, other = replay(trace, machine(2, host_s=3), CPU, EVERYTHING), replay(trace, machine(2, host_s=3))
    np.testing.assert_array_equal(one[1].outcome, other[1].outcome)
    np.testing.assert_array_equal(one[1].seconds, other[1].seconds)
