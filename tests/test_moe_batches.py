"""Requests decoded together: each text is what it is alone, the events are the simulator's, the trace is in order."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false
from __future__ import annotations

import csv
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import made

import experiments.offload
from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused import engine as fused
from specmd_jax.moe.fused import program, serving
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime import store
from specmd_jax.replay.totals import DROPPED, FETCHED, SUBSTITUTED
from specmd_jax.schedule.build import build_schedule
from specmd_jax.trace import synthesize

STEPS, SHORT, LONG = 4, 3, 6
LENGTHS = (SHORT, LONG, LONG, SHORT, LONG)  # of the prompts
CLOSE = 2e-5  # of logits: products of several rows are added in another order than those of one


def prompts_of(cfg, lengths=LENGTHS):
    rng = np.random.default_rng(1)
    return [rng.integers(0, cfg.vocabulary, length) for length in lengths]


@functools.cache
def stacked_store(family="olmoe"):
    cfg, _, stacks, *_ = made(family, "float32")
    return store.stack(cfg, stacks)


def engine(batch, capacity="5 slots", family="olmoe", **options):
    cfg, params, *_ = made(family, "float32")
    return Fused(cfg, params, stacked_store(family), batch=batch, capacity=capacity, keep_logits=True, **options)


@functools.cache
def alone(family="olmoe", lengths=LENGTHS):
    """Tokens [R, S] of the all-resident model, and its router's logits [N, L, E], each request for itself."""
    cfg, params, stacks, *_ = made(family, "float32")
    found = [moe.generate(cfg, params, stacks, prompt[None], STEPS) for prompt in prompts_of(cfg, lengths)]
    rows = [(np.asarray(g.prefill.logits)[:, 0].swapaxes(0, 1), np.asarray(g.decode.logits)[:, :, 0, 0]) for g in found]
    return np.concatenate([g.tokens for g in found]), np.concatenate([part for row in rows for part in row])


@functools.cache
def ran(batch=2, capacity="5 slots", **options):
    """An engine, and its run of all prompts."""
    own = engine(batch, capacity, **options)
    return own, own.generate(prompts_of(own.cfg), STEPS, keep_logits=True)


def check(own, run, family="olmoe", lengths=LENGTHS, fetches_all=True):
    """Everything that holds of every batch."""
    replays, events = own.policy.replay(run.trace)
    s = replays.schedule
    assert run.events_equal(events) and run.visit_s.shape == (s.visits,) and run.batch == own.policy.batch
    np.testing.assert_array_equal(run.trace.prompt_lengths, lengths)
    np.testing.assert_array_equal(run.trace.lengths, np.array(lengths) + STEPS - 1)
    if fetches_all:
        tokens, logits = alone(family, lengths)
        np.testing.assert_array_equal(run.tokens, tokens)
        np.testing.assert_allclose(run.trace.logits, logits, rtol=0, atol=CLOSE)  # in the order of the requests
    passes_s = run.visit_s.reshape(-1, s.layers).sum(axis=1)
    assert (run.visit_s > 0).all() and np.isclose(run.tokens.size / run.tokens_per_s, passes_s.sum())
    first = np.flatnonzero(s.phase[:: s.layers] == 0)  # a prompt's pass ends with the request's first token
    np.testing.assert_allclose(run.ttft_s, np.cumsum(passes_s)[first])
    assert run.most_resident <= own.capacity_slots + own.staging
    return s


@pytest.mark.parametrize(
    ("batch", "capacity", "policy", "lengths"),
    [
        (2, "5 slots", {}, LENGTHS),
        pytest.param(3, "50%", {"eviction": "least_stale", "prefetch": "gate_ahead"}, LENGTHS, marks=pytest.mark.slow),
        pytest.param(
            5, "30%", {"eviction": "lfu", "prefetch": "transition", "horizon": 2}, LENGTHS, marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            "40%",
            {"eviction": "slru", "prefetch": "previous", "scope": "layer"},
            (1, SHORT, 1, 1, SHORT),  # a prompt of one token is a visit of one, with the slots of such
            marks=pytest.mark.slow,
        ),
        pytest.param(3, "1 slots", {"prefetch": "previous"}, LENGTHS, marks=pytest.mark.slow),
        pytest.param(16, "100%", {"prefetch": "gate_ahead"}, LENGTHS, marks=pytest.mark.slow),  # places left over
    ],
)
def test_text_is_that_of_each_request_alone_and_events_are_the_simulators(batch, capacity, policy, lengths):
    own = engine(batch, capacity, **policy)
    compiled = program.run._cache_size()
    run = own.generate(prompts_of(own.cfg, lengths), STEPS)
    assert program.run._cache_size() <= compiled + 3  # two lengths of prompts and a decode pass
    schedule = check(own, run, lengths=lengths)
    decode = schedule.phase == 1
    assert schedule.tokens[decode].max() == min(batch, len(lengths)) and (
        len(np.unique(schedule.tokens[decode])) > 1 or batch >= len(lengths)
    )
    misses = sum((d.outcome == FETCHED).sum() for d in run.decisions)
    assert misses > 0 and (capacity == "100%") == (sum(d.evictions.sum() for d in run.decisions) == 0)


