"""Warm starts, pins and admission: the scan equals the reference event for event, and nothing changes without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import compare, small_trace

from specmd_jax.api import explain, run, sweep
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import pinned, static
from specmd_jax.policies.choice import Mix
from specmd_jax.setting import Setting, grid
from specmd_jax.trace.profile import Profile, as_profile, load_profile, profile_of, save_profile
from specmd_jax.trace.select import first_tokens, select_requests
from specmd_jax.types import Trace

LAYER_QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])
OTHERS = profile_of(small_trace(77, tokens=20))
TIED = Profile(np.repeat([[3.0, 1.0], [3.0, 0.0], [1.0, 1.0], [0.0, 2.0]], 4, axis=1), "ties")
LAYER, RESET, ONE_BY_ONE = {"scope": "layer"}, {"reset_per_request": True}, {"contract": "sequential"}
LOW, LOWER = {"precisions": (4.0, 16.0)}, {"precisions": (4.0, 8.0, 16.0)}

# (admission with its number, eviction, other policies, how it is replayed): together the rows cross each start and each
# admission with scopes, resets, precisions, prefetching, miss rules, contracts and oversize
GRID: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("always", "fifo", {"prefetch": "previous"}, {"warm_start": TIED, **LAYER}),
    ("always", "slru", {"prefetch": "transition"}, {"warm_start": TIED, "schedule": ONE_BY_ONE}),
    ("always", "belady", {}, {"warm_start": OTHERS, "schedule": RESET, **LAYER}),
    ("always", "lfru", {"miss": "cpu"}, {"warm_start": OTHERS, "schedule": RESET}),
    ("always", pinned("lfu_decay", 0.3, profile=TIED), {}, {"schedule": {"batch": 2}, **LAYER}),
    ("always", pinned("least_stale", 0.6, profile=OTHERS), {"prefetch": "previous"}, {"warm_start": TIED}),
    ("always", pinned("fifo", 0.5, profile=OTHERS), {"prefetch": "previous"}, {"hold": True}),
    ("always", pinned("lhu", 0.4, profile=TIED), {"miss": "fetch_priority"}, {"warm_start": OTHERS, **LOW}),
    ("always", static(OTHERS), {"prefetch": "popular"}, {"schedule": RESET}),
    ("compete", "lfu", {"prefetch": "previous"}, LAYER),
    ("compete", pinned("score", 0.5, profile=OTHERS), {"miss": "cascade"}, LOWER),
    ("limited:2", "lfu_resident", {"miss": "cascade"}, {"warm_start": OTHERS, **LOW}),
    ("limited:3", "slru", {"prefetch": "perfect"}, {"schedule": ONE_BY_ONE, **LAYER}),
    ("margin:0.4", "lfu_decay", {}, {"warm_start": OTHERS, **LAYER}),
    ("margin:2", pinned("lfu", 0.5, profile=TIED), {"prefetch": "popular"}, {"schedule": RESET, "warm_start": OTHERS}),
    ("margin:3", "belady_bypass", {"miss": "cascade"}, LOW),
]


def mix_of(admission: str, eviction: Any, others: dict[str, Any]) -> Mix:
    name, _, value = admission.partition(":")
    numbers: dict[str, Any] = {"selection": {"count": 2.0}}
    if value:
        numbers["admission"] = {"copies": int(value)} if name == "limited" else {"gain": float(value)}
    return Mix.of(eviction, admission=name, numbers=numbers, **others)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(("admission", "eviction", "others", "how"), GRID, ids=lambda value: str(value)[:30])
def test_the_scan_equals_the_reference(
    admission: str, eviction: Any, others: dict[str, Any], how: dict[str, Any]
) -> None:
    how = {**how, "horizon": 2 if "prefetch" in others else 1}
    layered = how.pop("scope", "global") == "layer"
    for seed, budget in enumerate((180_000, 420_000)):
        size = LAYER_QUOTAS * (seed + 1) // 2 if layered else budget
        compare(small_trace(seed), mix_of(admission, eviction, others), size, **how)


# -------------------------------------------------------------------------------------------- what it comes to, by hand

SIZE = 4096


def routed(*passes: list[list[int]]) -> Trace:
    """One request whose tokens are passes; each names the experts of each layer, of 4 that take `SIZE` bytes."""
    ids = np.array(passes, np.int16)
    layers = ids.shape[1]
    return Trace(ids, np.array([len(ids)], np.int32), np.zeros(1, np.int32), 4, np.full(layers, SIZE))


ONE_LAYER = routed([[0]], [[1]], [[2]], [[0]], [[3]], [[0]])
COUNTS = Profile(np.array([[1.0, 9.0, 5.0, 0.0]]), "by hand")


def at(slots: int, **changes: Any) -> Any:
    return run(ONE_LAYER, capacity=f"{slots} slots", hardware=None, **changes)


def test_a_warm_start_holds_the_most_used_and_the_least_used_leaves_first() -> None:
    # holds 1, 2: 0 misses, 2 (count 5) leaves; 1 hits; 2 misses, 0 leaves; 0 misses, 1 leaves; 3 misses; 0 hits
    warm, cold = at(2, warm_start=COUNTS), at(2)
    assert (warm.hits, warm.loads, warm.evictions) == (2, 4, 4)
    assert (cold.hits, cold.loads, cold.evictions) == (1, 5, 3)
    # holds 1, 2, 0: 0, 1, 2, 0 hit; 3 misses and 1 leaves; 0 hits
    assert at(3, warm_start=COUNTS).hits == 5


def test_pins_never_leave_and_the_rest_is_the_policys() -> None:
    # 1 is kept, one slot for the others: 0, 2, 0, 3, 0 miss; 1 hits
    half = at(2, eviction=pinned("lru", 0.5, profile=COUNTS))
    assert (half.hits, half.loads, half.evictions, half.admitted) == (1, 5, 4, 5)
    # 1 and 2 are kept and nothing is let in
    whole = at(2, eviction=static(COUNTS))
    assert (whole.hits, whole.loads, whole.admitted) == (2, 4, 0)
    assert at(2, eviction="lru", pin_share=1.0, pin_profile=COUNTS) == whole


def test_admission_turns_copies_away() -> None:
    # one place: 0 has two uses when 3 comes, so 3 passes through
    assert (at(1, eviction="lfu").hits, at(1, eviction="lfu", admission="compete").hits) == (0, 1)
    # touches are 0, 2, 4, 6, 8, 10, less 7 for a newcomer: 0 is there from its first use on
    strict = at(1, admission="margin", gain=7)
    assert (strict.hits, strict.admitted, strict.misses) == (2, 1, 4)
    # less 3: 0 stays before 1, 2 (at 4) beats it, is not beaten by 0 (at 6), but by 3 (at 8)
    mild = at(1, admission="margin", gain=3)
    assert (mild.hits, mild.admitted, mild.misses) == (0, 3, 6)
    assert (at(2, admission="limited", copies=0).hits, at(2, admission="limited", copies=0).admitted) == (0, 0)
    assert at(2, admission="limited", copies=1).hits == at(2).hits
    bound = [at(2, eviction="belady", admission="compete"), at(2, eviction="belady_bypass")]
    assert bound[0].misses == bound[1].misses and bound[1].admitted is None


def test_experts_in_the_cache_and_the_others_on_the_cpu_are_one_setting() -> None:
    found = at(2, miss="cpu", warm_start=COUNTS)
    assert (found.hits, found.on_host, found.loads) == (2, 4, 0)
    filled = at(2, miss="cpu")  # without a profile: the first two are copied and stay
    assert (filled.loads, filled.on_host) == (2, 6 - filled.hits - 2)


def test_a_share_is_a_number_of_a_grid() -> None:
    rows = list(
        sweep(ONE_LAYER, grid(capacity="2 slots", hardware=None, pin_share=[0.0, 0.5, 1.0], pin_profile=COUNTS))
    )
    assert [(row["pin_share"], row["hits"], row["admitted"]) for row in rows] == [(0, 1, None), (0.5, 1, 5), (1, 2, 0)]
    assert {row["pin_profile"] for row in rows} == {"by hand"}
    assert rows[0]["profile"] is None and str(rows[1]["profile"]).startswith("by hand; ")


def test_the_ends_of_the_gap_are_the_policies_without_pins() -> None:
    settings = grid(capacity="2 slots", hardware=None, eviction=["lru", "belady"])
    rows = list(sweep(ONE_LAYER, [*settings, Setting(capacity="2 slots", hardware=None, eviction=static(COUNTS))]))
    assert [(row["eviction"], row["hits"], row["gap_closed"]) for row in rows[1:]] == [
        ("belady", 2, 1.0),
        ("pinned(lru)", 2, 1.0),
    ]


# ------------------------------------------------------------------------------------------------- off, nothing changes


def test_nothing_is_added_to_a_replay_that_asks_for_none_of_it() -> None:
    trace, cell = small_trace(3), Setting(prefetch="previous")
    replays, mix = prepare(trace), cell.mix(trace.top_k)
    setup = replays.setup(mix, cell.machine, **cell.options)
    given = setup, (), replays.numbers(cell.budget(trace), cell.machine), mix.traced(), replays.visits(setup, mix)
    (state, totals), _ = replay_many(*given)
    assert (state.admission, state.held, totals.admitted, setup.warm_start) == ((), None, None, None)
    assert run(trace, cell) == run(trace, cell, admission="always", pin_share=0.0, warm_start=None)


def test_engines_that_begin_empty_or_let_all_in_say_so() -> None:
    for changes, reason in (
        ({"warm_start": COUNTS}, "warm_start: "),
        ({"admission": "limited"}, "admission 'limited': "),
        ({"eviction": static(COUNTS)}, "eviction 'pinned(lru)' keeps some experts for good"),
    ):
        said = explain(ONE_LAYER, hardware=None, capacity="2 slots", **changes)
        assert said.engine == "scan"
        assert all(str(said.refusals[engine]).startswith(reason) for engine in ("curves", "gpu"))


# ------------------------------------------------------------------------------------------------------------- profiles


def test_a_profile_counts_tokens_and_survives_a_file(tmp_path: Path) -> None:
    trace = small_trace(5)
    profile = profile_of(trace)
    assert profile.counts.sum() == (trace.expert_ids >= 0).sum()
    assert profile.counts[2, 3] == (trace.expert_ids[:, 2] == 3).sum()
    for name in ("hot.npz", "hot.json"):
        save_profile(profile, tmp_path / name)
        again = load_profile(tmp_path / name)
        assert (again.counts == profile.counts).all() and again.requests == profile.requests
        assert again.source == f"{name} ({profile.source})"
        assert Setting(warm_start=str(tmp_path / name)).warm_start == again


def test_counts_of_sglang_without_its_dense_layers(tmp_path: Path) -> None:
    rows = [[0, 0, 0], [3, 0, 1], [0, 2, 2]]
    for name, content, wanted in (
        ("one.json", rows, rows[1:]),
        ("passes.json", [rows, rows], (2 * np.array(rows[1:])).tolist()),
    ):
        (tmp_path / name).write_text(json.dumps({"logical_count": content}))
        assert load_profile(tmp_path / name).counts.tolist() == wanted


def test_a_row_says_whether_its_profile_saw_the_replayed_requests() -> None:
    trace = small_trace(6, requests=4, tokens=40)
    mine, others = select_requests(trace, [0, 1]), profile_of(select_requests(trace, [2, 3]))

    def said(replayed: Trace, profile: Profile) -> str:
        return profile.described(replayed)

    row = run(mine, capacity="50%", hardware=None, warm_start=others).row()
    assert row["profile"] == said(mine, others)
    assert said(mine, others) == f"{others.source}; other requests than the replayed ones"
    assert said(mine, profile_of(trace)).endswith("; it has seen 2 of the 2 replayed requests")
    assert said(first_tokens(trace, 60), profile_of(trace)).endswith("; it has seen 2 of the 2 replayed requests")
    assert said(mine, Profile(others.counts, "theirs")) == "theirs; whether it saw the replayed requests is not known"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"warm_start": COUNTS}, "warm_start: by hand has 1 layers of 4 experts, expected 4 of 8 as the trace has"),
    ({"eviction": static(COUNTS)}, "eviction 'pinned(lru)': by hand has 1 layers of 4 experts, expected 4 of 8"),
    ({"warm_start": "nowhere.json"}, "nowhere.json: no such file"),
    ({"warm_start": "gpt-oss-20"}, "unknown trace 'gpt-oss-20'; did you mean 'gpt-oss-20b'?"),
    ({"warm_start": 3}, "warm_start is of type int, expected a Profile, a trace, or the path of a file of either"),
    ({"pin_share": 0.5}, "pin_share is 0.5 without a profile, expected pin_profile or warm_start"),
    ({"pin_share": 1.5, "warm_start": OTHERS}, "pin_share is 1.5, expected 0 up to 1"),
    ({"pin_share": 0.5, "pin_profile": COUNTS, "eviction": static(OTHERS)}, "keeps some experts already"),
    ({"admission": "limit"}, "unknown admission policy 'limit'; did you mean 'limited'?"),
    ({"admission": "limited", "copies": -1}, "admission 'limited': copies is -1, expected a whole number from 0"),
    ({"admission": "margin", "gain": -1}, "admission 'margin': gain is -1, expected 0 up to"),
    ({"gain": 2}, "unknown policy number 'gain'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_a_bad_start_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as raised:
        run(small_trace(0), **{"capacity": "50%", **changes})
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    for content, message in (
        ("[1, 2]", "expected an object with 'counts'"),
        ('{"count": [[1]]}', "expected 'counts', or SGLang's 'logical_count'"),
        ('{"counts": [[1, 2], [3]]}', "counts is no table of numbers"),
        ('{"counts": [1, 2]}', "counts have shape [2], expected [layers, experts]"),
        ('{"counts": [[1, -2]]}', "layer 0, expert 1: count is -2.0, expected at least 0"),
        ('{"counts": [[0, 0]]}', "every count is 0, expected some uses"),
        ('{"logical_count": [[[[1]]]]}', "logical_count has 4 axes"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SpecmdError) as raised:
            load_profile(tmp_path / "bad.json")
        assert message in str(raised.value) and "bad.json" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(SpecmdError, match=r"(cannot read|not a zip)"):
        (tmp_path / "bad.npz").write_bytes(b"no zip")
        load_profile(tmp_path / "bad.npz")
    with pytest.raises(SpecmdError, match=r"share is 1.5, expected 0 up to 1"):
        pinned("lru", 1.5, profile=as_profile(COUNTS))
