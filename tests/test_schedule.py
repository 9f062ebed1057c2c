"""The schedule equals a slow construction by the letter of the contract, on any small trace and every setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmd_jax.errors import SpecmdError
from specmd_jax.schedule.build import CONTRACTS, PHASES, build_schedule
from specmd_jax.schedule.drafts import Drafts
from specmd_jax.trace import bundled, first_tokens, synthesize, validate
from specmd_jax.types import DECODE, NEVER, PREFILL, Schedule, Trace

# ------------------------------------------------------------------------------------- the slow construction


def slow_kept(trace: Trace, drafts: Drafts, begins: list[int]) -> Callable[[int, int, int], int]:
    """Gives how many tokens a request's decode pass keeps, by its first token and its number in the request."""
    draws = np.random.Generator(np.random.PCG64(drafts.seed)).random(trace.tokens)

    def kept(request: int, first: int, number: int) -> int:
        if "accepted" in trace.meta:
            found = trace.meta["accepted"][request][number]
        else:
            assert drafts.acceptance is not None
            found = 1
            while found <= drafts.tokens and first + found < trace.tokens and draws[first + found] < drafts.acceptance:
                found += 1
        return min(found, begins[request + 1] - first)

    return kept


def slow_passes(trace: Trace, batch: int, chunk: int | None, drafts: Drafts | None = None) -> list[dict[str, Any]]:
    """Passes as dicts: phase, request, tokens (global indices), how many of them are kept, of how many requests, and
    whether they are the first of their request.
    """
    begins = np.concatenate([[0], np.cumsum(trace.lengths)]).tolist()
    passes: list[dict[str, Any]] = []
    queue = list(range(trace.requests))
    slots: list[list[int]] = [[] for _ in range(batch)]  # tokens each slot still has to decode
    owner = [-1] * batch
    kept = slow_kept(trace, drafts or Drafts(0, 0.0), begins)
    ran = [0] * trace.requests  # decode passes of each request
    while queue or any(slots):
        for s in range(batch):
            while not slots[s] and queue:
                r = queue.pop(0)
                prompt = list(range(begins[r], begins[r] + int(trace.prompt_lengths[r])))
                first = True
                while prompt:
                    size = chunk or len(prompt)
                    one = {"phase": PREFILL, "request": r, "tokens": prompt[:size], "begins": first}
                    passes.append(one | {"kept": len(prompt[:size]), "turns": 1})
                    prompt, first = prompt[size:], False
                slots[s] = list(range(begins[r] + int(trace.prompt_lengths[r]), begins[r + 1]))
                owner[s] = r
        active = [s for s in range(batch) if slots[s]]
        if active:
            rows = [token for s in active for token in slots[s][: 1 + (drafts.tokens if drafts else 0)]]
            one = {"phase": DECODE, "request": owner[active[0]], "tokens": rows}
            one |= {"begins": batch == 1 and rows[0] == begins[owner[0]], "kept": 0, "turns": len(active)}
            for s in active:
                number = kept(owner[s], slots[s][0], ran[owner[s]])
                ran[owner[s]] += 1
                one["kept"] += number
                slots[s] = slots[s][number:]
            passes.append(one)
    return passes


