"""Speculative decoding: passes that verify drafted tokens and keep some of them, in the reference and every engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
import reference
from parity import LINK, compare, costs, small_trace

from specmd_jax import Setting, explain, grid, open_trace, prepare, run, sweep, totals
from specmd_jax.bounds.stall import bracket, lower_bound
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.metrics import metrics_of
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.counted import counted_of
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.soft import replay as soft
from specmd_jax.trace import load_trace, save_trace, select_requests
from specmd_jax.trace import stream as trace_stream
from specmd_jax.trace.prompts import clip_requests, with_prompts
from specmd_jax.trace.select import first_tokens
from specmd_jax.types import DECODE, Schedule, Trace

DRAFT_S = 3e-5  # about a copy
TRACE = small_trace(3)


def known(accepted: list[int], lengths: tuple[int, ...] = (5,)) -> Trace:
    """Five rows of one layer of top-4 that route to experts 0 to 7 between them; whole passes of them."""
    rows = [[0, 1, 2, 3], [4, 0, 1, 2], [5, 0, 3, 1], [6, 1, 2, 0], [7, 2, 3, 1]]
    return Trace(
        np.array(rows, np.int16)[:, None],
        np.array(lengths, np.int32),
        np.zeros(len(lengths), np.int32),
        16,
        np.array([1024]),
        meta={"accepted": [accepted]},
    )


# -------------------------------------------------------------------------------------------------------- by hand


def test_five_rows_of_which_two_are_kept() -> None:
    """The rows demand experts 0 to 7; two tokens are kept, so a token costs four copies."""
    prepared = prepare(known([2, 3]), drafts=Drafts(4))
    schedule = prepared.schedule
    assert schedule.demanded.tolist() == [8, 7]  # the second pass: rows 2, 3 and 4, cut at the end of the request
    assert schedule.kept is not None and schedule.turns is not None
    assert (schedule.tokens.tolist(), schedule.kept.tolist(), schedule.turns.tolist()) == ([5, 3], [2, 3], [1, 1])
    first = replace(prepared, schedule=replace(schedule, counted=np.array([True, False])))
    found = run_prepared(first, capacity=8 * 1024)
    assert (found.demand, found.loads, found.tokens) == (8, 8, 2)
    assert (found.loads_per_token, found.acceptance_length, found.verified) == (4.0, 2.0, 5)


def run_prepared(prepared: Any, **setting: Any) -> Any:
    found = jax.tree.map(np.asarray, totals(prepared, hardware=None, **setting))
    return metrics_of(counted_of(prepared.schedule), prepared.sizes.level_bytes, found, prepared.bits, timed=False)


def test_the_rows_of_a_pass() -> None:
    """Seven decoded tokens, three drafts: a request ends where its tokens do, whatever was accepted."""
    trace = replace(select_requests(small_trace(0, tokens=9, prompt_tokens=2), [0]), meta={"accepted": [[4, 1, 3]]})
    schedule = build_schedule(trace, drafts=Drafts(3))
    starts = np.flatnonzero(schedule.starts_pass)
    assert schedule.kept is not None
    assert schedule.tokens[starts].tolist() == [2, 4, 3, 2]
    assert schedule.kept[starts].tolist() == [2, 4, 1, 2]
    for at, rows in zip(starts, (range(2), range(2, 6), range(6, 9), range(7, 9)), strict=True):
        for layer in range(trace.layers):
            ids, count = np.unique(trace.expert_ids[list(rows), layer], return_counts=True)
            assert np.flatnonzero(schedule.count[at + layer]).tolist() == ids.tolist()
            assert schedule.count[at + layer, ids].tolist() == count.tolist()


# ------------------------------------------------------------------------------------------------------------ laws


def passes(schedule: Schedule) -> int:
    return int((schedule.starts_pass & (schedule.phase == DECODE)).sum())


def test_nothing_drafted_is_the_replay_of_before() -> None:
    plain, off = Setting(), Setting(drafts=0, acceptance=0.5, draft_seed=3, draft_s=1.0)
    assert plain.schedule == off.schedule and plain.schedule["drafts"] is None
    schedule = prepare(TRACE, **off.schedule).schedule
    assert schedule.kept is None and schedule.turns is None and schedule.drafting_s is None
    one, other = run(TRACE, hardware=LINK), run(TRACE, off.replace(hardware=LINK))
    assert one == other
    decode = run(TRACE, hardware=LINK, phase="decode")
    assert (decode.acceptance_length, decode.verified, decode.tokens) == (1.0, 38, 38)
    assert decode.loads_per_token == decode.loads / 38 and decode.tpot_s == pytest.approx(1 / decode.tokens_per_s)  # type: ignore[operator]


@pytest.mark.parametrize("drafts", [1, 3, 30])
def test_all_accepted_and_none(drafts: int) -> None:
    decoded = TRACE.lengths - TRACE.prompt_lengths
    every = prepare(TRACE, drafts=Drafts(drafts, 1.0)).schedule
    assert passes(every) == sum(-(-int(n) // (1 + drafts)) for n in decoded)
    assert every.kept is not None and (every.kept == every.tokens).all()
    nobody, plain = prepare(TRACE, drafts=Drafts(drafts, 0.0)).schedule, prepare(TRACE).schedule
    assert nobody.kept is not None
    assert passes(nobody) == passes(plain) == decoded.sum()
    assert (nobody.kept == plain.tokens).all()
    assert (nobody.count >= plain.count).all() and nobody.demanded.sum() > plain.demanded.sum()


def test_every_token_is_kept_once() -> None:
    """Who is decoded beside a request changes nothing of what it verifies and keeps."""
    for acceptance, seed in product((0.2, 0.7), (0, 1)):
        alone, both = (
            run(TRACE, drafts=3, acceptance=acceptance, draft_seed=seed, batch=batch, hardware=None) for batch in (1, 2)
        )
        assert alone.tokens == TRACE.tokens and alone.verified > alone.tokens - int(TRACE.prompt_lengths.sum())
        assert [alone.tokens, alone.verified, alone.acceptance_length] == [
            both.tokens, both.verified, both.acceptance_length,
        ]  # fmt: skip


def test_the_share_that_is_accepted() -> None:
    """Of long requests a pass keeps 1 + p + p^2 + p^3 on average, and other seeds draw others."""
    trace = small_trace(1, tokens=4000, prompt_tokens=0, requests=1, layers=1, expert_bytes=1024, with_ahead=False)
    lengths = []
    for seed in range(3):
        schedule = prepare(trace, drafts=Drafts(3, 0.7, seed)).schedule
        lengths.append(4000 / passes(schedule))
    assert lengths == pytest.approx([1 + 0.7 + 0.49 + 0.343] * 3, rel=0.03) and len(set(lengths)) == 3


def test_drafting_takes_its_time_of_each_pass() -> None:
    setting = Setting(drafts=2, acceptance=0.6, hardware=LINK, phase="decode")
    free, paid = (run(TRACE, setting, draft_s=s) for s in (1e-12, DRAFT_S))  # of one program
    assert free.acceptance_length == paid.acceptance_length and free.loads == paid.loads
    assert free.tpot_s is not None and paid.tpot_s is not None and paid.tokens_per_s is not None
    assert 1 < free.acceptance_length < 3  # type: ignore[operator]
    assert paid.tpot_s == pytest.approx(free.tpot_s + DRAFT_S / free.acceptance_length, rel=1e-6)  # type: ignore[operator]
    assert paid.tpot_s == pytest.approx(1 / paid.tokens_per_s)
    assert paid.stall_s == pytest.approx(free.stall_s)
    prompts = [run(TRACE, setting, phase="prefill", draft_s=s).ttft_s for s in (1e-12, DRAFT_S)]
    assert prompts[0] == pytest.approx(prompts[1], rel=1e-6)


def test_copies_go_on_while_tokens_are_drafted() -> None:
    """What is still under way at the end of a pass arrives during drafting: fewer late hits at the first layer."""
    setting = Setting(
        drafts=1, acceptance=0.5, prefetch="perfect", hardware=LINK.replace(link_bytes_per_s=5e8), capacity="50%"
    )
    none, long = (run(TRACE, setting, draft_s=s) for s in (1e-12, 1e-2))
    assert none.stall_s is not None and long.stall_s is not None and long.stall_s < none.stall_s
    assert long.hits_prefetch > none.hits_prefetch


# --------------------------------------------------------------------------------------------- the engines agree


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(("prefetch", "resets"), [("none", False), ("previous", False), ("previous", True)])
def test_the_scan_is_the_reference(prefetch: str, resets: bool) -> None:
    mix = Mix.of("least_stale" if resets else "lru", prefetch, numbers={"selection": {"count": 3.0}})
    for seed, (drafts, batch, contract) in enumerate(
        product((1, 4), (1,) if resets else (1, 2), ("event", "sequential"))
    ):
        schedule = {"drafts": Drafts(drafts, 0.6, seed, DRAFT_S), "batch": batch, "contract": contract}
        compare(small_trace(seed), mix, 250_000 + 100_000 * seed, schedule={**schedule, "reset_per_request": resets})


@pytest.mark.usefixtures("strict_promotion")
def test_rules_that_read_logits() -> None:
    """A stand-in for a missing expert is for passes of one row; routing by the cache chooses for every row."""
    trace = small_trace(6, prompt_tokens=0, with_logits=True)
    schedule: dict[str, Any] = {"drafts": Drafts(1, 0.5, 1, DRAFT_S)}
    found = compare(trace, Mix.of("lru", miss="substitute"), 400_000, schedule=schedule)
    rows = prepare(trace, **schedule).schedule.tokens
    assert not (found.outcome[rows > 1] == reference.SUBSTITUTED).any()
    compare(trace, Mix.of("lru", routing="cache_aware"), 400_000, schedule={"drafts": Drafts(2, 0.5, 1), "batch": 2})


def test_the_curves_are_the_scan() -> None:
    """`tests/test_curves.py` compares every policy with the reference."""
    settings = grid(capacity=["20%", "60%"], hardware=None, batch=2, drafts=3, acceptance=0.6)
    assert explain(TRACE, settings[-1]).engine == "curves"
    for one, other in zip(sweep(TRACE, settings), sweep(TRACE, settings, engine="scan"), strict=True):
        assert {**one, "mean_bits": 0, "lost_mass": 0} == {**other, "mean_bits": 0, "lost_mass": 0}


def test_the_bounds_hold() -> None:
    replays = prepare(small_trace(11, tokens=30, expert_bytes=40960), drafts=Drafts(2, 0.6, 0, DRAFT_S))
    for slots, slow in ((8, 1.0), (20, 2.0)):
        machine = LINK.replace(link_bytes_per_s=LINK.link_bytes_per_s / slow)
        lower = lower_bound(replays, slots * 40960, machine)
        assert 0 < lower <= bracket(replays, slots * 40960, machine)[1].stall_s * (1 + 1e-9)
        for eviction in ("lru", "belady", "belady_bypass"):
            found = reference.replay(
                replays.schedule,
                eviction=eviction,
                budget=slots * 40960,
                level_bytes=replays.sizes.level_bytes.tolist(),
                costs=costs(replays, machine),
                draft_s=DRAFT_S,
                first_use=replays.first_use,
            )
            stall_s = found.stall_late_s + found.stall_miss_s + found.stall_link_busy_s
            assert lower <= stall_s.sum() * (1 + 1e-6)


def test_the_soft_cache_has_the_time_of_drafting() -> None:
    given = [soft.given([prepare(TRACE, drafts=Drafts(2, 0.6, 0, s))], LINK).seconds for s in (0.0, DRAFT_S)]
    assert given[0] is not None and given[1] is not None
    schedule = prepare(TRACE, drafts=Drafts(2, 0.6)).schedule
    behind = np.flatnonzero(schedule.starts_pass & (schedule.phase == DECODE)) - 1  # a prompt comes first
    more = np.asarray(given[1].dense_s - given[0].dense_s)[:, 0]
    assert np.flatnonzero(more).tolist() == behind.tolist()
    np.testing.assert_allclose(more[behind], DRAFT_S, rtol=1e-3)


def test_rows_say_what_is_estimated() -> None:
    settings = grid(drafts=[0, 2], acceptance=0.5, hardware=None)
    evidence = [row["evidence"] for row in sweep(TRACE, settings)]
    assert evidence == ["simulated", "simulated, routes of rejected drafts estimated"]


# -------------------------------------------------------------------------------------------------- accepted counts


def test_counts_go_with_their_requests(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [[2, 3, 1, 4] * 5, [1, 2, 3] * 8]
    trace = replace(TRACE, meta={**TRACE.meta, "accepted": counts})
    save_trace(trace, tmp_path / "drafted.npz")
    assert load_trace(tmp_path / "drafted.npz").meta["accepted"] == counts
    monkeypatch.setattr(trace_stream, "STRETCH_CELLS", 24 * 4 * 8)  # a request at a time
    streamed = run(open_trace(tmp_path / "drafted.npz"), drafts=3, hardware=None)
    assert streamed == run(trace, drafts=3, hardware=None) and streamed.acceptance_length != 1
    both, second = build_schedule(trace, drafts=Drafts(3)), select_requests(trace, [1])
    assert second.meta["accepted"] == counts[1:]
    assert both.kept is not None
    own = build_schedule(second, drafts=Drafts(3))
    assert own.kept is not None
    np.testing.assert_array_equal(own.kept, both.kept[both.request == 1])
    assert first_tokens(trace, 20).meta["accepted"] == counts[:1]
    for part in (first_tokens(trace, 20), clip_requests(trace, 9)):  # counts past the end are not read
        assert counted_of(build_schedule(part, drafts=Drafts(3))).tokens == part.tokens
    decode_only = replace(trace, prompt_lengths=np.zeros(2, np.int32))
    assert "accepted" not in with_prompts(decode_only, 3).meta


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"drafts": -1}, None, "drafts is -1, expected a whole number of at least 0"),
    ({"drafts": 2.5}, None, "drafts is 2.5, expected a whole number"),
    ({"drafts": True}, None, "drafts is True, expected a whole number"),
    ({"drafts": 2, "acceptance": 1.5}, None, "acceptance is 1.5, expected 0 to 1"),
    ({"drafts": 2, "acceptance": float("nan")}, None, "acceptance is nan, expected 0 to 1"),
    ({"drafts": 2, "acceptance": 0.5, "draft_seed": -1}, None, "draft_seed is -1, expected a whole number"),
    ({"drafts": 2, "acceptance": 0.5, "draft_s": -1.0}, None, "draft_s is -1.0, expected seconds from 0"),
    ({"drafts": 2, "acceptance": 0.5, "draft_s": "1"}, None, "draft_s is '1', expected seconds from 0"),
    ({"drafts": 2}, None, "drafts is 2, and the trace of synthetic has no accepted counts (meta key 'accepted')"),
    ({"drafts": 2, "acceptance": 0.5}, [[3] * 20, [2] * 20], "acceptance is 0.5, and the trace of synthetic has"),
    (
        {"drafts": 2},
        [[3] * 20, [2, 1, 4, *[1] * 20]],
        "request 1, decode pass 2: 4 tokens accepted, expected 1 to 3: accepted counts above 1 + d (drafts is 2)",
    ),
    ({"drafts": 2}, [[3] * 20, [2] * 3], "request 1: its accepted counts sum to 6, expected the 19 decoded tokens"),
    ({"drafts": 2}, [[3] * 20], "trace: meta key 'accepted' has 1 rows, expected a list of 2 rows"),
    ({"drafts": 2}, [[3] * 20, 7], "trace: request 1: accepted counts are 7, expected a list"),
    ({"drafts": 2}, [[3] * 20, [2, 0]], "trace: request 1, decode pass 1: 0 tokens accepted, expected a whole number"),
    ({"drafts": 2}, [[3] * 20, [1.5]], "trace: request 1, decode pass 0: 1.5 tokens accepted, expected a whole"),
]


@pytest.mark.parametrize(("setting", "accepted", "message"), BAD, ids=lambda value: str(value)[:60])
def test_what_makes_no_sense_is_one_line(setting: dict[str, Any], accepted: Any, message: str) -> None:
    trace = TRACE if accepted is None else replace(TRACE, meta={**TRACE.meta, "accepted": accepted})
    for ask in (lambda: run(trace, **setting), lambda: sweep(trace, **setting)):
        with pytest.raises(SpecmdError) as caught:
            ask()
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