def test_logits_do_not_depend_on_the_capacity():
    (_, few), (own, all_of_them) = ran(), ran(capacity="100%")
    check(own, all_of_them)
    np.testing.assert_array_equal(few.logits, all_of_them.logits)  # bit for bit
    np.testing.assert_array_equal(few.trace.logits, all_of_them.trace.logits)
    assert few.logits.shape[:2] == (len(LENGTHS), STEPS)
    np.testing.assert_array_equal(few.logits.argmax(axis=-1), few.tokens)
    assert few.most_resident < all_of_them.most_resident


def test_one_request_after_the_other_has_the_same_text():
    own, run = engine(1), ran()[1]
    one = own.generate(prompts_of(own.cfg)[:1], STEPS, keep_logits=True)
    np.testing.assert_array_equal(one.tokens, run.tokens[:1])
    np.testing.assert_allclose(one.logits, run.logits[:1], rtol=0, atol=CLOSE)
    fed = int(one.trace.lengths.sum())
    np.testing.assert_array_equal(one.trace.expert_ids, run.trace.expert_ids[:fed])
    np.testing.assert_allclose(one.tokens.size / one.tokens_per_s, one.visit_s.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt_oss", "qwen2_moe", "deepseek_v2"]
)  # windows and sinks, shared experts, latents
def test_other_models(family):
    own = engine(3, "40%", family, prefetch="gate_ahead")
    check(own, own.generate(prompts_of(own.cfg), STEPS), family)


@pytest.mark.slow
def test_kernels_run_the_same_text_and_events():
    """Interpreted; a row without a token is left out by the policy's kernel and by the experts'."""
    few, whole = (engine(2, capacity, kernels=True) for capacity in ("5 slots", "100%"))
    runs = [own.generate(prompts_of(own.cfg), STEPS, keep_logits=True) for own in (few, whole)]
    for own, run in zip((few, whole), runs, strict=True):
        check(own, run)
        assert own.reasons == {"dense": "2 requests are decoded together, and it runs one token"}
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("miss", "numbers", "kernels"), [("drop", {"keep": 1}, False), ("substitute", {"tolerance": 0.4}, True)]
)
def test_rules_that_leave_experts_out_or_replace_them(miss, numbers, kernels):
    """A rule that reads one token's logits has them where one request is left of a batch; and one request of a batch is
    that request alone."""
    rule = {"miss": miss, "numbers": numbers, "capacity": "40%", "kernels": kernels}
    own, single = engine(2, **rule), engine(1, **rule)
    run = own.generate(prompts_of(own.cfg), STEPS)
    schedule = check(own, run, fetches_all=False)
    outcomes = np.stack([d.outcome for d in run.decisions])
    if miss == "drop":
        assert (outcomes[(schedule.phase == 1) & (schedule.tokens == 2)] == DROPPED).any()
    else:
        alone_at = (schedule.phase == 1) & (schedule.tokens == 1)
        assert (outcomes[alone_at] == SUBSTITUTED).any() and not (outcomes[schedule.tokens > 1] == SUBSTITUTED).any()
    last = prompts_of(own.cfg)[:1]
    one, other = (some.generate(last, STEPS, keep_logits=True) for some in (own, single))
    np.testing.assert_array_equal(np.stack([d.outcome for d in one.decisions]), [d.outcome for d in other.decisions])
    np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=CLOSE)
    assert any((d.outcome == (DROPPED if miss == "drop" else SUBSTITUTED)).any() for d in one.decisions)


@pytest.mark.slow
def test_replayed_routing_is_what_the_trace_records():
    cfg = made("olmoe", "float32")[0]
    trace = synthesize(
        layers=len(cfg.moe_layers), experts=cfg.experts, top_k=cfg.top_k, tokens=LONG + STEPS - 1,
        requests=len(LENGTHS), prompt_tokens=LONG, with_ahead=True,
    )  # fmt: skip
    own = engine(3, "50%", eviction="least_stale", prefetch="gate_ahead")
    run = own.generate(prompts_of(cfg), STEPS, replay=trace)
    starts, lengths = np.cumsum(trace.lengths) - trace.lengths, np.array(LENGTHS) + STEPS - 1
    rows = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    for name in ("expert_ids", "gates", "ahead"):
        np.testing.assert_array_equal(getattr(run.trace, name), getattr(trace, name)[rows])
    assert run.events_equal(own.policy.replay(run.trace)[1])