def slow_schedule(
    trace: Trace,
    batch: int,
    chunk: int | None,
    contract: str,
    reset: bool,
    phase: str,
    warmup: int,
    drafts: Drafts | None = None,
) -> list[dict[str, Any]]:
    """Visits as dicts, one a row of the schedule."""
    visits: list[dict[str, Any]] = []
    replayed = clock = 0
    for p, one in enumerate(slow_passes(trace, batch, chunk, drafts)):
        if reset and one["begins"]:
            replayed = 0
        counted = phase == "all" or one["phase"] == (PREFILL if phase == "prefill" else DECODE)
        counted = counted and replayed >= warmup
        replayed += one["kept"]
        for layer in range(trace.layers):
            routes = [
                (
                    int(trace.expert_ids[t, layer, k]),
                    np.float32(1 / trace.top_k) if trace.gates is None else trace.gates[t, layer, k],
                )
                for t in one["tokens"]
                for k in range(trace.top_k)
            ]
            ids = [e for e, _ in routes if e >= 0]
            first = {e: i for i, e in reversed(list(enumerate(ids)))}
            last = {e: i for i, e in enumerate(ids)}
            mass: dict[int, np.float32] = {}
            for e, gate in routes:
                if e >= 0:
                    mass[e] = np.float32(mass.get(e, np.float32(0)) + np.float32(gate))
            groups: list[list[int]] = [sorted(last, key=lambda e: last[e])]
            if contract == "sequential" and ids:
                groups = [[e] for e in sorted(first, key=lambda e: first[e])]
            if contract == "sequential-id" and ids:
                groups = [[e] for e in sorted(first)]
            for g, group in enumerate(groups):
                visits.append(
                    {
                        "layer": layer,
                        "pass_id": p,
                        "phase": one["phase"],
                        "request": one["request"],
                        "tokens": len(one["tokens"]),
                        "kept": one["kept"],
                        "turns": one["turns"],
                        "clock": clock,
                        "starts_pass": layer == 0 and g == 0,
                        "ends_layer": g == len(groups) - 1,
                        "reset": reset and one["begins"] and layer == 0 and g == 0,
                        "counted": counted,
                        "count": {e: ids.count(e) for e in group},
                        "mass": {e: mass[e] for e in group},
                        "rank": {e: i for i, e in enumerate(group)},
                        "by_mass": sorted(group, key=lambda e: (-mass[e], e)),
                        "indices": one["tokens"],
                    }
                )
                clock += len(group) + 1
    for v, visit in enumerate(visits):
        visit["next_use"] = {
            e: next(
                (
                    w
                    for w in range(v + 1, len(visits))
                    if visits[w]["layer"] == visit["layer"] and e in visits[w]["count"]
                ),
                NEVER,
            )
            for e in visit["count"]
        }
    return visits


def assert_schedule(trace: Trace, schedule: Schedule, visits: list[dict[str, Any]]) -> None:
    assert (schedule.visits, schedule.layers, schedule.experts) == (len(visits), trace.layers, trace.experts)
    assert schedule.most == max(1, *(len(visit["count"]) for visit in visits)) == schedule.by_mass.shape[1]
    for name in (
        "layer",
        "pass_id",
        "phase",
        "request",
        "tokens",
        "clock",
        "starts_pass",
        "ends_layer",
        "reset",
        "counted",
        *(("kept", "turns") if schedule.kept is not None else ()),
    ):
        assert getattr(schedule, name).tolist() == [visit[name] for visit in visits], name
    for name, absent in (("count", 0), ("mass", np.float32(0)), ("rank", -1), ("next_use", NEVER)):
        expected = [[visit[name].get(e, absent) for e in range(trace.experts)] for visit in visits]
        np.testing.assert_array_equal(getattr(schedule, name), expected, err_msg=name)
    padded = [visit["by_mass"] + [-1] * (schedule.most - len(visit["by_mass"])) for visit in visits]
    assert schedule.by_mass.tolist() == padded
    for field in dataclasses.fields(Schedule):
        value, wanted = getattr(schedule, field.name), str(field.type).lower()
        if value is not None and field.name not in ("layers", "experts", "most", "first_visit"):
            assert value.dtype.name in wanted, field.name


