"""Experts in host memory: the all-resident model's text bit for bit, and the simulator's events one by one."""

# Hand-made timelines stand in for compiled ones: NumPy arrays where a JAX array is declared.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import KEY, STEPS, check_run, made, quantize_store

from specmd_jax import moe
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict
from specmd_jax.moe.runtime import store
from specmd_jax.moe.runtime.decider import GateOutput, columns
from specmd_jax.policies.columns import TOUCH, scored
from specmd_jax.replay.timing import Costs
from specmd_jax.replay.totals import FETCHED, VISIT_S
from specmd_jax.setting import Setting
from specmd_jax.trace import synthesize


@functools.cache
def pinned_store(family, dtype):
    cfg, _, stacks, *_ = made(family, dtype)
    return store.pin_stacks(cfg, stacks)


def engine(family, dtype, eviction, capacity, **policy):
    cfg, params, *_ = made(family, dtype)
    pinned = pinned_store(family, dtype)
    return Offloaded(cfg, params, pinned, eviction=eviction, capacity=capacity, keep_logits=True, **policy)


def check(family, dtype, eviction, capacity, **policy):
    _, _, _, prompts, whole = made(family, dtype)
    own = engine(family, dtype, eviction, capacity, **policy)
    run = own.generate(prompts, STEPS)
    check_run(own, run, whole)
    return run


