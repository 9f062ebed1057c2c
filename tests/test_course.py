"""One visit of a timeline, drawn by hand; and link and host side by side, as the reference has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference.sharing import SideBySide

from specmd_jax.timelines.course import THE_HOST, Host, Load, course
from specmd_jax.timelines.sharing import Task, copied_s, side_by_side


def test_one_visit_drawn_by_hand() -> None:
    # second  0123456789012
    # link    ..11112222      the link is busy until 2
    # device  003...1..222d.  0 is there; 3 came late, at 2; 1 at 6, 2 at 10: 10 + 2, then the dense part
    load = Load(copies={1: 4.0, 2: 4.0}, runs={1: 1.0, 2: 2.0, 0: 1.5, 3: 1.0}, hosted={5: 3.0}, dense_s=1.0, late=3)
    found = course(load, gate_s=0.0, link_s=2.0)
    assert found.copies == {1: (2, 6), 2: (6, 10)}
    assert found.runs == {0: (0, 1.5), 3: (2, 3), 1: (6, 7), 2: (10, 12)}
    assert found.waits == [(3, 1.5, 2), (1, 3, 6), (2, 7, 10)]
    assert found.hosted == {5: (0, 3)}
    assert found.dense == (12, 13)
    # without waiting 5.5; 3 late: no more, as the others fill in; copies from 0: 8 + 2; as it is: 12
    assert (found.late_s, found.miss_s, found.busy_s) == (0, 4.5, 2)
    assert found.stall_s == sum(end - begin for _, begin, end in found.waits) == 6.5
    assert found.link_s == 10
    assert found.ahead([1.0, 2.0]) == [(10, 11), (11, 13)]


def test_reads_drawn_by_hand() -> None:
    # second  01234567890
    # storage 5552223333      storage reads the copy in flight until 3, then 2 for the host, then 1 for the link
    # link    ...5      11
    # host    ......222
    # device  0   5       1d
    load = Load(
        copies={1: 2.0}, runs={0: 1.0, 5: 1.0, 1: 1.0}, hosted={2: 3.0}, dense_s=1.0, late=5, reads={2: 3.0, 1: 4.0}
    )
    found = course(load, gate_s=10.0, link_s=14.0, storage_s=13.0)
    assert found.reads == {2: (13, 16), 1: (16, 20)} and found.storage_s == 20
    assert found.copies == {1: (20, 22)} and (found.found_s, found.link_s) == (14, 22)
    assert found.hosted == {2: (16, 19)}
    assert found.runs == {0: (10, 11), 5: (14, 15), 1: (22, 23)}
    # in host memory: 3 without waiting, the late copy at 4 makes it 5, the other behind it at 6 makes it 7
    assert (found.late_s, found.miss_s, found.busy_s, found.waits_s) == (2, 0, 2, 6)
    assert found.stall_s == sum(end - begin for _, begin, end in found.waits) == 10
    # of what is copied ahead the first is there, the second is read when the link is free
    assert found.read_ahead([(None, 1.0), (2.0, 1.0)]) == [(None, (22, 23)), ((23, 25), (25, 26))]


def test_moment_by_moment_as_the_reference() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        link, host = (
            [(float(ready), float(work)) for ready, work in rng.integers(0, 6, (int(rng.integers(0, 4)), 2))]
            for _ in range(2)
        )
        slow, left = float(rng.uniform(0, 2)), float(rng.uniform(0, 1))
        slow_twin = SideBySide(link, host, 1 / (1 + slow), left)
        found = side_by_side([Task(*task) for task in link], [Task(*task) for task in host], slow)
        for pieces, ends in zip(found, (slow_twin.link_ends, slow_twin.host_ends), strict=True):
            assert [end for _, end in pieces] == pytest.approx(ends)
        begin_s = max([0.0, *slow_twin.link_ends])
        assert copied_s(begin_s, 3.0, found[1], left) == pytest.approx(slow_twin.copied_s(begin_s, 3.0))


def test_pauses_that_the_host_hides_are_no_stall() -> None:
    # device  0.1.2     5 s, of which the host takes 4 anyway
    # host    3333
    load = Load(copies={1: 2.0, 2: 2.0}, runs={0: 1.0, 1: 1.0, 2: 1.0}, hosted={3: 4.0}, dense_s=0.0)
    found = course(load, gate_s=10.0, link_s=0.0)
    assert found.runs == {0: (10, 11), 1: (12, 13), 2: (14, 15)}
    assert found.stall_s == 1
    assert found.waits == [(2, 13, 14)]


def test_link_and_host_slow_each_other_down_by_hand() -> None:
    # second  0123456789012
    # link    ..11112        the rest of an earlier copy takes twice its second, the copy of 1 twice its two; then one
    # device  0.....1......  is prefetched at half the rate beside the host, and in full behind it
    # host    222222333h     half the rate for the three seconds that the link works, then its own; and the way back
    host = Host(handover_s=1.0, slow=1.0, left=0.5)
    load = Load(copies={1: 2.0}, runs={0: 1.0, 1: 1.0}, hosted={2: 3.0, 3: 3.0}, dense_s=0.0, host=host)
    found = course(load, gate_s=0.0, link_s=1.0)
    assert (found.found_s, found.copies) == (2, {1: (2, 6)})
    assert found.hosted == {2: (0, 6), 3: (6, 9)} and found.handover == (9, 10)
    assert found.runs == {0: (0, 1), 1: (6, 7)}
    assert found.ahead([1.0, 1.0]) == [(6, 8), (8, 9.5)]  # two of the host's three seconds, then half of the second one
    # undisturbed the host is back at 7; with the copy from 0: 2 later, and with the rest of the earlier one 1 more
    assert (found.late_s, found.miss_s, found.busy_s) == (0, 2, 1)
    assert found.waits == [(THE_HOST, 7, 10)] and found.dense == (10, 10)


@pytest.mark.parametrize(
    ("adds", "runs", "waits"),
    [
        (1.0, {0: (6, 7), 1: (7, 9)}, [(1, 2, 6)]),  # the host, back at 2, is no stall
        (0.5, {0: (3, 4), 1: (6.5, 8.5)}, [(1, 1, 3), (1, 4, 6.5)]),  # halfway between (0, 1), (6, 8) and the former
    ],
)
def test_an_engine_that_adds_by_hand(adds: float, runs: dict[int, Any], waits: list[Any]) -> None:
    load = Load(copies={1: 4.0}, runs={0: 1.0, 1: 2.0}, hosted={2: 2.0}, dense_s=1.0, adds=adds)
    found = course(load, gate_s=0.0, link_s=2.0)
    assert (found.copies, found.hosted) == ({1: (2, 6)}, {2: (0, 2)})
    assert (found.runs, found.waits) == (runs, waits)
    assert found.stall_s == sum(end - begin for _, begin, end in waits)
    assert found.dense == (runs[1][1], runs[1][1] + 1)
