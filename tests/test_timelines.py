"""Timelines drawn by hand: the drawing in a comment, its seconds in the asserts.

Unless a test says otherwise: 3 layers of 4 experts, two routes a token; an expert is 1000 bytes, takes `copy_s` on the
link and a second a token on the device; the dense part of a layer takes `dense_s` a token. One character of a drawing
is one second. `gate_ahead` prefetches what the trace's `ahead` scores say: every copy is a choice of the drawing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from parity import engine, small_trace

from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.table import replay_grid
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.metrics import Metrics
from specmd_jax.replay.totals import (
    BUSY_S,
    FETCHED,
    LATE,
    LATE_S,
    LINK_S,
    MISS_S,
    PREFETCHED,
    REUSED,
    VISIT_S,
    Events,
    Totals,
)
from specmd_jax.specs.hardware import Hardware
from specmd_jax.types import Trace

LAYERS, EXPERTS, BYTES = 3, 4, 1000
EVERYTHING = LAYERS * EXPERTS * BYTES
Route = Mapping[int, float]  # expert -> gate

DEMAND = Mix.of("lru")
FOUR = {"selection": {"count": 4.0}}
AHEAD = Mix.of("lru", "gate_ahead", numbers=FOUR)


def machine(copy_s: float, *, latency_s: float = 0.0, launch_s: float = 0.0, host_s: float = math.inf) -> Hardware:
    """A second a token and expert on the device, `host_s` on the host, `copy_s` (after the latency) on the link."""
    return Hardware(
        link_bytes_per_s=BYTES / copy_s if copy_s else math.inf,
        link_latency_s=latency_s,
        peak_flops_per_s=float(BYTES),  # an expert of n bytes in 16 bits is n/2 weights, two operations each
        memory_bytes_per_s=math.inf,
        launch_s=launch_s,
        host_flops_per_s=BYTES / host_s if host_s < math.inf else 1.0,
        host_bytes_per_s=math.inf,
    )


def drawn(
    tokens: Sequence[Sequence[Route]],
    *,
    dense_s: float = 0.0,
    prompt: int = 0,
    ahead: Mapping[tuple[int, int], Route] | None = None,
) -> Trace:
    """Routes of each token at each layer; `ahead[token, layer]` is what the next layer is predicted to use."""
    ids = np.full((len(tokens), LAYERS, 2), -1, np.int16)
    gates = np.zeros(ids.shape, np.float32)
    for t, layers in enumerate(tokens):
        for layer, route in enumerate(layers):
            for k, (expert, gate) in enumerate(sorted(route.items(), key=lambda item: -item[1])):
                ids[t, layer, k], gates[t, layer, k] = expert, gate
    scores = np.zeros((len(tokens), LAYERS, EXPERTS), np.float32)
    for (t, layer), route in (ahead or {}).items():
        scores[t, layer, list(route)] = list(route.values())
    lengths, prompts = np.array([len(tokens)], np.int32), np.array([prompt], np.int32)
    sizes = np.full(LAYERS, BYTES, np.int64)
    return Trace(ids, lengths, prompts, EXPERTS, sizes, gates, ahead=scores, meta={"dense_bytes": dense_s * BYTES})


def replay(trace: Trace, hardware: Hardware, mix: Mix = DEMAND, budget: int = EVERYTHING) -> tuple[Totals, Events]:
    totals, events, _ = engine(prepare(trace), mix, budget, hardware)
    return totals, events


def seconds(events: Events, visit: int) -> dict[str, float]:
    row = np.asarray(events.seconds[visit], np.float64).tolist()
    return {"visit": row[VISIT_S], "late": row[LATE_S], "miss": row[MISS_S], "busy": row[BUSY_S], "link": row[LINK_S]}


def close(found: dict[str, float], **expected: float) -> None:
    """Seconds that are not named are zero, but for those of the link, which are then not looked at."""
    wanted = {"late": 0.0, "miss": 0.0, "busy": 0.0, "link": found["link"]} | expected
    assert found == pytest.approx(wanted, abs=1e-5)


NOTHING: Route = {}


def test_misses_are_copied_one_after_the_other() -> None:
    # second  01234
    # link    1100      the larger gate first
    # device  ..1.0     2 s of work, 3 s of waiting
    _, events = replay(drawn([[{0: 0.3, 1: 0.7}, NOTHING, NOTHING]]), machine(2))
    close(seconds(events, 0), visit=5, miss=3, link=4)
    assert events.outcome[0].tolist() == [FETCHED, FETCHED, 0, 0]


def test_hits_run_while_a_miss_is_copied() -> None:
    # second  0123
    # link    222
    # device  1..2      1 is resident since the first token
    _, events = replay(drawn([[{0: 0.3, 1: 0.7}, NOTHING, NOTHING], [{1: 0.6, 2: 0.4}, NOTHING, NOTHING]]), machine(3))
    close(seconds(events, 3), visit=4, miss=2, link=3)
    assert events.outcome[3].tolist() == [0, REUSED, FETCHED, 0]


def test_copies_go_by_falling_gate_mass() -> None:
    # three prompt tokens: expert 0 has 2 of them (mass 1.8), 1 has 3 (mass 0.3), 2 has 1 (mass 0.9)
    # second  012345678901
    # link    000222111
    # device  ...00.2..111       in the order of ids it would be ...00.1112 = 10 s
    prompt = [[{0: 0.9, 1: 0.1}, NOTHING, NOTHING]] * 2 + [[{2: 0.9, 1: 0.1}, NOTHING, NOTHING]]
    _, events = replay(drawn(prompt, prompt=3), machine(3))
    close(seconds(events, 0), visit=12, miss=6, link=9)


def test_a_skipped_layer_costs_its_dense_part() -> None:
    _, events = replay(drawn([[NOTHING, {0: 1.0}, NOTHING]], dense_s=2), machine(3))
    close(seconds(events, 0), visit=2, link=0)
    close(seconds(events, 1), visit=3 + 1 + 2, miss=3)


def test_a_launch_is_paid_by_each_expert_and_each_dense_part() -> None:
    _, events = replay(drawn([[{0: 0.5, 1: 0.5}, NOTHING, NOTHING]], dense_s=2), machine(0, launch_s=0.25))
    close(seconds(events, 0), visit=2 * 1.25 + 2.25)


def test_limits() -> None:
    trace = drawn([[{0: 0.3, 1: 0.7}, {2: 0.5, 3: 0.5}, {0: 1.0}]] * 2)
    for visit, work_s in enumerate((2, 2, 1)):
        _, free = replay(trace, machine(0))  # a link that takes no time leaves the work
        close(seconds(free, visit), visit=work_s, link=0)
        _, delayed = replay(trace, machine(0, latency_s=0.5))  # without bytes to move a copy is its latency
        experts = work_s
        close(seconds(delayed, visit), visit=work_s + 0.5, miss=0.5, link=0.5 * experts)
        _, both = replay(trace, machine(2, latency_s=0.5))
        close(seconds(both, visit), visit=2.5 * experts + 1, miss=2.5 * experts + 1 - work_s, link=2.5 * experts)
    close(seconds(replay(trace, machine(2))[1], 3), visit=2, link=0)  # everything is resident at the second token


# one expert a layer; layer 0 predicts layer 1 rightly
PREDICTED = [[{0: 1.0}, {1: 1.0}, NOTHING]]
RIGHTLY = {(0, 0): {1: 0.9}}


def test_a_late_hit_stalls_for_the_rest_of_its_copy() -> None:
    # second  0123456 7890
    # link    0000111 1
    # device  ....0dd .1dd     the gate of layer 1 is at 7, the copy of 1 ends at 8
    totals, events = replay(drawn(PREDICTED, dense_s=2, ahead=RIGHTLY), machine(4), AHEAD)
    close(seconds(events, 0), visit=7, miss=4, link=8)
    close(seconds(events, 1), visit=4, late=1, link=0)
    assert events.outcome[1, 1] == LATE
    assert (totals.experts.late.sum(), totals.experts.prefetch_hits.sum()) == (1, 0)


@pytest.mark.parametrize("dense_s", [3, 4])
def test_a_prefetch_that_ends_by_the_gate_is_on_time(dense_s: int) -> None:
    # second  01234567 8901
    # link    00001111
    # device  ....0ddd 1ddd
    totals, events = replay(drawn(PREDICTED, dense_s=dense_s, ahead=RIGHTLY), machine(4), AHEAD)
    close(seconds(events, 1), visit=1 + dense_s, link=0)
    assert events.outcome[1, 1] == PREFETCHED
    assert (totals.experts.late.sum(), totals.experts.prefetch_hits.sum()) == (0, 1)


@pytest.mark.parametrize(("dense_s", "started"), [(2, [1]), (3, [1]), (4, [1, 0])])
def test_no_prefetch_starts_at_or_after_the_gate(dense_s: int, started: list[int]) -> None:
    # second  012345678
    # link    00001111x        the copy of layer 1's expert 0 could start at 8
    # device  ....0ddd|        a gate at 7 or 8 forgets it, a gate at 9 does not
    trace = drawn([[{0: 1.0}, {0: 0.4, 1: 0.6}, NOTHING]], dense_s=dense_s, ahead={(0, 0): {0: 0.4, 1: 0.6}})
    _, events = replay(trace, machine(4), AHEAD)
    assert events.prefetched is not None
    order = events.prefetched[0, 0]
    assert [int(e) for e in np.argsort(np.where(order > 0, order, 9))][: int((order > 0).sum())] == started
    assert seconds(events, 0)["link"] == pytest.approx(4 + 4 * len(started))


def test_a_miss_waits_behind_a_late_hit() -> None:
    # second  0123456 789012
    # link    0000111 10000        1 is not pre-empted by the demand copy of 0
    # device  ....0dd .1...0dd     nothing waiting: 2 s; link idle at the gate: 5 s; as it is: 6 s
    trace = drawn([[{0: 1.0}, {0: 0.4, 1: 0.6}, NOTHING]], dense_s=2, ahead={(0, 0): {0: 0.4, 1: 0.6}})
    _, events = replay(trace, machine(4), AHEAD)
    close(seconds(events, 1), visit=8, late=0, miss=3, busy=1, link=4)
    assert events.outcome[1].tolist() == [FETCHED, LATE, 0, 0]


def test_a_wrong_prefetch_keeps_the_link_busy() -> None:
    # second  0123456 789012
    # link    0000333 32222
    # device  ....0dd .....2dd     3 was predicted, 2 is needed
    totals, events = replay(
        drawn([[{0: 1.0}, {2: 1.0}, NOTHING]], dense_s=2, ahead={(0, 0): {3: 0.9}}), machine(4), AHEAD
    )
    close(seconds(events, 0), visit=7, miss=4, link=4 + 4)  # the prefetch is charged to the same link
    close(seconds(events, 1), visit=8, miss=4, busy=1, link=4)
    assert (totals.prefetched.sum(), totals.experts.prefetch_used.sum(), totals.fetched_at.sum()) == (1, 0, 2)


def test_a_copy_outlasts_several_gates() -> None:
    # second  0123456789    0 1  2 3    a copy of 10 s; layer 1 is skipped; layer 2 predicted nothing
    # link    0000000000    3 3  3 3
    # device  ..........0d  d d         layer 1 is a second of dense part, twice
    trace = drawn([[{0: 1.0}, NOTHING, {2: 1.0}]], dense_s=1, ahead={(0, 0): {3: 0.9}})
    _, events = replay(trace, machine(10), AHEAD)
    close(seconds(events, 0), visit=12, miss=10, link=20)
    close(seconds(events, 1), visit=1, link=0)
    # the link is busy until 20, the gate of layer 2 is at 13: 7 s of waiting before its own 10
    close(seconds(events, 2), visit=7 + 10 + 1 + 1, miss=10, busy=7, link=10)


def test_a_percentile_selection_adapts_its_count_to_the_layer() -> None:
    # one expert of layer 1 is clearly predicted, and two of layer 2: so many lie above the 40th percentile
    ahead: dict[tuple[int, int], Route] = {}
    for token in range(8):
        ahead[token, 0] = {0: 0.97, 1: 0.01, 2: 0.01, 3: 0.01}
        ahead[token, 1] = {0: 0.49, 1: 0.01, 2: 0.49, 3: 0.01}
    trace = drawn([[{0: 1.0}, {0: 1.0}, {0: 0.5, 2: 0.5}]] * 8, dense_s=9, ahead=ahead)
    mix = Mix.of("lru", "gate_ahead", "percentile", numbers={"selection": {"percentile": 40.0}})
    totals, _ = replay(trace, machine(1), mix)
    assert totals.experts.predicted.tolist() == [0, 8, 16]
    assert totals.experts.predicted_right.tolist() == [0, 8, 16]


CONTROLS = ("none", "perfect", "shuffled")
BUDGETS = (8, 16, 24, 40)  # slots; a token cycle is 8
COUNT = {"selection": {"count": 2.0}}


@functools.cache
def controls(link_bytes_per_s: float) -> dict[str, list[Metrics]]:
    """Decode of 120 tokens through 4 layers of 16 experts that are drawn alike at each budget.

    The routing has no memory and no favourites, so that predictions for a wrong token tell nothing. Least-Stale keeps
    what is predicted and already resident; `lru` would throw some of it out to make room for what is copied.
    """
    trace = small_trace(
        3, experts=16, tokens=60, prompt_tokens=0, expert_bytes=BYTES, skew=0.0, stickiness=0.0, layer_correlation=0.0
    )
    replays = prepare(trace)
    hardware = machine(1, launch_s=0.5).replace(link_bytes_per_s=link_bytes_per_s)
    budgets = [BYTES * slots for slots in BUDGETS]
    mixes = {name: Mix.of("least_stale", name, numbers=COUNT) for name in CONTROLS}
    return {name: [row[0] for row in replay_grid(replays, mix, budgets, [hardware])] for name, mix in mixes.items()}


BOUND = 0.25 * BYTES  # a copy takes 4 s, an expert 1.5 s


def test_perfect_prefetch_on_an_infinite_link_never_stalls_after_the_first_pass() -> None:
    found = controls(math.inf)
    for cell in found["perfect"]:
        assert cell.stall_s == pytest.approx(0, abs=1e-6)
        assert cell.misses == 2  # nothing could foresee the first visit of all
    assert all(cell.misses > 100 for cell in found["none"])


def test_perfect_prefetch_on_a_link_faster_than_the_device_stalls_only_at_first() -> None:
    # two copies take 0.2 s, a layer 3 s
    for cell in controls(10.0 * BYTES)["perfect"]:
        assert cell.misses == 2
        assert cell.stall_s == pytest.approx(
            0.1, abs=1e-4
        )  # the second of the first two copies hides behind the first expert


def test_shuffled_predictions_do_not_help_when_the_link_binds() -> None:
    found, binding = controls(BOUND), 0
    for none, shuffled, perfect in zip(found["none"], found["shuffled"], found["perfect"], strict=True):
        assert none.link_utilisation is not None
        assert none.stall_s is not None and shuffled.stall_s is not None and perfect.stall_s is not None
        assert perfect.stall_s < none.stall_s
        if none.link_utilisation > 0.5:
            binding += 1
            assert shuffled.stall_s > 0.98 * none.stall_s
            assert shuffled.prefetch_precision == pytest.approx(2 / 16, abs=0.05)
            assert perfect.prefetch_precision == pytest.approx(1, abs=0.01)
    assert binding >= 3


def test_bytes_of_prefetch_and_demand_add_up_to_the_time_of_the_link() -> None:
    for cells in controls(BOUND).values():
        for cell in cells:
            assert cell.bytes_demand + cell.bytes_prefetch_used + cell.bytes_prefetch_wasted == cell.loads * BYTES
            assert cell.tpot_s is not None
            assert cell.link_utilisation == pytest.approx(4 * cell.loads / (120 * cell.tpot_s), rel=1e-4)


def test_stall_and_hits_split_without_a_rest() -> None:
    for cells in controls(BOUND).values():
        for cell in cells:
            assert cell.hits == cell.hits_reuse + cell.hits_prefetch + cell.hits_late
            parts = (cell.stall_late_s, cell.stall_miss_s, cell.stall_link_busy_s)
            assert cell.stall_s == pytest.approx(sum(part or 0.0 for part in parts))
    assert controls(BOUND)["perfect"][0].hits_late > 0
