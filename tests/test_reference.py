"""The reference replay on cases small enough to draw: the drawing is the comment, its numbers are the asserts.

Flat ids are layer * E + expert. Bytes are small integers and seconds exact in binary, so nothing is approximate.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from handmade import decode_schedule, pass_schedule
from reference import (
    DROPPED,
    EVICTION,
    FETCHED,
    HIT_LATE,
    HIT_PREFETCH,
    HIT_REUSE,
    MISS,
    NOT_DEMANDED,
    ON_CPU,
    PREFETCH,
    SUBSTITUTED,
    Costs,
    Engine,
    HostWork,
    Job,
    Percentile,
    Shared,
    TopK,
    experts_done,
    hash31,
    replay,
    score_bin,
)

from specmd_jax.types import NEVER


def one_layer(*demands: int | list[int]) -> list[list[list[int]]]:
    """[N][1] lists of ids, one decode pass each."""
    return [[[d] if isinstance(d, int) else d] for d in demands]


def costs(layers: int, **changes: Any) -> Costs:
    """1 byte/s without latency; an expert takes 1 s, a dense part 1 s, an expert on the host 2 s a token."""
    base = Costs(
        link_bytes_per_s=1.0,
        link_latency_s=0.0,
        expert_flops=[0.0] * layers,
        expert_mem_s=[[1.0] * layers] * 3,
        peak_flops_per_s=1.0,
        launch_s=0.0,
        dense_flops=[0.0] * layers,
        dense_mem_s=[1.0] * layers,
        host_expert_flop_s=[2.0] * layers,
        host_expert_mem_s=[0.0] * layers,
    )
    return replace(base, **changes)


def foresight(visits: int, horizon: int, experts: int, *wants: tuple[int, int, int, float]) -> np.ndarray:
    """[V, H, E] with want-scores at (visit, h, expert)."""
    future = np.zeros((visits, horizon, experts), np.float32)
    for v, h, e, want in wants:
        future[v, h - 1, e] = want
    return future


# --------------------------------------------------------------------------------------------------------- the builder


def test_builder_follows_section_one() -> None:
    # One prefill of two tokens, then one decoded token; 1 layer, 4 experts.
    #   gate order of the prefill: 0 1 | 3 0   last positions 1: 1, 3: 2, 0: 3   masses 0: .5 + .25, 1: .5, 3: .75
    gates = [[[[0.5, 0.5]], [[0.75, 0.25]]], [[[0.5, 0.5]]]]
    schedule = pass_schedule([[[[0, 1]], [[3, 0]]], [[[2, 1]]]], 1, 4, gates)
    assert schedule.rank.tolist() == [[2, 0, -1, 1], [-1, 1, 0, -1]]
    assert schedule.count.tolist() == [[2, 1, 0, 1], [0, 1, 1, 0]]
    assert schedule.mass.tolist() == [[0.75, 0.5, 0, 0.75], [0, 0.5, 0.5, 0]]
    assert schedule.by_mass.tolist() == [[0, 3, 1], [1, 2, -1]]
    assert schedule.next_use.tolist() == [[NEVER, 1, NEVER, NEVER], [NEVER] * 4]
    assert schedule.clock.tolist() == [0, 4]
    assert schedule.tokens.tolist() == [2, 1]


@pytest.mark.parametrize(("order", "events"), [("sequential", [0, 1, 3, 2, 1]), ("sequential-id", [0, 1, 3, 1, 2])])
def test_builder_spreads_a_visit_over_events(order: str, events: list[int]) -> None:
    schedule = pass_schedule([[[[0, 1]], [[3, 0]]], [[[2, 1]]]], 1, 4, order=order)
    assert [int(np.flatnonzero(row)[0]) for row in schedule.count] == events
    assert schedule.clock.tolist() == [0, 2, 4, 6, 8]
    assert schedule.pass_id.tolist() == [0, 0, 0, 1, 1]
    assert schedule.ends_layer.tolist() == [False, False, True, False, True]
    assert schedule.next_use[1, 1] == events.index(1, 2)
    assert schedule.count[0, 0] == 2


def test_builder_keeps_a_skipped_layer() -> None:
    schedule = decode_schedule([[[0], [-1]], [[], [1]]], 2, 2)
    assert schedule.demanded.tolist() == [1, 0, 0, 1]
    assert schedule.clock.tolist() == [0, 2, 3, 4]
    assert schedule.ends_layer.all()


# ------------------------------------------------------------------------------------------------------------ eviction


def test_lru_on_paper() -> None:
    # budget 2    demand   0     1     0     2     1
    #             touch    0     2     4     6     8
    #             before   -     0    0 1   0 1   0 2
    #             leaves                     1     0
    out = replay(decode_schedule(one_layer(0, 1, 0, 2, 1), 1, 3), eviction="lru", budget=2, level_bytes=[[1]])
    codes = [out.outcome[v, e] for v, e in enumerate([0, 1, 0, 2, 1])]
    assert codes == [FETCHED, FETCHED, HIT_REUSE, FETCHED, FETCHED]
    assert np.count_nonzero(out.outcome) == 5
    assert out.evicted == [[], [], [], [1], [0]]
    assert out.resident[-1].tolist() == [[0, 1, 1]]
    assert (out.loads[0], out.evictions[0]) == (4, 2)


def test_last_position_decides_recency_inside_a_visit() -> None:
    # Prefill 0 1 | 1 0: 1 is touched at 0, 0 at 1. The next demand pushes out 1, whose first position is the later one.
    schedule = pass_schedule([[[[0, 1]], [[1, 0]]], [[[2]]]], 1, 3)
    assert replay(schedule, eviction="lru", budget=2, level_bytes=[[1]]).evicted == [[], [1]]


def test_ties_the_lower_flat_id_stays() -> None:
    # belady, and nobody is needed again: 0 1 2 are resident, 3 arrives, 2 leaves.
    schedule = decode_schedule(one_layer(0, 1, 2, 3), 1, 4)
    assert replay(schedule, eviction="belady", budget=3, level_bytes=[[1]]).evicted == [[], [], [], [2]]


def test_belady_with_and_without_forced_admission() -> None:
    # visit      0   1   2   3   4   5      budget 2
    # demand     0   1   2   0   1   2
    # next use   3   4   5   -   -   -
    # forced             1 leaves (4 > 3)   then 1 misses: 0 leaves (never), 2 (next 5) stays and hits
    # bypass             2 leaves (5)       0 and 1 hit; 2 misses: all never, the highest id leaves: 2
    schedule = decode_schedule(one_layer(0, 1, 2, 0, 1, 2), 1, 3)
    forced = replay(schedule, eviction="belady", budget=2, level_bytes=[[1]])
    bypass = replay(schedule, eviction="belady_bypass", budget=2, level_bytes=[[1]])
    assert forced.evicted == [[], [], [1], [], [0], []]
    assert bypass.evicted == [[], [], [2], [], [], [2]]
    assert (forced.loads[0], bypass.loads[0]) == (4, 4)
    assert [bypass.outcome[3, 0], bypass.outcome[4, 1], bypass.outcome[5, 2]] == [HIT_REUSE, HIT_REUSE, FETCHED]


def test_belady_knows_the_first_use_of_a_prefetched_expert() -> None:
    # L = 2, E = 2, budget 2. Visit 0 misses flat 0 and prefetches flat 3; visit 1 misses flat 2, and one must leave:
    #   flat 0 is due at visit 2, flat 3 at its first use, visit 3: it leaves (unless the oracle is told visit 1).
    schedule = decode_schedule([[[0], [0]], [[0], [1]]], 2, 2)
    common: dict[str, Any] = {
        "eviction": "belady",
        "budget": 2,
        "level_bytes": [[1, 1]],
        "prefetch": "perfect",
        "future": foresight(4, 1, 2, (0, 1, 1, 1.0)),
    }
    known = replay(schedule, first_use=np.array([[0, NEVER], [1, 3]]), **common)
    early = replay(schedule, first_use=np.array([[0, NEVER], [1, 1]]), **common)
    assert known.evicted[1] == [3]
    assert early.evicted[1] == [0]


# Demands 0 0 0 1 1 2 0, then 3 finds budget 3 full; each policy names who leaves for it.
#   last touch   0: 12  1: 8  2: 10     loaded   0, 6, 10         uses  0: 4  1: 2  2: 1
#   lfru at visit 7   0: 4/2  1: 2/4  2: 1/3
#   decay 1/2, read after visit 7's own decay   0: (.875/8 + 1)/4 = .277   1: .75/8 = .094   2: .5/4 = .125
#   gates   0: 4 x .0625 = .25   1: 2 x .25 = .5   2: .75
#   slru, 1.2 bytes protected   hit 1 at visit 4: 0 falls; hit 0 at visit 6: 1 falls with touch 12 + 1; 2 (10) leaves
LEAVES = [
    ("lru", {}, 1),
    ("fifo", {}, 0),
    ("lfu", {}, 2),
    ("lfu_resident", {}, 2),
    ("lfu_decay", {"decay": 0.5}, 1),
    ("lfru", {}, 2),
    ("slru", {"protected": 0.4}, 2),
    ("lhu", {}, 2),
    ("score", {}, 0),
    ("fld", {}, 2),
    ("belady", {}, 2),
]


@pytest.mark.parametrize(("eviction", "numbers", "victim"), LEAVES)
def test_who_leaves(eviction: str, numbers: dict[str, Any], victim: int) -> None:
    demands = [0, 0, 0, 1, 1, 2, 0, 3]
    gate = {0: 0.0625, 1: 0.25, 2: 0.75, 3: 1.0}
    schedule = decode_schedule(one_layer(*demands), 1, 4, [[[gate[e]]] for e in demands])
    out = replay(schedule, eviction=eviction, numbers=numbers, budget=3, level_bytes=[[1]])
    assert out.evicted == [[]] * 7 + [[victim]]


def test_slru_falls_again_and_again() -> None:
    # As above, then 1 hits again (touch 16): 0 falls with touch 17. Then 2 misses: 3 (touch 14) leaves, not 0.
    schedule = decode_schedule(one_layer(0, 0, 0, 1, 1, 2, 0, 3, 1, 2), 1, 4)
    out = replay(schedule, eviction="slru", numbers={"protected": 0.4}, budget=3, level_bytes=[[1]])
    assert out.evicted[7:] == [[2], [], [3]]


def test_lfu_keeps_counts_over_evictions_and_lfu_resident_does_not() -> None:
    # budget 2   demand 0 0 1 2 1 2    2 pushes out 1, 1 pushes out 2, and at the end 0 and 1 compete:
    #   all uses: 2 and 2, so the older touch (0) leaves; since the load: 2 and 1, so 1 leaves.
    schedule = decode_schedule(one_layer(0, 0, 1, 2, 1, 2), 1, 3)
    assert replay(schedule, eviction="lfu", budget=2, level_bytes=[[1]]).evicted[3:] == [[1], [2], [0]]
    assert replay(schedule, eviction="lfu_resident", budget=2, level_bytes=[[1]]).evicted[3:] == [[1], [2], [1]]


def test_lhu_counts_only_uses_at_the_top_level() -> None:
    # fetch_priority(bottom 0.5) of a visit of two: the first is fetched at level 2, the second at level 1.
    #   visit 0: 0 at top, 1 at low; visit 1: 2 at top, 1 at low (hit).  top uses 0: 1, 1: 0, 2: 1
    #   visit 2: 3 at top (n = 1): 2 + 1 + 2 + 2 = 7 bytes > 6: 1 leaves, though it is used most and latest.
    gates = [[[0.75, 0.25]], [[0.75, 0.25]], [[1.0]]]
    schedule = decode_schedule([[[0, 1]], [[2, 1]], [[3]]], 1, 4, gates)
    common: dict[str, Any] = {"budget": 6, "level_bytes": [[1], [2]], "miss": "fetch_priority"}
    common["miss_numbers"] = {"bottom": 0.5}
    assert replay(schedule, eviction="lhu", **common).evicted == [[], [], [1]]
    assert replay(schedule, eviction="lfu", **common).evicted == [[], [], [0]]


def test_fld_distances() -> None:
    # Layers 0 and 2 are resident, layer 3 of 4 loads. Cyclic: layer 2 is 3 away; absolute: layer 0 is 3 away.
    schedule = decode_schedule([[[0], [], [0], [0]]], 4, 1)
    common: dict[str, Any] = {"eviction": "fld", "budget": 2, "level_bytes": [[1] * 4]}
    assert replay(schedule, numbers={"distance": "cyclic"}, **common).evicted[3] == [2]
    assert replay(schedule, numbers={"distance": "absolute"}, **common).evicted[3] == [0]


def test_random_is_the_hash() -> None:
    def by_numpy(seed: int, visit: int, flat: int) -> int:
        with np.errstate(over="ignore"):
            x = (
                np.uint32(seed) * np.uint32(0x9E3779B1)
                + np.uint32(visit) * np.uint32(0x85EBCA77)
                + np.uint32(flat) * np.uint32(0xC2B2AE3D)
            )
            x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
            x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
            return int((x ^ (x >> np.uint32(16))) >> np.uint32(1))

    assert hash31(0, 0, 0) == 0
    assert [hash31(7, v, f) for v in range(3) for f in range(9)] == [
        by_numpy(7, v, f) for v in range(3) for f in range(9)
    ]
    scores = {e: hash31(7, 3, e) for e in range(3)}
    out = replay(
        decode_schedule(one_layer(0, 1, 2, 3), 1, 4),
        eviction="random",
        numbers={"seed": 7},
        budget=3,
        level_bytes=[[1]],
    )
    assert out.evicted[3] == [min(scores, key=lambda e: scores[e])]


# Three layers of two experts, flat ids 0 1 | 2 3 | 4 5; each case ends with one expert too many.
#   (a) pass 0 loads 2 and 4, pass 1 loads 0: both stale and right of layer 0, 2 touched first.
#   (b) pass 0 loads 4, pass 1 loads 2, pass 2 loads 0: both stale and right, 4 touched first.
#   (c) pass 0 loads 0, 2, 4, pass 1 loads 1 (current), then 3 at layer 1: stale 0 (left), 2 (own layer), 4 (right).
A = [[[], [0], [0]], [[0], [], []]]
B = [[[], [], [0]], [[], [0], []], [[0], [], []]]
C = [[[0], [0], [0]], [[1], [1], []]]
READINGS = [("cyclic", 4, 4, 2), ("left_first", 4, 4, 0), ("literal", 2, 2, 0), ("recency", 2, 4, 0)]


@pytest.mark.parametrize(("reading", "a", "b", "c"), READINGS)
def test_least_stale_readings(reading: str, a: int, b: int, c: int) -> None:
    for passes, budget, victim in [(A, 2, a), (B, 2, b), (C, 4, c)]:
        schedule = decode_schedule(passes, 3, 2)
        numbers = {"reading": reading}
        out = replay(schedule, eviction="least_stale", numbers=numbers, budget=budget, level_bytes=[[1] * 3])
        assert [flat for gone in out.evicted for flat in gone] == [victim]


def test_least_stale_selection_makes_a_stale_resident_current() -> None:
    # (a) again, but at (1, 0) the expert of layer 2 is selected for this pass: now 2 is the only stale one.
    schedule = decode_schedule(A, 3, 2)
    out = replay(
        schedule,
        eviction="least_stale",
        budget=2,
        level_bytes=[[1] * 3],
        prefetch="perfect",
        horizon=2,
        future=foresight(6, 2, 2, (3, 2, 0, 1.0)),
    )
    assert out.evicted[3] == [2]
    assert out.prefetched == [[]] * 6


def test_least_stale_selection_across_the_pass_is_for_the_next_one() -> None:
    # Pass 0 loads 0, then 2; its last layer selects 0 for pass 1. Pass 1 skips layer 0 and loads 3 at layer 1: by
    # recency 0 is the older, but it is current and 2 is stale.
    schedule = decode_schedule([[[0], [0], []], [[], [1], []]], 3, 2)
    common: dict[str, Any] = {"eviction": "least_stale", "numbers": {"reading": "recency"}}
    common |= {"budget": 2, "level_bytes": [[1] * 3], "prefetch": "perfect"}
    selected = replay(schedule, future=foresight(6, 1, 2, (2, 1, 0, 1.0)), **common)
    ignored = replay(schedule, future=foresight(6, 1, 2), **common)
    assert (selected.evicted[4], ignored.evicted[4]) == ([2], [0])


# ----------------------------------------------------------------------------------------------------------- residency


def test_collision_is_a_miss_on_what_left_in_the_same_pass() -> None:
    # budget 1, global.  pass 0: layer 0 loads flat 0, layer 1 loads 2 (0 leaves).
    #   pass 1: flat 0 misses, but it left in pass 0. It pushes out 2, which layer 1 then asks for: a collision.
    schedule = decode_schedule([[[0], [0]], [[0], [0]]], 2, 2)
    out = replay(schedule, eviction="lru", budget=1, level_bytes=[[1, 1]])
    assert (out.outcome[:, 0] == FETCHED).all()
    assert out.collision[:, 0].tolist() == [False, False, False, True]


def test_layer_scope_keeps_a_pool_a_layer() -> None:
    # One slot for layer 0, two for layer 1: layer 0 evicts its own, layer 1 keeps both.
    schedule = decode_schedule([[[0], [0]], [[1], [1]]], 2, 2)
    out = replay(schedule, eviction="lru", budget=[1, 2], level_bytes=[[1, 1]])
    assert out.evicted == [[], [], [0], []]
    assert out.resident[-1].tolist() == [[0, 1], [1, 1]]


def test_oversize_stream_keeps_the_best_and_hold_waits_for_the_next_visit() -> None:
    # budget 2, lru: the visit 3 1 0 (touches 0 1 2) needs three slots; then 2.
    #   stream: 3 leaves at once; 2 pushes out 1.    hold: three stay; 2 makes four, and 3, then 1 leave.
    schedule = decode_schedule([[[3, 1, 0]], [[2]]], 1, 4)
    stream = replay(schedule, eviction="lru", budget=2, level_bytes=[[1]])
    hold = replay(schedule, eviction="lru", budget=2, level_bytes=[[1]], oversize="hold")
    assert stream.evicted == [[3], [1]]
    assert hold.evicted == [[], [3, 1]]
    assert hold.resident.tolist() == [[[1, 1, 0, 1]], [[1, 0, 1, 0]]]


def test_oversize_stream_copies_in_id_order_and_starts_no_prefetch() -> None:
    # Copies of 2 s. Expert 2 serves five tokens (5 s, the most mass), 0 and 1 one token each (1 s).
    #   stream, id order     0 arrives 2, runs 2-3 | 1 arrives 4, runs 4-5 | 2 arrives 6, runs 6-11: done 11
    #   hold, falling mass   2 arrives 2, runs 2-7 | the others have arrived by then, 7-8, 8-9: done 9
    # With room for four there is no oversize: the order of falling mass, and the prefetch starts.
    prefill = [[[0]], [[1]], [[2]], [[2]], [[2]], [[2]], [[2]]]
    schedule = pass_schedule([prefill, [[[0]]]], 1, 4)
    assert schedule.count[0].tolist() == [1, 1, 5, 0]
    common: dict[str, Any] = {
        "eviction": "lru",
        "budget": 4,
        "level_bytes": [[2]],
        "costs": costs(1, expert_flops=[1.0], expert_mem_s=[[0.0]]),
        "prefetch": "perfect",
        "future": foresight(2, 1, 4, (0, 1, 3, 1.0)),
    }
    stream = replay(schedule, **common)
    hold = replay(schedule, oversize="hold", **common)
    assert (stream.visit_s[0], hold.visit_s[0]) == (12, 10)
    assert (stream.prefetched[0], hold.prefetched[0]) == ([], [])
    assert stream.evicted[0] == [0]
    roomy = replay(schedule, **{**common, "budget": 8})
    assert (roomy.visit_s[0], roomy.prefetched[0]) == (10, [3])


def test_oversize_stream_starts_no_prefetch_in_another_pool_either() -> None:
    # Layer 0 has one slot and asks for two experts; layer 1's pool has room for the wanted one.
    schedule = decode_schedule([[[0, 1], []]], 2, 2)
    common: dict[str, Any] = {"eviction": "lru", "budget": [1, 2], "level_bytes": [[1, 1]], "prefetch": "perfect"}
    common["future"] = foresight(2, 1, 2, (0, 1, 0, 1.0))
    assert replay(schedule, oversize="stream", **common).prefetched == [[], []]
    assert replay(schedule, oversize="hold", **common).prefetched == [[2], []]


def test_reset_empties_the_cache_and_the_memory() -> None:
    # Request 0 uses 1 three times. Request 1 begins at pass 3 with nothing resident: 1 misses, and has one use when 0
    # comes, 2 has two. With the old counts 2 would leave.
    schedule = decode_schedule(one_layer(1, 1, 1, 1, 2, 2, 0), 1, 3, resets=(3,))
    out = replay(schedule, eviction="lfu", budget=2, level_bytes=[[1]])
    assert out.outcome[3, 1] == FETCHED
    assert out.evicted == [[]] * 6 + [[1]]
    assert out.emptied[0] == 1
    assert out.loads[0] - out.evictions[0] - out.emptied[0] == np.count_nonzero(out.resident[-1]) == 2
    assert schedule.request.tolist() == [0, 0, 0, 1, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------- time


def test_late_hit_waits_for_the_rest_of_its_copy() -> None:
    # bytes 4     0        4    5    6         8    9    10
    # link        [copy 0:0][prefetch 1:0      ]
    # device               [run][dense]         [run][dense]
    #                               gate 1 ^     2 s late
    schedule = decode_schedule([[[0], [0]]], 2, 2)
    out = replay(
        schedule,
        eviction="lru",
        budget=16,
        level_bytes=[[4, 4]],
        costs=costs(2),
        prefetch="perfect",
        future=foresight(2, 1, 2, (0, 1, 0, 1.0)),
    )
    assert out.outcome.tolist() == [[FETCHED, NOT_DEMANDED], [HIT_LATE, NOT_DEMANDED]]
    assert out.prefetched == [[2], []]
    assert out.visit_s.tolist() == [6, 4]
    assert out.stall_miss_s.tolist() == [4, 0]
    assert out.stall_late_s.tolist() == [0, 2]
    assert out.stall_link_busy_s.tolist() == [0, 0]
    assert (out.prefetch_used, out.prefetch_wasted) == (1, 0)
    assert (out.demand_bytes.tolist(), out.prefetch_bytes.tolist()) == ([4, 0], [4, 0])


def test_a_late_hit_runs_after_the_on_time_one_and_hides_behind_it() -> None:
    # Layer 0 of pass 1 prefetches 1:1 while 1:0 is resident from pass 0 and runs meanwhile: 1 s of waiting remains.
    #   pass 0   0:0 copied 0-4, gate 6; 1:0 copied 6-10, run 10-11, dense 11-12
    #   pass 1   gate 12; 0:0 hits, run 12-13, dense 13-14; prefetch 1:1 12-16
    #            gate 14; 1:0 runs 14-15; 1:1 arrives 16, runs 16-17; dense 17-18; unhindered: 14-16
    schedule = decode_schedule([[[0], [0]], [[0], [0, 1]]], 2, 2)
    out = replay(
        schedule,
        eviction="lru",
        budget=16,
        level_bytes=[[4, 4]],
        costs=costs(2),
        prefetch="perfect",
        future=foresight(4, 1, 2, (2, 1, 1, 1.0)),
    )
    assert out.outcome[3].tolist() == [HIT_REUSE, HIT_LATE]
    assert out.visit_s.tolist() == [6, 6, 2, 4]
    assert out.stall_late_s[3] == 1


def test_prefetch_starts_only_strictly_before_the_next_gate() -> None:
    # bytes 2     0    2    3    4
    # link        [copy][pre 1:0 ]        the second prefetch could start at 4, the gate of layer 1: too late
    # device           [run][dense]       and the first, which ends at 4, is there on time
    schedule = decode_schedule([[[0], [0]]], 2, 2)
    common: dict[str, Any] = {
        "eviction": "lru",
        "budget": 8,
        "level_bytes": [[2, 2]],
        "prefetch": "perfect",
        "future": foresight(2, 1, 2, (0, 1, 0, 2.0), (0, 1, 1, 1.0)),
        "select_numbers": {"count": 2},
    }
    out = replay(schedule, costs=costs(2), **common)
    assert out.prefetched[0] == [2]
    assert out.outcome[1, 0] == HIT_PREFETCH
    assert out.visit_s.tolist() == [4, 2]
    # A longer dense part leaves time for both; without costs there is no limit at all.
    assert replay(schedule, costs=costs(2, dense_mem_s=[1.5, 1.0]), **common).prefetched[0] == [2, 3]
    assert replay(schedule, **common).prefetched[0] == [2, 3]


def test_a_miss_behind_a_wrong_prefetch_waits_for_the_link() -> None:
    # bytes 4     0        4    5    6         8          12   13   14
    # link        [copy 0:0][prefetch 1:1      ][copy 1:0 ]
    # device               [run][dense]                   [run][dense]
    # On an idle link the copy takes 6-10, and the expert is done at 11 instead of 7 (miss 4); really at 13 (busy 2).
    schedule = decode_schedule([[[0], [0]]], 2, 2)
    out = replay(
        schedule,
        eviction="lru",
        budget=16,
        level_bytes=[[4, 4]],
        costs=costs(2),
        prefetch="perfect",
        future=foresight(2, 1, 2, (0, 1, 1, 1.0)),
    )
    assert out.outcome[1].tolist() == [FETCHED, NOT_DEMANDED]
    assert out.visit_s.tolist() == [6, 8]
    assert out.stall_miss_s.tolist() == [4, 4]
    assert out.stall_link_busy_s.tolist() == [0, 2]
    assert out.stall_late_s.tolist() == [0, 0]
    assert (out.prefetch_used, out.prefetch_wasted) == (0, 1)


def test_the_copy_in_flight_is_pinned() -> None:
    # As above with room for two: 0:0 and the prefetch 1:1 in flight (until 8) fill it when 1:0 misses at 6.
    #   belady would push 1:1 out, which is never used, but its copy is in flight: 0:0 goes instead.
    schedule = decode_schedule([[[0], [0]], [[0], [0]]], 2, 2)
    common: dict[str, Any] = {
        "eviction": "belady",
        "budget": 8,
        "level_bytes": [[4, 4]],
        "prefetch": "perfect",
        "future": foresight(4, 1, 2, (0, 1, 1, 1.0)),
    }
    assert replay(schedule, costs=costs(2), **common).evicted[1] == [0]
    assert replay(schedule, costs=costs(2, dense_mem_s=[3.0, 1.0]), **common).evicted[1] == [
        3
    ]  # it has arrived by then


def test_roofline_latency_and_token_counts() -> None:
    # Prefill of 3 tokens: expert 0 serves 3, expert 1 serves 1. bytes 4 at 2/s + 1 s latency: copies of 3 s.
    #   experts: max(n * 4 / 2, 3) + 0.5: 6.5 and 3.5.   dense: max(3 * 2 / 2, 1) + 0.5 = 3.5
    #   0 (more mass) arrives 3, runs 3-9.5; 1 arrives 6, runs 9.5-13; dense 13-16.5; unhindered: 10
    rates = costs(
        1,
        link_bytes_per_s=2.0,
        link_latency_s=1.0,
        expert_flops=[4.0],
        expert_mem_s=[[3.0]],
        peak_flops_per_s=2.0,
        launch_s=0.5,
        dense_flops=[2.0],
    )
    schedule = pass_schedule([[[[0, 1]], [[0]], [[0]]]], 1, 2)
    out = replay(schedule, eviction="lru", budget=8, level_bytes=[[4]], costs=rates)
    assert out.visit_s[0] == 16.5
    assert out.stall_miss_s[0] == 3


def test_a_skipped_layer_costs_its_dense_part() -> None:
    out = replay(decode_schedule([[[], [0]]], 2, 1), eviction="lru", budget=2, level_bytes=[[2, 2]], costs=costs(2))
    assert out.visit_s.tolist() == [1, 4]


def test_sequential_visits_share_one_dense_part() -> None:
    # copy 2 s, run 1 s each, one after the other: 3 + 3, and the dense second after the last.
    out = replay(
        decode_schedule([[[0, 1]]], 1, 2, order="sequential"),
        eviction="lru",
        budget=4,
        level_bytes=[[2]],
        costs=costs(1),
    )
    assert out.visit_s.tolist() == [3, 4]


# ------------------------------------------------------------------------------------------------------------ prefetch


def test_a_prefetch_without_room_is_skipped_and_the_next_is_tried() -> None:
    # Bytes by layer 1, 2, 1; budget 2; layer 0's demand holds 1. Layer 1's expert (2 bytes) has no room, layer 2's has.
    schedule = decode_schedule([[[0], [], []]], 3, 1)
    common: dict[str, Any] = {
        "eviction": "lru",
        "budget": 2,
        "prefetch": "perfect",
        "horizon": 2,
        "future": foresight(3, 2, 1, (0, 1, 0, 9.0), (0, 2, 0, 1.0)),
    }
    assert replay(schedule, level_bytes=[[1, 2, 1]], **common).prefetched[0] == [2]
    assert replay(schedule, level_bytes=[[1, 1, 1]], **common).prefetched[0] == [1]


def test_may_evict_false_only_fills_free_room() -> None:
    # Budget 2 holds flat 0 (layer 0) and 2 (layer 1) when pass 1 would like flat 3: something must leave for it.
    schedule = decode_schedule([[[0], [0]], [[0], [0]]], 2, 2)
    common: dict[str, Any] = {
        "eviction": "lru",
        "budget": 2,
        "level_bytes": [[1, 1]],
        "prefetch": "perfect",
        "future": foresight(4, 1, 2, (2, 1, 1, 1.0)),
    }
    assert replay(schedule, **common).prefetched[2] == [3]
    assert replay(schedule, may_evict=False, **common).prefetched[2] == []


def test_wanted_copies_go_by_score_then_nearer_layer_then_id() -> None:
    schedule = decode_schedule([[[0], [], []]], 3, 3)
    wants = [(0, 2, 2, 5.0), (0, 2, 0, 3.0), (0, 1, 2, 3.0), (0, 1, 1, 3.0)]
    out = replay(
        schedule,
        eviction="lru",
        budget=9,
        level_bytes=[[1] * 3],
        prefetch="perfect",
        horizon=2,
        select_numbers={"count": 2},
        future=foresight(3, 2, 3, *wants),
    )
    assert out.prefetched[0] == [8, 4, 5, 6]


def test_previous_with_least_stale() -> None:
    # Three layers, one expert asked for again and again, budget 2; flat ids 0 2 4.
    #   pass 0   0 | 2 | 4 pushes out 2: 0 is selected for pass 1, but all are current; 2 is two layers away, 0 is one
    #   pass 1   0 hits, 2 prefetched, stale 4 leaves | 2 hits, 4 prefetched, 0 leaves | 4 hits, 0 prefetched, 2 leaves
    schedule = decode_schedule([[[0], [0], [0]]] * 2, 3, 2)
    out = replay(schedule, eviction="least_stale", budget=2, level_bytes=[[1] * 3], prefetch="previous")
    assert out.prefetched == [[], [], [], [2], [4], [0]]
    assert out.evicted == [[], [], [2], [4], [0], [2]]
    assert out.outcome[3:, 0].tolist() == [HIT_REUSE, HIT_PREFETCH, HIT_PREFETCH]
    assert (out.prefetch_used, out.prefetch_wasted) == (2, 1)


def test_popular_counts_visits() -> None:
    # One layer, so the target is the same layer in the next pass. 0 0 1 2 2 with budget 2: at the first 2, 0 is the
    # most popular but resident, and leaves (lru); at the second, 0 and 2 have two uses, 0 is wanted and 1 leaves.
    schedule = decode_schedule(one_layer(0, 0, 1, 2, 2), 1, 3)
    out = replay(schedule, eviction="lru", budget=2, level_bytes=[[1]], prefetch="popular")
    assert out.prefetched == [[], [], [], [], [0]]
    assert out.evicted == [[], [], [], [0], [1]]


def test_gate_ahead_looks_one_layer_ahead_and_not_past_the_last() -> None:
    schedule = decode_schedule([[[0], []]], 2, 3, ahead=[[[0.1, 0.0, 0.7], [0.9, 0.9, 0.9]]])
    out = replay(
        schedule,
        eviction="lru",
        budget=6,
        level_bytes=[[1, 1]],
        prefetch="gate_ahead",
        horizon=2,
        select_numbers={"count": 3},
    )
    assert out.prefetched == [[5, 3], []]


def test_transition_learns_online() -> None:
    # Two layers of three, flat ids 0 1 2 | 3 4 5, budget 2, tokens (0 0) (1 1) (0 0).
    #   learned: 0:0 -> 1:0, then 1:0 -> 0:1 (next pass), then 0:1 -> 1:1
    #   pass 2: 0:0 asks for 1:0 (flat 3, gone by then); learns 1:1 -> 0:0; 1:0 asks for 0:1 (flat 1)
    schedule = decode_schedule([[[0], [0]], [[1], [1]], [[0], [0]]], 2, 3)
    out = replay(schedule, eviction="lru", budget=2, level_bytes=[[1, 1]], prefetch="transition")
    assert out.prefetched == [[], [], [], [], [3], [1]]
    assert out.outcome[5, 0] == HIT_PREFETCH


def test_topk_rounds_half_up_and_ties_go_to_the_lower_id() -> None:
    want = {e: np.float32(s) for e, s in [(4, 1.0), (2, 2.0), (1, 1.0), (0, 0.5)]}
    assert TopK(count=2.5).choose(0, want) == [2, 1, 4]  # 2.5 becomes 3
    assert TopK(count=2).choose(0, want) == [2, 1]
    assert TopK(count=0.4).choose(0, want) == []


def test_percentile_bins_and_threshold() -> None:
    bins = [score_bin(np.float32(x)) for x in (2.0**-20, 2.0**-16, 0.5, 1.0, 1.124, 1.125, 1.5, 15.9, 64.0)]
    assert bins == [0, 0, 120, 128, 128, 129, 132, 159, 159]
    half = Percentile(percentile=50.0)
    one, two = np.float32(1), np.float32(2)
    assert half.choose(0, {0: one, 1: two}) == [1]  # 1 of 2 scores is <= 1.0: exactly half
    assert half.choose(1, {0: two}) == []  # another layer has another histogram
    assert half.choose(0, {0: two}) == []  # now 2 of 3 are at 2.0
    assert half.choose(0, {0: one, 1: one, 2: two, 3: np.float32(0)}) == [2]  # 3 of 6, and zero is not counted


# ------------------------------------------------------------------------------------------------- miss rules, routing


def test_drop_leaves_out_misses_of_low_mass() -> None:
    # keep 1: of 0 (.75) and 1 (.25) only 0 is fetched; then 1 alone has rank 0; then both hit.
    schedule = decode_schedule([[[0, 1]], [[1]], [[0, 1]]], 1, 2, [[[0.75, 0.25]], [[1.0]], [[0.75, 0.25]]])
    out = replay(
        schedule,
        eviction="lru",
        budget=2,
        level_bytes=[[1]],
        miss="drop",
        miss_numbers={"keep": 1},
        costs=costs(1),
    )
    assert out.outcome.tolist() == [[FETCHED, DROPPED], [NOT_DEMANDED, FETCHED], [HIT_REUSE, HIT_REUSE]]
    assert out.visit_s.tolist() == [3, 3, 3]  # copy, run, dense | the same | run, run, dense
    assert out.resident[0].tolist() == [[1, 0]]


def test_a_dropped_use_is_still_a_use() -> None:
    # 1 is dropped twice, then fetched and used three times in all; 0 is used twice: lfu lets 0 go.
    gates = [[[0.75, 0.25]]] * 2 + [[[1.0]]] * 2
    schedule = decode_schedule([[[0, 1]], [[0, 1]], [[1]], [[2]]], 1, 3, gates)
    out = replay(schedule, eviction="lfu", budget=2, level_bytes=[[1]], miss="drop", miss_numbers={"keep": 1})
    assert out.evicted == [[], [], [], [0]]


def test_cpu_fills_the_cache_and_then_runs_misses_on_the_host() -> None:
    # Room for one expert. 0 is heavier: it is copied (1 s) and runs (1 s), beside 1 at 2 s on the host; 1 s dense.
    # Then 0 is there, and nothing takes its place: 1 and 2 take 4 s on the host, which is no stall.
    gates = [[[0.75, 0.25]], [[1.0]], [[0.5, 0.5]]]
    schedule = decode_schedule([[[0, 1]], [[0]], [[1, 2]]], 1, 3, gates)
    out = replay(schedule, eviction="lru", budget=1, level_bytes=[[1]], miss="cpu", costs=costs(1))
    assert out.outcome.tolist() == [[FETCHED, ON_CPU, 0], [HIT_REUSE, 0, 0], [0, ON_CPU, ON_CPU]]
    assert out.visit_s.tolist() == [3, 2, 5]
    assert out.host_s.tolist() == [2, 0, 4]
    assert not (out.stall_miss_s + out.stall_late_s + out.stall_link_busy_s).any()
    assert out.resident[:, 0].tolist() == [[1, 0, 0]] * 3
    assert out.evictions.sum() == 0


def test_split_ends_the_visit_first() -> None:
    # Three misses, 1 s each on link and device and 2 s on the host. Copies / host: 3 / 0 ends at 4, 2 / 1 at 3, 1 / 2
    # at 4. The lightest goes to the host and is not resident.
    schedule = decode_schedule([[[0, 1, 2]]], 1, 3, [[[0.5, 0.2, 0.3]]])
    out = replay(schedule, eviction="lru", budget=3, level_bytes=[[1]], miss="split", costs=costs(1))
    assert out.outcome.tolist() == [[FETCHED, ON_CPU, FETCHED]]
    assert out.visit_s[0] == 3 + 1
    assert out.resident[0, 0].tolist() == [1, 0, 1]
    # with a second to the host and back, 3 / 0 and 2 / 1 end alike: more are copied
    same = replay(schedule, eviction="lru", budget=3, level_bytes=[[1]], miss="split", costs=costs(1, handover_s=2.0))
    assert same.outcome.tolist() == [[FETCHED] * 3]


@pytest.mark.parametrize("overlaps", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_split_of_equal_experts_is_the_best_of_all_assignments(count: int, overlaps: float) -> None:
    rng = np.random.default_rng(count)
    schedule = decode_schedule([[list(range(count))]], 1, count)
    chosen = set()
    for _ in range(8):
        copy_s, compute_s, host_s, after_s = rng.uniform(0.1, 2, 4)
        limit = rng.uniform(0.3, 3)  # of the host's memory: from scarce to ample for experts of one byte
        machine = costs(
            1,
            link_bytes_per_s=1 / copy_s,
            expert_mem_s=[[compute_s]],
            host_expert_flop_s=[host_s],
            host_bytes_per_s=limit,
            handover_s=after_s,
            overlaps=overlaps,
            dense_mem_s=[0.0],
        )
        out = replay(schedule, eviction="lru", budget=count, level_bytes=[[1]], miss="split", costs=machine)
        ends = []
        for sides in itertools.product((True, False), repeat=count):
            order = [e for e in range(count) if sides[e]]
            host = machine.host_work(0, dict.fromkeys(range(count - len(order)), 1), 1)
            engine = Engine(host, 1 / copy_s, limit, overlaps)
            jobs = [Job(e, compute_s, copy_s=copy_s) for e in order]
            ends.append(experts_done(jobs, 0.0, engine, order, late_waits=True, copies_from=0.0))
        assert out.visit_s[0] <= min(ends) * (1 + 1e-6)
        chosen.add(int((out.outcome == ON_CPU).sum()))
    assert len(chosen) > 1


def test_copies_and_the_host_share_its_memory() -> None:
    # A copy draws 8 and the host 24 bytes a second, of 24 together: each at 24 / 32 of its rate while both work.
    #   second  0123456789
    #   link    000000       4.5 s of copies take 6
    #   host    00000011     6 s of work: 4.5 of them in the first 6 seconds, then 1.5 alone
    host = HostWork(6.0, 24.0)
    shared = Shared(4.5, 8.0, host, 24.0)
    assert (shared.at(1.5), shared.at(4.5), shared.host_s) == (2.0, 6.0, 7.5)
    # the host leaves nothing to a prefetch: it runs from 7.5 on
    assert (shared.at(5.5), shared.at(6.5)) == (8.5, 9.5)
    # 12 of 24 left for 16: a prefetch has three quarters of its rate until the host is done, and so had the copies
    shared = Shared(3.0, 16.0, HostWork(6.0, 12.0), 24.0)
    assert shared.at(3.0) == pytest.approx(3.5)  # 24 / 28
    assert shared.host_s == 6.5
    assert (shared.at(5.25), shared.at(6.25)) == (pytest.approx(6.5), pytest.approx(7.5))
    # copies that outlast the host go on alone
    shared = Shared(6.0, 8.0, HostWork(3.0, 24.0), 24.0)
    assert (shared.host_s, shared.at(3.0), shared.at(6.0), shared.at(7.0)) == (4.0, 4.0, 7.0, 8.0)


def test_an_engine_that_adds_computes_when_everything_is_there() -> None:
    # 0 is resident after the first token, 1 is copied in 1 s: 0 runs beside the copy or after it; 1 s dense, and
    # 1/4 + 1/8 s of launches and waiting.
    schedule = decode_schedule([[[0]], [[0, 1]]], 1, 2)
    common: dict[str, Any] = {"eviction": "lru", "budget": 2, "level_bytes": [[1]]}
    for overlaps, experts_s in ((1.0, 2.0), (0.0, 3.0), (0.5, 2.5)):
        machine = costs(1, overlaps=overlaps, layer_s=0.25, sync_s=0.125)
        out = replay(schedule, costs=machine, **common)
        assert out.visit_s.tolist() == [2 + 1.375, experts_s + 1.375]
        assert out.stall_miss_s.tolist() == [1, experts_s - 2]


def test_fetch_priority_and_upgrades() -> None:
    # Five experts by falling mass 4 3 2 1 0, bottom 60 %: 4 and 3 at level 2 (2 bytes), the rest at level 1 (1 byte).
    # Alone, 0 is important: its low copy is a miss and is replaced; 4 hits.
    gates = [[[0.4, 0.3, 0.15, 0.1, 0.05]], [[1.0]], [[1.0]]]
    schedule = decode_schedule([[[4, 3, 2, 1, 0]], [[0]], [[4]]], 1, 5, gates)
    out = replay(schedule, eviction="lru", budget=9, level_bytes=[[1], [2]], miss="fetch_priority")
    assert out.resident[:, 0].tolist() == [[1, 1, 1, 2, 2], [2, 1, 1, 2, 2], [2, 1, 1, 2, 2]]
    assert out.outcome[1, 0] == FETCHED
    assert out.outcome[2, 4] == HIT_REUSE
    assert out.demand_bytes.tolist() == [7, 2, 0]
    assert (out.loads[0], out.upgrades[0], out.evictions[0]) == (5, 1, 0)


def test_cascade_and_lowest_bit_levels() -> None:
    schedule = decode_schedule([[[2, 1, 0]]], 1, 3, [[[0.625, 0.25, 0.125]]])
    common: dict[str, Any] = {"eviction": "lru", "budget": 9, "level_bytes": [[1], [2], [4]]}
    assert replay(schedule, miss="cascade", **common).resident[0].tolist() == [[1, 2, 3]]
    assert replay(schedule, miss="fetch_lowest_bit", **common).resident[0].tolist() == [[1, 1, 1]]
    assert replay(schedule, miss="fetch", **{**common, "budget": 12}).resident[0].tolist() == [[3, 3, 3]]


def test_substitute_within_tolerance() -> None:
    # 0 resident. 1 (.45) is missed, 0 has .4: near enough. 2 (.8) is missed, 0 has .1: fetched.
    probabilities = [[1.0, 0.001, 0.001], [0.4, 0.45, 0.15], [0.1, 0.1, 0.8]]
    logits = [[[np.log(p)]] for p in probabilities]
    schedule = decode_schedule(one_layer(0, 1, 2), 1, 3, logits=logits)
    out = replay(
        schedule, eviction="lru", budget=2, level_bytes=[[1]], miss="substitute", miss_numbers={"tolerance": 0.1}
    )
    assert [out.outcome[v, v] for v in range(3)] == [FETCHED, SUBSTITUTED, FETCHED]
    assert out.stand_in[1, 1] == 0
    assert out.resident[-1].tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(("strength", "chosen"), [(0.3, 1), (0.35, 0)])
def test_cache_aware_routing(strength: float, chosen: int) -> None:
    # Spreads 2 and 4, so delta at the second token is 3. z = (1, 2, -2), 0 is cached: 1 + 3 x passes 2 at x = 1/3.
    schedule = decode_schedule(one_layer(0, 1), 1, 3, logits=[[[[2, 1, 0]]], [[[1, 2, -2]]]])
    out = replay(
        schedule,
        eviction="lru",
        budget=2,
        level_bytes=[[1]],
        routing="cache_aware",
        routing_numbers={"strength": strength},
    )
    assert np.flatnonzero(out.outcome[1]).tolist() == [chosen]
    assert out.outcome[1, chosen] == (HIT_REUSE if chosen == 0 else FETCHED)


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("order", ["atomic", "sequential"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("eviction", EVICTION)
def test_laws(eviction: str, scope: str, order: str) -> None:
    rng = np.random.default_rng(5)
    layers, experts = 3, 6
    tokens = [[rng.choice(experts, 2, replace=False).tolist() for _ in range(layers)] for _ in range(24)]
    schedule = pass_schedule([tokens[:4], *([t] for t in tokens[4:])], layers, experts, order=order, resets=(12,))
    budget = 8 if scope == "global" else [3, 2, 4]
    common: dict[str, Any] = {"budget": budget, "level_bytes": [[1] * layers]}
    out = replay(schedule, eviction=eviction, prefetch="transition", horizon=2, **common)
    assert ((out.outcome > 0) == (schedule.count > 0)).all()
    occupancy = (out.resident > 0).sum(axis=(1, 2))
    assert (out.loads - out.evictions - out.emptied == (out.resident[-1] > 0).sum(axis=1)).all()
    assert occupancy.max() <= np.sum(budget)
    prefetches = sum(map(len, out.prefetched))
    assert out.prefetch_used + out.prefetch_wasted == prefetches > 0
    demand_only = replay(schedule, eviction=eviction, **common)
    bound = replay(schedule, eviction="belady_bypass", **common)
    assert (demand_only.outcome == FETCHED).sum() >= (bound.outcome == FETCHED).sum() > 0


@pytest.mark.parametrize("selection", [("topk", {"count": 2}), ("percentile", {"percentile": 50.0})])
@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("miss", MISS)
def test_laws_of_time(miss: str, prefetch: str, selection: tuple[str, dict[str, Any]]) -> None:
    rng = np.random.default_rng(6)
    layers, experts, passes = 3, 6, 16
    logits = rng.normal(size=(passes, 1, layers, experts)).astype(np.float32)
    tokens = np.argsort(-logits[:, 0], axis=-1)[..., :2].tolist()
    ahead = rng.random((passes, layers, experts)) * (rng.random((passes, layers, experts)) < 0.5)
    schedule = decode_schedule(tokens, layers, experts, ahead=ahead, logits=logits)
    future = rng.random((schedule.visits, 1, experts)) * (rng.random((schedule.visits, 1, experts)) < 0.4)
    common: dict[str, Any] = {"eviction": "lru", "budget": 36, "level_bytes": [[2] * 3, [4] * 3]}
    common |= {"miss": miss, "prefetch": prefetch, "selection": selection[0], "select_numbers": selection[1]}
    out = replay(schedule, future=future, costs=costs(layers, link_bytes_per_s=2.0, link_latency_s=0.25), **common)
    assert ((out.outcome > 0) == (schedule.count > 0)).all()
    stalls = np.stack([out.stall_late_s, out.stall_miss_s, out.stall_link_busy_s])
    assert stalls.min() >= 0
    # Without waiting: a dense part and, one after the other, 1 s an expert on the device beside 2 s one on the host.
    host = (out.outcome == ON_CPU).sum(axis=1)
    device = ((out.outcome > 0) & (out.outcome != DROPPED)).sum(axis=1) - host
    # a stand-in runs once, however many it stands in for
    device -= np.array([(row >= 0).sum() - len(set(row[row >= 0].tolist())) for row in out.stand_in])
    assert out.visit_s - stalls.sum(axis=0) == pytest.approx(1 + np.maximum(device, 2 * host))
    # A late hit is the only reason for lateness.
    assert not out.stall_late_s[~(out.outcome == HIT_LATE).any(axis=1)].any()
    held = (out.resident == 1).sum(axis=(1, 2)) * 2 + (out.resident == 2).sum(axis=(1, 2)) * 4
    assert held.max() <= 36
    assert out.prefetch_used + out.prefetch_wasted == sum(map(len, out.prefetched))


def test_unknown_names_are_refused() -> None:
    schedule = decode_schedule(one_layer(0), 1, 1)
    with pytest.raises(ValueError, match="unknown eviction 'lur'"):
        replay(schedule, eviction="lur", budget=1, level_bytes=[[1]])
    with pytest.raises(ValueError, match="horizon 2"):
        replay(schedule, eviction="lru", budget=1, level_bytes=[[1]], horizon=2)
