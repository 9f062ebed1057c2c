"""A whole pass as one program: the all-resident model's text bit for bit, and the simulator's events one by one."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false
from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from moe_cases import KEY, PROMPT, STEPS, check_run, made, quantize_store, refused

from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused import program
from specmd_jax.moe.fused.arrays import Active, Admission
from specmd_jax.moe.fused.engine import PARTS, Fused, segments
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict
from specmd_jax.moe.runtime import store
from specmd_jax.replay.totals import DROPPED, FETCHED, SUBSTITUTED
from specmd_jax.trace import synthesize


@functools.cache
def stacked_store(family, dtype):
    cfg, _, stacks, *_ = made(family, dtype)
    return store.stack(cfg, stacks)


def engine(family="olmoe", dtype="float32", eviction="lru", capacity="4 slots", **options):
    cfg, params, *_ = made(family, dtype)
    return Fused(
        cfg, params, stacked_store(family, dtype), eviction=eviction, capacity=capacity, keep_logits=True, **options
    )


# capacities: one expert, less than a prefill needs, less than everything, everything
@pytest.mark.parametrize(
    ("eviction", "capacity", "policy"),
    [
        ("lru", "4 slots", {}),
        pytest.param("least_stale", "1 slots", {"prefetch": "gate_ahead"}, marks=pytest.mark.slow),
        pytest.param("lfu", "50%", {"prefetch": "transition", "horizon": 2}, marks=pytest.mark.slow),
        pytest.param("least_stale", "50%", {"prefetch": "gate_ahead"}, marks=pytest.mark.slow),
        pytest.param("lru", "1 slots", {}, marks=pytest.mark.slow),
        pytest.param("lru", "100%", {"prefetch": "gate_ahead"}, marks=pytest.mark.slow),
        pytest.param("lfu", "4 slots", {"prefetch": "transition"}, marks=pytest.mark.slow),
        pytest.param("slru", "40%", {"prefetch": "previous", "scope": "layer"}, marks=pytest.mark.slow),
    ],
)
def test_olmoe_fused_is_resident_and_its_events_are_the_simulators(eviction, capacity, policy):
    *_, prompts, whole = made("olmoe", "float32")
    own = engine("olmoe", "float32", eviction, capacity, **policy)
    compiled = program.run._cache_size()
    run = own.generate(prompts, STEPS)
    assert program.run._cache_size() <= compiled + 2  # a prefill and a decode step, for both requests
    check_run(own, run, whole)
    misses = sum((d.outcome == FETCHED).sum() for d in run.decisions)
    assert misses > 0 and (capacity == "100%") == (sum(d.evictions.sum() for d in run.decisions) == 0)
    assert (run.visit_s > 0).all() and np.isclose(run.visit_s.sum(), run.ttft_s.sum() + 4 * run.tpot_s.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "bits"),
    [
        ("mixtral", "bfloat16", True),
        ("olmoe", "bfloat16", True),
        ("gpt_oss", "bfloat16", True),
        ("qwen2_moe", "bfloat16", True),
        ("deepseek_v2", "float32", False),  # as the layerwise engine: equal text, router logits not to the last bit
    ],
)
def test_other_models(family, dtype, bits):
    *_, prompts, whole = made(family, dtype)
    own = engine(family, dtype, "lru", "40%", prefetch="gate_ahead")
    check_run(own, own.generate(prompts, STEPS), whole, bits)


@pytest.mark.slow
def test_experts_of_few_bits_are_copied_as_they_are():
    cfg, params, _, prompts, _ = made("olmoe", "float32")
    stacks = quantize_store(jax.tree.map(np.asarray, moe.random_stacks(cfg, KEY)), "int4", 16)
    whole = moe.generate(cfg, params, stacks, prompts[0][None], 3)
    stacked = store.stack(cfg, stacks, precision="int4", group=16)
    run = Fused(cfg, params, stacked, capacity="30%").generate(prompts[:1], 3)
    np.testing.assert_array_equal(run.tokens, whole.tokens)
    assert stacked.expert_bytes < moe.expert_bytes(cfg) / 5


# ---- the same made of kernels, interpreted -------------------------------------------------------------------------


@functools.cache
def all_resident(family, dtype):
    """A run of kernels alone, with everything on the device from its first use on."""
    own = engine(family, dtype, "lru", "100%", kernels=True)
    return own.generate(made(family, dtype)[3], STEPS, keep_logits=True)


@pytest.mark.parametrize(
    ("family", "eviction", "capacity", "policy"),
    [
        ("olmoe", "lru", "4 slots", {"prefetch": "gate_ahead"}),
        pytest.param("olmoe", "least_stale", "1 slots", {}, marks=pytest.mark.slow),
        pytest.param("olmoe", "lfu", "50%", {"prefetch": "transition", "horizon": 2}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "lru", "40%", {}, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "least_stale", "30%", {"scope": "layer"}, marks=pytest.mark.slow),
        pytest.param("deepseek_v2", "lru", "40%", {}, marks=pytest.mark.slow),
        pytest.param("phimoe", "lru", "40%", {}, marks=pytest.mark.slow),
    ],
)
def test_kernels_run_the_same_text_and_events(family, eviction, capacity, policy):
    *_, prompts, whole = made(family, "float32")
    resident = all_resident(family, "float32")  # the first interpreted kernel of a process brings settings of its own
    own = engine(family, "float32", eviction, capacity, kernels=True, **policy)
    compiled = program.run._cache_size()
    run = own.generate(prompts, STEPS, keep_logits=True)
    assert program.run._cache_size() <= compiled + 2
    check_run(own, run, whole, bits=False)
    np.testing.assert_array_equal(run.logits, resident.logits)  # bit for bit
    assert sum((d.outcome == FETCHED).sum() for d in run.decisions) > 0
    assert set(own.reasons) == ({"dense"} if family == "deepseek_v2" else set())


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("miss", ["drop", "substitute"])
def test_rules_that_leave_experts_out_or_replace_them(miss, kernels):
    """What runs instead is the layerwise engine's, and the events are the simulator's."""
    cfg, params, stacks, prompts, _ = made("olmoe", "float32")
    numbers = {"keep": 1} if miss == "drop" else {"tolerance": 0.4}
    rule = {"eviction": "lru", "capacity": "40%", "miss": miss, "numbers": numbers}
    own = Fused(cfg, params, stacked_store("olmoe", "float32"), keep_logits=True, kernels=kernels, **rule)
    run = own.generate(prompts, STEPS)
    assert run.events_equal(own.policy.replay(run.trace)[1])
    other = Offloaded(cfg, params, store.pin_stacks(cfg, stacks), **rule).generate(prompts, STEPS)
    np.testing.assert_array_equal(run.tokens, other.tokens)
    outcomes = np.stack([d.outcome for d in run.decisions])
    np.testing.assert_array_equal(outcomes, np.stack([d.outcome for d in other.decisions]))
    assert (outcomes == (DROPPED if miss == "drop" else SUBSTITUTED)).any()
    if kernels:
        assert list(own.reasons) == ["policy"] and "it fetches every miss" in own.reasons["policy"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_kernels_on_experts_of_few_bits(precision):
    cfg, params, _, prompts, _ = made("olmoe", "float32")
    stacks = quantize_store(jax.tree.map(np.asarray, moe.random_stacks(cfg, KEY)), precision, 16)
    whole = moe.generate(cfg, params, stacks, prompts[0][None], 3)
    stacked = store.stack(cfg, stacks, precision=precision, group=16)
    run = Fused(cfg, params, stacked, capacity="30%", kernels=True).generate(prompts[:1], 3)
    np.testing.assert_array_equal(run.tokens, whole.tokens)


def test_what_no_kernel_serves_is_said():
    assert set(engine().reasons) == set(PARTS)  # a CPU, unless they are asked for
    assert engine(kernels=True).reasons == {}
    reasons = engine(eviction="slru", kernels=True).reasons
    assert list(reasons) == ["policy"] and "slru" in reasons["policy"]


@functools.cache
def replayed():
    """An engine, the trace whose routing it replayed, and the run."""
    cfg, _, _, prompts, _ = made("olmoe", "float32")
    trace = synthesize(
        layers=len(cfg.moe_layers), experts=cfg.experts, top_k=cfg.top_k, tokens=PROMPT + STEPS - 1, requests=2,
        prompt_tokens=PROMPT, with_ahead=True,
        skew=1.0, stickiness=0.5, drift=0.01, topics=4,  # passes differ in how many visits copy
    )  # fmt: skip
    own = engine("olmoe", "float32", "least_stale", "50%", prefetch="gate_ahead")
    return own, trace, own.generate(prompts, STEPS, replay=trace, keep_logits=True)


def test_replayed_routing_is_what_the_trace_records():
    own, trace, run = replayed()
    np.testing.assert_array_equal(run.trace.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(run.trace.gates, trace.gates)
    np.testing.assert_array_equal(run.trace.ahead, trace.ahead)
    assert run.events_equal(own.policy.replay(run.trace)[1])
    np.testing.assert_array_equal(run.logits.argmax(axis=-1), run.tokens)


def test_slots_are_never_copied_as_a_whole():
    own = engine()
    device = store.sharding(store.DEVICE)
    live, request = jax.device_put((own._begin(), own._request(PROMPT + STEPS - 1)), device)
    for tokens in (1, PROMPT):
        fed = jax.device_put(jnp.zeros((1, tokens), jnp.int32), device)
        text = program.run.lower(own._form, own._fixed, live, request, fed, None).compile().as_text()
        for leaf in jax.tree.leaves((live.slots, own._fixed.host)):
            shape = re.escape(f"[{','.join(map(str, leaf.shape))}]")
            assert re.search(shape, text) and not re.search(rf"{shape}\S* copy\(", text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("batch", "policy", "kernels"),
    [
        (1, {"prefetch": "gate_ahead"}, (7, 10)),
        (3, {"routing": "cache_aware", "strength": 0.5}, (7, 7)),
    ],
)
def test_a_whole_pass_lowers_for_a_gpu(monkeypatch, batch, policy, kernels):
    """Kernels that are not interpreted, between memories that a CPU does not tell apart."""
    with monkeypatch.context() as patched:
        patched.setattr(jax, "default_backend", lambda: "gpu")
        own = engine("olmoe", "bfloat16", batch=batch, **policy)
    assert own._form.kernels == (True, True, batch == 1, False)
    live, request = own._begin(), own._request(PROMPT + STEPS - 1)
    place, row = jnp.int32(0), jnp.zeros((batch, 1), jnp.int32)
    parts = (Admission(place, row), Active(jnp.ones(batch, bool))) if batch > 1 else (None, None)
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    for fed, part, count in zip((jnp.zeros((1, PROMPT), jnp.int32), row), parts, kernels, strict=True):
        with jax.sharding.use_abstract_mesh(gpu):
            traced = program.run.trace(own._form, own._fixed, live, request, fed, None, part)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("triton") >= count  # some compilers write a kernel once for each call


@pytest.mark.parametrize("hidden_s", [0.0, 5e-5])
def test_rates_of_passes_are_found_again(hidden_s):
    own, _, run = replayed()
    rates = predict.PassRates(prefill_s=3e-3, decode_s=1e-3, copy_s=2e-4, prefill_copy_s=2e-4, hidden_s=hidden_s)
    guess = predict.predict_passes(own.policy, run.trace, rates, 1)
    run = dataclasses.replace(run, visit_s=guess.visit_s)
    np.testing.assert_allclose(predict.fit_passes(run, run), rates, rtol=1e-6, atol=1e-12)
    passes_s = guess.visit_s.reshape(2, STEPS, 3).sum(axis=-1)[1]
    np.testing.assert_allclose((guess.ttft_s, guess.tpot_s), (passes_s[0], passes_s[1:].mean()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("OLMoE-1B-7B", [(1, 16)]),
        ("gpt-oss-20b", [(2, 12)]),  # windows take turns
        ("DeepSeek-V2-Lite", [(1, 1), (1, 25)]),  # one dense layer before the first gate
    ],
)
def test_equal_layers_are_one_loop(name, expected):
    cfg = moe.published(name)
    found = segments(cfg)
    assert [(len(segment), len(segment[0][0])) for segment in found] == expected
    in_order = [
        layer
        for segment in found
        for repeat in range(len(segment[0][0]))
        for span in segment
        for layer in (same[repeat] for same in span)
    ]
    assert in_order == list(range(max(cfg.moe_layers) + 1))


def test_errors_are_one_line():
    cfg, _, stacks, prompts, _ = made("olmoe", "float32")

    refused("need 0.00 GiB of host memory, 0.00 GiB are free", lambda: store.stack(cfg, stacks, available_bytes=10))
    refused("olmoe: 2 layers of experts, expected 3", lambda: store.stack(cfg, stacks[:-1]))
    refused("more than the expected 3 layers", lambda: store.stack(cfg, [*stacks, stacks[0]]))
    refused("its parts are not those of a int8 expert", lambda: store.stack(cfg, stacks, precision="int8"))
    refused("MoE layer 0 is float32 .*, expected", lambda: store.stack(moe.tiny("olmoe", "bfloat16"), stacks))
    refused("looks into the future", lambda: engine(eviction="belady"))
    refused("expected at least one expert", lambda: engine(capacity="0 slots"))
    refused("expected at least one", lambda: engine().generate([], 2))
    refused("'cpu': the fused engine runs all experts", lambda: engine(miss="cpu"))
    other = synthesize(layers=2, experts=8, top_k=2, tokens=40)
    refused(r"\(2, 8, 2\), the model", lambda: engine().generate(prompts, STEPS, replay=other))
    dense = dataclasses.replace(cfg, moe_layers=())
    refused("no routed experts", lambda: segments(dense))


def test_logits_that_are_not_finite_name_the_token():
    cfg, params, _, prompts, _ = made("olmoe", "float32")
    weight = params["head"]["project"]["weight"]
    broken = {**params, "head": {**params["head"], "project": {"weight": weight.at[0, 0].set(jnp.nan)}}}
    own = Fused(cfg, broken, stacked_store("olmoe", "float32"), capacity="4 slots", keep_logits=True)
    with pytest.raises(SpecmdError, match="request 0: the logits of generated token 0 are not finite"):
        own.generate(prompts, STEPS)