@st.composite
def traces(draw: Callable[..., Any]) -> Trace:
    experts = draw(st.integers(1, 6))
    top_k, layers = draw(st.integers(1, experts)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    prompts = [draw(st.integers(0, length)) for length in lengths]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    tokens = sum(lengths)
    ids = rng.permuted(np.broadcast_to(np.arange(experts), (tokens, layers, experts)), axis=-1)[..., :top_k]
    ids = np.where(rng.random((tokens, layers, 1)) < draw(st.sampled_from((0, 0.3))), -1, ids)  # skipped layers
    ids = np.where(rng.random(ids.shape) < draw(st.sampled_from((0, 0.2))), -1, ids)  # lone absent cells
    gates = None if draw(st.booleans()) else rng.integers(0, 4, ids.shape).astype(np.float32) / np.float32(3)
    trace = Trace(
        expert_ids=ids.astype(np.int16),
        lengths=np.array(lengths, np.int32),
        prompt_lengths=np.array(prompts, np.int32),
        experts=experts,
        expert_bytes=np.ones(layers, np.int64),
        gates=gates,
    )
    validate(trace)
    return trace


@settings(max_examples=200, deadline=None)
@given(
    trace=traces(),
    batch=st.integers(1, 4),
    chunk=st.sampled_from((None, 1, 2, 3)),
    contract=st.sampled_from(CONTRACTS),
    reset=st.booleans(),
    phase=st.sampled_from(PHASES),
    warmup=st.integers(0, 4),
    drafts=st.none()
    | st.builds(Drafts, st.integers(1, 4), st.sampled_from((0.0, 0.4, 0.8, 1.0)), st.integers(0, 9), st.just(0.5)),
    recorded=st.booleans(),
)
def test_equals_the_slow_construction(
    trace: Trace,
    batch: int,
    chunk: int | None,
    contract: str,
    reset: bool,
    phase: str,
    warmup: int,
    drafts: Drafts | None,
    recorded: bool,
) -> None:
    reset = reset and batch == 1
    if drafts is not None and recorded:
        rng = np.random.default_rng(drafts.seed)
        counts = [rng.integers(1, 2 + drafts.tokens, length).tolist() for length in trace.lengths]
        trace = dataclasses.replace(trace, meta={"accepted": counts})
        drafts = drafts._replace(acceptance=None)
    visits = slow_schedule(trace, batch, chunk, contract, reset, phase, warmup, drafts)

    def build() -> Schedule:
        return build_schedule(
            trace,
            batch=batch,
            prefill_chunk=chunk,
            contract=contract,
            reset_per_request=reset,
            phase=phase,
            warmup_tokens=warmup,
            drafts=drafts,
        )

    if any(visit["counted"] for visit in visits):
        assert_schedule(trace, build(), visits)
    else:
        with pytest.raises(SpecmdError, match="counts nothing"):
            build()


@settings(max_examples=50, deadline=None)
@given(
    trace=traces(),
    batch=st.integers(1, 3),
    chunk=st.sampled_from((None, 2)),
    contract=st.sampled_from(CONTRACTS),
    drafts=st.sampled_from((None, Drafts(2, 0.5))),
)
def test_carries_ahead_and_logits(
    trace: Trace, batch: int, chunk: int | None, contract: str, drafts: Drafts | None
) -> None:
    rng = np.random.default_rng(trace.tokens)
    wide = rng.normal(size=(2, trace.tokens, trace.layers, trace.experts))
    trace = dataclasses.replace(trace, logits=wide[0].astype(np.float16), ahead=wide[1].astype(np.float32))
    assert trace.ahead is not None and trace.logits is not None
    atomic = contract == "event"
    schedule = build_schedule(
        trace, batch=batch, prefill_chunk=chunk, contract=contract, drafts=drafts, with_ahead=True, with_logits=atomic
    )
    visits = slow_schedule(trace, batch, chunk, contract, False, "all", 0, drafts)
    assert schedule.ahead is not None and schedule.ahead.dtype == np.float32
    for v, visit in enumerate(visits):
        total = trace.ahead[visit["indices"][0], visit["layer"]]
        for token in visit["indices"][1:]:
            total = total + trace.ahead[token, visit["layer"]]
        np.testing.assert_array_equal(schedule.ahead[v], total)
    if not atomic:
        return
    assert schedule.logits is not None and schedule.logits.dtype == np.float32
    assert schedule.logits.shape == (len(visits), max(visit["tokens"] for visit in visits), trace.experts)
    for v, visit in enumerate(visits):
        expected = np.full(schedule.logits.shape[1:], np.nan, np.float32)
        for i, token in enumerate(visit["indices"]):
            if (trace.expert_ids[token, visit["layer"]] >= 0).any():
                expected[i] = trace.logits[token, visit["layer"]]
        np.testing.assert_array_equal(schedule.logits[v], expected)


# ---------------------------------------------------------------------------------------------- worked examples


def example(**changes: Any) -> Trace:
    """One request: a prompt of two tokens and two decoded ones; one layer, 4 experts, top-2."""
    trace = Trace(
        expert_ids=np.array([[[2, 0]], [[0, 3]], [[-1, -1]], [[3, 1]]], np.int16),
        lengths=np.array([4], np.int32),
        prompt_lengths=np.array([2], np.int32),
        experts=4,
        expert_bytes=np.array([10]),
        gates=np.array([[[0.5, 0.25]], [[0.25, 0.125]], [[0, 0]], [[0.75, 0.25]]], np.float32),
        meta={"model": "example"},
    )
    return dataclasses.replace(trace, **changes)


def test_prefill_by_hand() -> None:
    schedule = build_schedule(example())
    assert schedule.tokens.tolist() == [2, 1, 1]
    assert schedule.phase.tolist() == [PREFILL, DECODE, DECODE]
    assert schedule.count[0].tolist() == [2, 0, 1, 1]
    assert schedule.mass[0].tolist() == [0.5, 0, 0.5, 0.125]
    assert schedule.rank[0].tolist() == [1, -1, 0, 2]  # list 2 0 0 3: last positions 0, 2 and 3
    assert schedule.by_mass[0].tolist() == [0, 2, 3]  # 0 and 2 weigh the same: the lower id first
    assert schedule.next_use[0].tolist() == [NEVER, NEVER, NEVER, 2]
    assert schedule.count[1].tolist() == [0, 0, 0, 0] and schedule.by_mass[1].tolist() == [-1, -1, -1]
    assert schedule.clock.tolist() == [0, 4, 5]  # an empty visit still takes one tick


def test_sequential_by_hand() -> None:
    schedule = build_schedule(example(), contract="sequential")
    assert [np.flatnonzero(row).tolist() for row in schedule.count] == [[2], [0], [3], [], [3], [1]]
    assert schedule.ends_layer.tolist() == [False, False, True, True, False, True]
    assert schedule.clock.tolist() == [0, 2, 4, 6, 7, 9]
    by_id = build_schedule(example(), contract="sequential-id")
    assert [np.flatnonzero(row).tolist() for row in by_id.count] == [[0], [2], [3], [], [1], [3]]


def test_mass_is_summed_in_token_order_in_float32() -> None:
    gates = np.array([1e8, 1, 1, 1], np.float32)
    trace = example(
        expert_ids=np.zeros((4, 1, 1), np.uint8),
        gates=gates.reshape(4, 1, 1),
        lengths=np.array([4], np.int32),
        prompt_lengths=np.array([4], np.int32),
    )
    assert build_schedule(trace).mass[0, 0] == np.float32(1e8)  # each 1 is lost in turn; their sum would not be


def test_a_long_decode_is_one_visit_a_token_and_layer() -> None:
    trace = synthesize(layers=3, experts=8, top_k=2, tokens=4000, requests=2, seed=1)
    schedule = build_schedule(trace)
    assert schedule.visits == 2 * 4000 * 3 and (schedule.demanded == 2).all()
    rows = schedule.count.reshape(-1, 3, 8)
    np.testing.assert_array_equal(np.sort(trace.expert_ids, axis=-1), np.argwhere(rows)[:, 2].reshape(-1, 3, 2))
    finite = schedule.next_use[schedule.next_use < NEVER]
    assert (np.bincount(finite) <= 2).all() and (np.arange(schedule.visits)[:, None] < schedule.next_use).all()


def test_bundled_phone_trace() -> None:
    trace = bundled("bigmoe-qwen3-30b-a3b")
    schedule = build_schedule(trace)
    assert schedule.visits == (1 + 128) * 48
    assert schedule.tokens[0] == 28 and schedule.demanded[47] == 6  # the last layer ran for the last prompt token only
    assert int(schedule.demanded[48:].sum()) == 128 * 48 * 6


def test_settings_that_count() -> None:
    trace = first_tokens(bundled(), 600)
    schedule = build_schedule(trace, reset_per_request=True, warmup_tokens=100)
    starts = np.cumsum(trace.lengths) - trace.lengths
    assert np.flatnonzero(schedule.reset).tolist() == (starts * 24).tolist()
    left_out = sum(min(100, int(length)) for length in trace.lengths)
    assert int((~schedule.counted).sum()) == left_out * 24
    assert int((~build_schedule(trace, warmup_tokens=100).counted).sum()) == 100 * 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0, expected at least 1 token"),
        ({"contract": "sequental"}, "unknown contract 'sequental'; did you mean 'sequential'?"),
        ({"phase": "decoding"}, "unknown phase 'decoding'; did you mean 'decode'?"),
        ({"reset_per_request": True, "batch": 2}, "reset_per_request with batch 2, expected batch 1"),
        ({"warmup_tokens": -1}, "warmup_tokens is -1, expected at least 0"),
        ({"warmup_tokens": 4}, "warmup_tokens 4 counts nothing: no pass of phase 'all' begins after so many tokens"),
        ({"with_logits": True}, "full router logits are needed, but the trace of example has none"),
        ({"with_ahead": True}, "gate-ahead scores are needed, but the trace of example has none"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        build_schedule(example(), **options)
    assert str(caught.value).startswith(message)


def test_phases_and_contracts_that_the_trace_cannot_serve() -> None:
    decode_only = example(prompt_lengths=np.array([0], np.int32))
    with pytest.raises(SpecmdError, match="phase 'prefill' counts nothing: the trace of example has no prefill tokens"):
        build_schedule(decode_only, phase="prefill")
    with pytest.raises(SpecmdError, match="phase 'decode' counts nothing"):
        build_schedule(example(prompt_lengths=np.array([4], np.int32)), phase="decode")
    with pytest.raises(SpecmdError, match="logits with contract 'sequential', expected 'event'"):
        build_schedule(example(logits=np.zeros((4, 1, 4))), contract="sequential", with_logits=True)