# ---- tokens as they come -------------------------------------------------------------------------------------------


def test_a_listener_hears_all_requests_in_the_order_of_the_passes():
    own, run = ran()
    heard = []
    own.generate(prompts_of(own.cfg), STEPS)  # programs of earlier tests may have been let go
    compiled = program.run._cache_size()
    again = own.generate(prompts_of(own.cfg), STEPS, on_token=lambda *token: heard.append(token))
    assert program.run._cache_size() == compiled
    np.testing.assert_array_equal(again.tokens, run.tokens)
    assert sorted(heard) == [(r, s, int(run.tokens[r, s])) for r in range(len(LENGTHS)) for s in range(STEPS)]
    # two begin and go on side by side, and the next takes a place that is free
    assert [token[:2] for token in heard[:10]] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 0), (3, 0),
    ]  # fmt: skip


def test_only_a_run_of_one_prompt_may_end_early():
    own, run = ran()
    prompts = prompts_of(own.cfg)
    one = own.generate(prompts[1:2], STEPS, on_token=lambda request, step, token: step == 1)
    np.testing.assert_array_equal(one.tokens, run.tokens[1:2, :2])
    assert one.trace.lengths.tolist() == [LONG + 1] and one.events_equal(own.policy.replay(one.trace)[1])
    with pytest.raises(SpecmdError, match="on_token ends request 1 of 5 at step 2: only a run of one prompt"):
        own.generate(prompts, STEPS, on_token=lambda request, step, token: (request, step) == (1, 2))


def test_records_are_read_while_passes_go_on(monkeypatch):
    own, run = ran()
    monkeypatch.setattr(serving, "HELD", 2)
    again = own.generate(prompts_of(own.cfg), STEPS, keep_logits=True)
    np.testing.assert_array_equal(again.logits, run.logits)
    np.testing.assert_array_equal(again.trace.gates, run.trace.gates)
    assert again.events_equal(own.policy.replay(run.trace)[1])


def test_logits_that_are_not_finite_name_the_token():
    cfg, params, *_ = made("olmoe", "float32")
    prompts, run = prompts_of(cfg), ran()[1]
    fed = [[*prompt, *made_of[:-1]] for prompt, made_of in zip(prompts, run.tokens.tolist(), strict=True)]
    # a token that one request makes and is then fed, and no other row sees before
    (request, step, token) = next(
        (r, s, token)
        for r, row in enumerate(run.tokens.tolist()[:2])
        for s, token in enumerate(row[:-1])
        if sum(line.count(token) for line in fed[:2]) == 1
    )
    weight = params["embed"]["weight"].at[token].set(jnp.nan)
    broken = Fused(
        cfg, {**params, "embed": {"weight": weight}}, stacked_store(), batch=2, capacity="5 slots", keep_logits=True
    )
    match = f"request {request}: the logits of generated token {step + 1} are not finite"
    with pytest.raises(SpecmdError, match=match):
        broken.generate(prompts, STEPS)


# ---- what is planned, predicted and refused ------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "steps"), [(1, 3), (2, 4), (3, 1), (5, 4), (16, 2)])
def test_passes_are_those_of_the_simulators_schedule(batch, steps):
    cfg = made("olmoe", "float32")[0]
    lengths = np.array(LENGTHS) + steps - 1
    sessions = serving.plan(cfg, LENGTHS, steps, batch)
    passes = [own for session in sessions for own in session]
    trace = synthesize(layers=1, experts=4, top_k=1, tokens=int(lengths.max()), requests=len(LENGTHS))
    rows = np.concatenate([np.arange(n) + r * lengths.max() for r, n in enumerate(lengths)])
    trace = dataclasses.replace(
        trace, expert_ids=trace.expert_ids[rows], gates=None, lengths=lengths.astype(np.int32),
        prompt_lengths=np.array(LENGTHS, np.int32),
    )  # fmt: skip
    schedule = build_schedule(trace, batch=batch)
    assert [own.decode for own in passes] == (schedule.phase == 1).tolist()
    assert [own.fed.size for own in passes] == schedule.tokens.tolist()
    assert [own.requests[0] for own in passes] == schedule.request.tolist()
    assert len(sessions) == (len(LENGTHS) if batch == 1 else 1)
    places = {}
    for own in passes:
        assert own.places == tuple(sorted(set(own.places))) and max(own.places) < batch
        for request, place in zip(own.requests, own.places, strict=True):
            assert places.setdefault(request, place) == place  # a request stays where it is
    told = sorted((r, s) for own in passes for r, s in zip(own.requests, own.steps, strict=True))
    assert told == [(r, s) for r in range(len(LENGTHS)) for s in range(steps)]