# policies x capacities: one expert, less than a prefill needs, less than everything, everything
@pytest.mark.parametrize("capacity", ["1 slots", "4 slots", "50%", "100%"])
@pytest.mark.parametrize(
    ("eviction", "policy"),
    [
        ("lru", {}),
        ("least_stale", {"prefetch": "gate_ahead"}),
        pytest.param("lfu", {"prefetch": "transition", "horizon": 2}, marks=pytest.mark.slow),
        pytest.param("slru", {"prefetch": "previous", "overfetch": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_olmoe_offloaded_is_resident_and_its_events_are_the_simulators(eviction, policy, capacity):
    run = check("olmoe", "float32", eviction, capacity, **policy)
    misses = sum((d.outcome == FETCHED).sum() for d in run.decisions)
    assert misses > 0 and (capacity == "100%") == (sum(d.evictions.sum() for d in run.decisions) == 0)


@pytest.mark.parametrize(
    ("family", "dtype", "scope"),
    [
        ("mixtral", "bfloat16", "layer"),
        pytest.param("olmoe", "bfloat16", "global", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "bfloat16", "global", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "bfloat16", "layer", marks=pytest.mark.slow),
    ],
)
def test_other_models_and_a_quota_a_layer(family, dtype, scope):
    check(family, dtype, "lru", "40%", scope=scope)


@pytest.mark.slow
def test_experts_of_few_bits_are_copied_as_they_are():
    cfg, params, _, prompts, _ = made("olmoe", "float32")
    stacks = quantize_store(jax.tree.map(np.asarray, moe.random_stacks(cfg, KEY)), "int4", 16)
    whole = moe.generate(cfg, params, stacks, prompts[0][None], 3)
    pinned = store.pin_stacks(cfg, stacks, precision="int4", group=16)
    run = Offloaded(cfg, params, pinned, capacity="30%").generate(prompts[:1], 3)
    np.testing.assert_array_equal(run.tokens, whole.tokens)
    assert pinned.expert_bytes < moe.expert_bytes(cfg) / 5


def test_replayed_routing_is_what_the_trace_records():
    cfg, _, _, prompts, _ = made("olmoe", "float32")
    trace = synthesize(
        layers=len(cfg.moe_layers), experts=cfg.experts, top_k=cfg.top_k, tokens=9 + STEPS - 1, requests=2,
        prompt_tokens=9, with_ahead=True,
    )  # fmt: skip
    own = engine("olmoe", "float32", "least_stale", "50%", prefetch="gate_ahead")
    run = own.generate(prompts, STEPS, replay=trace)
    np.testing.assert_array_equal(run.trace.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(run.trace.gates, trace.gates)
    np.testing.assert_array_equal(run.trace.ahead, trace.ahead)
    assert run.events_equal(own.policy.replay(run.trace)[1])
    with pytest.raises(SpecmdError, match="request 0 has 13 tokens, 14 are fed"):
        own.generate(prompts, STEPS + 1, replay=trace)


def most_recent(sign=-1):
    """A policy of our own: the most recently used leaves first."""
    return scored(lambda now, layer, touch: (sign * touch,), touch=TOUCH)


@pytest.mark.parametrize("eviction", [most_recent, functools.partial(most_recent, sign=-2), most_recent()])
def test_a_policy_of_ones_own_runs_and_its_events_are_the_simulators(eviction):
    run = check("olmoe", "float32", eviction, "50%")
    usual = engine("olmoe", "float32", "lru", "50%").policy.replay(run.trace)[1]
    assert not run.events_equal(usual)


def test_a_setting_says_the_same_as_its_fields():
    cfg, params, *_ = made("olmoe", "float32")
    pinned, setting = pinned_store("olmoe", "float32"), Setting(eviction="lfu", prefetch="gate_ahead", capacity="50%")
    whole = Offloaded(cfg, params, pinned, setting).policy
    apart = engine("olmoe", "float32", "lfu", "50%", prefetch="gate_ahead").policy
    assert (whole.setup, whole.options, whole.needs_ahead) == (apart.setup, apart.options, True)
    np.testing.assert_array_equal(whole.budget, apart.budget)
    changed = Offloaded(cfg, params, pinned, setting, prefetch="none", eviction="lfu_decay", decay=0.5).policy
    assert not changed.needs_ahead and changed.mix.eviction.numbers == {"decay": 0.5}


# ---- predicted times -------------------------------------------------------------------------------------------------


def test_clock_without_prefetch_gives_the_timed_simulators_seconds():
    trace = synthesize(layers=3, experts=8, top_k=2, tokens=30, requests=2, prompt_tokens=1)
    policy = engine("olmoe", "float32", "lru", "30%").policy
    rates = predict.Rates(copy_s=3e-4, expert_s=2e-5, expert_token_s=0.0, layer_s=1e-4, head_s=5e-5, entry_s=0.0)
    trace = dataclasses.replace(trace, expert_bytes=np.full(3, moe.expert_bytes(made("olmoe", "float32")[0])))
    _, events = policy.replay(trace)
    row = np.ones(3, np.float32)
    costs = Costs(
        copy_s=rates.copy_s * row[None],
        expert_read_s=rates.expert_s * row[None],
        expert_flop_s=0 * row,
        dense_read_s=rates.layer_s * row + np.array([0, 0, rates.head_s], np.float32),
        dense_flop_s=0 * row,
        host_read_s=0 * row,
        host_flop_s=0 * row,
        launch_s=np.float32(0),
        layer_s=np.float32(0),
        adds=np.float32(0),
        handover_s=np.float32(0),
        host_least_s=0 * row,
        link_load=0 * row,
    )  # pyright: ignore[reportArgumentType]
    replays = prepare(trace)
    setup = replays.setup(policy.mix, None, **policy.options)._replace(timed=True, detail="events")
    numbers = replays.numbers(policy.budget, None)._replace(costs=jax.tree.map(jnp.asarray, costs))
    _, timed = replay_many(setup, (), numbers, policy.mix.traced(), replays.visits(setup, policy.mix))
    ours = predict.clock(replays, events.outcome, None, rates)
    np.testing.assert_allclose(ours, np.asarray(timed.seconds)[: replays.schedule.visits, VISIT_S], rtol=1e-4)
    assert len(np.unique(ours.round(9))) > 3  # visits with different numbers of misses


def test_a_prefetched_expert_is_waited_for_and_asking_costs_time():
    own = engine("olmoe", "float32", "lru", "100%", prefetch="previous")
    trace = synthesize(layers=3, experts=8, top_k=2, tokens=12, requests=1, prompt_tokens=1, stickiness=0.0)
    trace = dataclasses.replace(trace, expert_bytes=np.full(3, pinned_store("olmoe", "float32").expert_bytes))
    replays, events = own.policy.replay(trace)
    rates = predict.Rates(copy_s=0.0, expert_s=0.0, expert_token_s=0.0, layer_s=1.0, head_s=0.0, entry_s=0.0)
    copies = int((events.outcome == FETCHED).sum())
    np.testing.assert_allclose(predict.clock(replays, events.outcome, events.prefetched, rates), 1.0)
    slow = predict.clock(replays, events.outcome, events.prefetched, rates._replace(copy_s=0.5))
    np.testing.assert_allclose(slow.sum(), replays.schedule.visits + 0.5 * copies)  # a visit outlasts two prefetches


def test_the_pieces_of_a_clock_make_up_its_visits_one_at_a_time():
    own = engine("olmoe", "float32", "lru", "50%", prefetch="transition")
    trace = synthesize(layers=3, experts=8, top_k=2, tokens=12, requests=1, prompt_tokens=3, stickiness=0.5)
    trace = dataclasses.replace(trace, expert_bytes=np.full(3, pinned_store("olmoe", "float32").expert_bytes))
    replays, events = own.policy.replay(trace)
    rates = predict.Rates(copy_s=0.7, expert_s=0.2, expert_token_s=0.1, layer_s=0.4, head_s=0.1, entry_s=0.0)
    pieces: list[predict.Piece] = []
    took_s = predict.clock(replays, events.outcome, events.prefetched, rates, events.row, pieces)
    gates = np.concatenate([[0.0], took_s.cumsum()])
    for kinds in (("miss", "prefetch"), ("expert", "rest")):
        track = sorted((gates[p.visit] + p.start_s, gates[p.visit] + p.end_s) for p in pieces if p.kind in kinds)
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(track))
    ends = [piece.end_s for piece in pieces if piece.kind == "rest"]
    np.testing.assert_allclose(ends, took_s)
    assert sum(piece.kind == "miss" for piece in pieces) == (events.outcome == FETCHED).sum()
    started = np.asarray(events.prefetched) > 0
    assert sum(piece.kind == "prefetch" for piece in pieces) == started.sum() > 0


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_errors_are_one_line():
    cfg, params, stacks, prompts, _ = made("olmoe", "float32")
    pinned = pinned_store("olmoe", "float32")

    def refused(match, call):
        with pytest.raises(SpecmdError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused(
        "need 0.00 GiB of host memory, 0.00 GiB are free", lambda: store.pin_stacks(cfg, stacks, available_bytes=10)
    )
    refused("olmoe: 16 experts, expected 3 x 8", lambda: store.pin_stacks(cfg, stacks[:-1]))
    refused("its parts are not those of a int8 expert", lambda: store.pin_stacks(cfg, stacks, precision="int8"))
    refused("is float32 .*, expected bfloat16", lambda: store.pin_stacks(moe.tiny("olmoe", "bfloat16"), stacks))
    refused("looks into the future", lambda: Offloaded(cfg, params, pinned, eviction="belady"))
    refused("looks into the future", lambda: Offloaded(cfg, params, pinned, prefetch="perfect"))
    refused("unknown eviction", lambda: Offloaded(cfg, params, pinned, eviction="lur"))
    refused("expected at least one expert", lambda: Offloaded(cfg, params, pinned, capacity="0 slots"))
    refused("horizon is 3", lambda: Offloaded(cfg, params, pinned, prefetch="previous", horizon=3))
    refused("batch is 4, which the layerwise engine does not", lambda: Offloaded(cfg, params, pinned, batch=4))
    refused("expected the store's own", lambda: Offloaded(cfg, params, pinned, precisions=(4, 16)))
    refused("'shuffled' looks into the future", lambda: Offloaded(cfg, params, pinned, prefetch="shuffled"))
    own = engine("olmoe", "float32", "lru", "50%")
    refused("expected at least one", lambda: own.generate([], 2))
    refused("outside the vocabulary", lambda: own.generate([np.array([cfg.vocabulary])], 2))
    other = synthesize(layers=2, experts=8, top_k=2, tokens=40)
    refused(r"\(2, 8, 2\), the model", lambda: own.generate(prompts, STEPS, replay=other))


def test_logits_that_are_not_finite_name_the_token():
    cfg, params, _, prompts, _ = made("olmoe", "float32")
    pinned = pinned_store("olmoe", "float32")
    weight = params["head"]["project"]["weight"]
    broken = {**params, "head": {**params["head"], "project": {"weight": weight.at[0, 0].set(jnp.nan)}}}
    with pytest.raises(SpecmdError, match="request 0: the logits of generated token 0 are not finite"):
        Offloaded(cfg, broken, pinned, capacity="50%").generate(prompts, STEPS)


def test_the_decider_sees_a_visit_as_the_schedule_has_it():
    trace = synthesize(layers=1, experts=6, top_k=3, tokens=7, requests=1, prompt_tokens=7, with_ahead=True)
    schedule = prepare(trace).schedule
    ahead = trace.ahead[:, 0]
    whole, real = columns(GateOutput(trace.expert_ids[:, 0].astype(np.int32), trace.gates[:, 0], ahead), 6)
    np.testing.assert_array_equal(whole[-12:-6], schedule.count[0])
    np.testing.assert_array_equal(whole[-6:], schedule.rank[0])
    np.testing.assert_array_equal(real[:6], schedule.mass[0])
    np.testing.assert_array_equal(real[6:], ahead.sum(axis=0))