@pytest.mark.parametrize("hidden_s", [0.0, 5e-5])
def test_rates_of_passes_are_found_again(hidden_s):
    rates = predict.PassRates(3e-3, 1e-3, 2e-4, 2.5e-4, hidden_s, expert_s=4e-5)

    def timed(capacity):
        """A run whose passes take exactly so long."""
        own, run = ran(capacity=capacity)
        guess = predict.predict_passes(own.policy, run.trace, rates)
        return own, guess, dataclasses.replace(run, visit_s=guess.visit_s)

    (own, guess, run), (_, _, resident) = timed("5 slots"), timed("100%")
    np.testing.assert_allclose(predict.fit_passes(resident, run, warmup=0), rates, rtol=1e-6, atol=1e-12)
    schedule = own.policy.replay(run.trace)[0].schedule
    end_s = np.cumsum(guess.visit_s.reshape(-1, schedule.layers).sum(axis=1))
    passes = serving.plan(own.cfg, LENGTHS, STEPS, 2)[0]
    at_s = np.zeros((len(LENGTHS), STEPS))
    for own_pass, end in zip(passes, end_s, strict=True):
        at_s[list(own_pass.requests), list(own_pass.steps)] = end
    np.testing.assert_allclose(guess.ttft_s, at_s[:, 0].mean())
    np.testing.assert_allclose(guess.tpot_s, np.diff(at_s).mean())


def test_what_a_batch_holds_beside_its_experts():
    own = engine(3)
    told, single = (fused.beside(own.cfg, LONG, STEPS, batch) for batch in (3, 1))
    request = own._request(LONG + STEPS - 1)
    assert told.cache_bytes == tree_bytes((request.caches, request.tail)) == 3 * single.cache_bytes
    assert told.record_bytes > single.record_bytes and told.dense_bytes == single.dense_bytes


def test_errors_are_one_line():
    cfg, params, stacks, *_ = made("olmoe", "float32")
    pinned = store.pin_stacks(cfg, stacks)
    long = moe.tiny("phimoe", "float32")
    border = long.rope.original_positions

    def refused(match, call):
        with pytest.raises(SpecmdError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused("^batch is 2, which the layerwise engine does not do", lambda: Offloaded(cfg, params, pinned, batch=2))
    refused("^batch is 0, expected at least 1", lambda: engine(0))
    refused("prefill_chunk is 2, which a running model does not do", lambda: engine(2, prefill_chunk=2))
    serving.plan(long, [border - 4, border - 3], 5, 1)
    refused(
        f"^batch is 2: requests of {border} and {border + 1} positions, expected all of them up to {border}",
        lambda: serving.plan(long, [border - 4, border - 3], 5, 2),
    )
    run = ran()[1]
    refused("a run with batch 2, expected requests one after the other", lambda: predict.fit_alike([run]))
    other = dataclasses.replace(run, batch=1)
    refused("runs with batch 2 and 1, expected one batch", lambda: predict.fit_passes(run, other))


@pytest.mark.slow
def test_the_command_line_says_how_many_tokens_come_in_a_second(tmp_path, capsys):
    options = "--smoke --engine fused --batch 2 --requests 3 --prefetches none --steps 3 --prompt-tokens 4"
    experiments.offload.main([*options.split(), "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "2 requests decoded together" in told and "tokens/s" in told
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines())
    assert (row["batch"], row["events_equal"]) == ("2", "True") and float(row["tokens_per_s"]) > 0


@pytest.mark.slow
def test_requests_of_a_batch_are_routed_by_the_cache() -> None:
    """Places without a request choose nothing, and nothing that the routing remembers comes from them."""
    routed = {strength: ran(3, "70%", routing="cache_aware", strength=strength) for strength in (0.0, 0.5)}
    for own, run in routed.values():
        check(own, run, fetches_all=False)
    standard, plain = ran(3, "70%")
    check(standard, plain)
    np.testing.assert_array_equal(routed[0.0][1].tokens, plain.tokens)
    np.testing.assert_array_equal(routed[0.0][1].logits, plain.logits)
    copies = [sum((d.outcome == FETCHED).sum() for d in run.decisions) for _, run in routed.values()]
    assert copies[1] < copies[0]
