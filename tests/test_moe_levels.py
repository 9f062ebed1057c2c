"""Several precisions in the fused engine: pages bit for bit, the simulator's events, the layerwise engine's logits."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false
from __future__ import annotations

import csv
import functools

import jax
import numpy as np
import pytest
from moe_cases import STEPS, made, quantize_store, refused, router_logits

import experiments.offload
from configs.completion import Completion
from experiments.offloading.completed import make_plan
from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused import engine as fused
from specmd_jax.moe.fused import pages, program
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict, quality
from specmd_jax.moe.model.experts import expert_spec
from specmd_jax.moe.runtime import packing, store
from specmd_jax.policies import MISS
from specmd_jax.replay.totals import DROPPED, FETCHED, SUBSTITUTED

LEVELS = ("int4", "int8", "float32")
# compilers of older versions decode and add in one, across barriers, and in another order than the layerwise programs
FUSES = jax.__version_info__ < (0, 12)


def check_equal(found, wanted, encoded):
    """Bit for bit; where experts of few bits run (``encoded``) only if the compiler allows it."""
    if encoded and FUSES:
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    else:
        np.testing.assert_array_equal(found, wanted)


# ---- pages -----------------------------------------------------------------------------------------------------------


def noise(spec, seed, count=3):
    """Experts [n, ...] of every bit pattern."""
    rng = np.random.default_rng(seed)

    def leaf(one):
        size = count * int(np.prod(one.shape)) * one.dtype.itemsize
        return rng.integers(0, 256, size, np.uint8).view(one.dtype).reshape(count, *one.shape)

    return jax.tree.map(leaf, spec)


def bits(leaf):
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])  # gpt-oss has biases
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "int8", "int4", "mxfp4"])
def test_an_expert_comes_out_of_its_pages_bit_for_bit(family, precision):
    cfg = moe.tiny(family, "bfloat16" if precision == "float32" else "float32")  # biases of another type
    layout = packing.lay_out([expert_spec(cfg, precision)])
    (level,) = layout.levels
    given = noise(expert_spec(cfg, precision), 1)
    held = np.zeros((3, level.pages, layout.page_words), np.uint32)
    packing.pack(level, given, held)
    assert layout.page_words % packing.LINE == 0 and not held.reshape(3, -1)[:, level.words :].any()
    for n in range(3):
        found = jax.jit(packing.unpack, static_argnums=0)(level, held[n])
        assert jax.tree.structure(found) == jax.tree.structure(expert_spec(cfg, precision))
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
            assert leaf.dtype == wanted.dtype and leaf.shape == wanted.shape[1:]
            np.testing.assert_array_equal(bits(leaf), bits(wanted[n]))


def test_arrays_that_end_inside_of_a_word():
    forms = ((3,), np.uint8), ((1, 5), np.float16), ((2,), np.float32)
    spec = tuple(jax.ShapeDtypeStruct(shape, np.dtype(kind)) for shape, kind in forms)
    layout = packing.lay_out([spec])
    given, held = noise(spec, 2, 1), np.zeros((1, layout.most_pages, layout.page_words), np.uint32)
    packing.pack(layout.levels[0], given, held)
    assert layout.levels[0].words == 1 + 3 + 2
    for leaf, wanted in zip(packing.unpack(layout.levels[0], jax.numpy.asarray(held[0])), given, strict=True):
        np.testing.assert_array_equal(bits(leaf), bits(wanted[0]))


@pytest.mark.parametrize("name", ["OLMoE-1B-7B", "gpt-oss-20b", "Mixtral-8x7B", "DeepSeek-V2-Lite"])
@pytest.mark.parametrize("precisions", [("int4", "int8", "bfloat16"), ("int4", "bfloat16"), ("int8", "bfloat16")])
def test_pages_waste_little(name, precisions):
    cfg = moe.published(name)
    layout = packing.lay_out([expert_spec(cfg, precision) for precision in precisions])
    for level, precision in zip(layout.levels, precisions, strict=True):
        wasted = layout.expert_bytes(level) - moe.expert_bytes(cfg, precision)
        assert 0 <= wasted < min(layout.page_bytes, moe.expert_bytes(cfg, precision) / 32 + 128)
        assert wasted < 0.004 * moe.expert_bytes(cfg, precision)


# ---- runs ------------------------------------------------------------------------------------------------------------


@functools.cache
def stores(family, dtype, precisions):
    cfg, _, stacks, *_ = made(family, dtype)
    return store.stack(cfg, stacks, precisions=precisions), store.pin_stacks(cfg, stacks, precisions=precisions)


def engine(miss, capacity, precisions=LEVELS, family="olmoe", dtype="float32", **policy):
    cfg, params, *_ = made(family, dtype)
    policy = {"eviction": "lru", "keep_logits": True} | policy
    return Fused(cfg, params, stores(family, dtype, precisions)[0], capacity=capacity, miss=miss, **policy)


def watched(own, monkeypatch):
    """Runs the prompts, and looks at the pages behind every pass."""
    passes, run = [], program.run

    def look(form, fixed, live, *rest):
        live, request, end = run(form, fixed, live, *rest)
        passes.append(jax.device_get((live.cache.owner, live.cache.table, live.cache.step.cache.level)))
        return live, request, end

    monkeypatch.setattr(program, "run", look)
    found = own.generate(made(own.cfg.family, own.cfg.dtype)[3], STEPS, keep_logits=True)
    monkeypatch.setattr(program, "run", run)
    assert len(passes) == 2 * STEPS
    return found, passes


def check_pages(own, passes):
    """Every resident expert has the pages of its level and no others; at most one token's demand has pages beside."""
    pool = own._form.pool
    counts = np.array([0, *(level.pages for level in pool.layout.levels)])
    for owner, table, level in passes:
        level = level.reshape(-1)
        assert owner.shape == (pool.pages,) and table.shape == (level.size, pool.layout.most_pages)
        for flat in np.flatnonzero(level):
            own_pages = table[flat, : counts[level[flat]]]
            assert (np.sort(own_pages) == np.flatnonzero(owner == flat)).all() and (own_pages < pool.pages).all()
            assert (table[flat, counts[level[flat]] :] == pool.pages).all()
        beside = owner[(owner >= 0) & (level[np.maximum(owner, 0)] == 0)]
        assert np.unique(beside).size <= own.staging and beside.size <= own.staging * pool.layout.most_pages


# 1 and 2 slots: less than one token demands; 4: less than a prefill does
CASES = [
    ("fetch_lowest_bit", "2 slots", LEVELS, {}),
    ("cascade", "40%", LEVELS, {"numbers": {"high": 0.4, "low": 0.3}, "prefetch": "gate_ahead"}),
    ("drop", "30%", LEVELS, {"numbers": {"keep": 1}}),
]
SLOW = [
    ("fetch", "4 slots", LEVELS, {}),
    ("fetch_priority", "50%", LEVELS, {"eviction": "least_stale", "prefetch": "previous"}),
    ("cascade", "1 slots", LEVELS, {"numbers": {"high": 0.4, "low": 0.3}}),
    ("substitute", "60%", LEVELS, {"numbers": {"tolerance": 0.2}, "eviction": "lfu"}),
    ("fetch_lowest_bit", "40%", ("int4", "float32"), {"prefetch": "previous"}),
    ("cascade", "30%", LEVELS, {"eviction": "slru", "scope": "layer", "numbers": {"high": 0.4, "low": 0.3}}),
    ("drop", "2 slots", ("int4", "int8"), {"numbers": {"keep": 1}, "prefetch": "previous"}),
]


@pytest.mark.parametrize(
    ("miss", "capacity", "precisions", "policy"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_events_are_the_simulators_and_logits_the_layerwise_engines(miss, capacity, precisions, policy, monkeypatch):
    own = engine(miss, capacity, precisions, **policy)
    compiled = program.run._cache_size()
    run, passes = watched(own, monkeypatch)
    assert program.run._cache_size() <= compiled + 2  # a prefill and a decode step, whatever levels meet
    check_pages(own, passes)
    replays, events = own.policy.replay(run.trace)
    assert run.events_equal(events) and run.visit_s.shape == (replays.schedule.visits,)
    other = (
        Offloaded(
            own.cfg, own.params, stores("olmoe", "float32", precisions)[1], capacity=capacity, miss=miss,
            keep_logits=True, **{"eviction": "lru"} | policy,
        ).generate(made("olmoe", "float32")[3], STEPS, keep_logits=True)
    )  # fmt: skip
    np.testing.assert_array_equal(run.tokens, other.tokens)
    encoded = any((d.level[d.level > 0] < len(precisions)).any() for d in run.decisions)
    check_equal(run.logits, other.logits, encoded)  # and so are the router's at every gate
    check_equal(run.trace.logits, other.trace.logits, encoded)
    assert run.trace.meta["precisions"] == list(precisions)
    assert run.trace.meta["level_bytes"] == other.trace.meta["level_bytes"] == list(own.store.level_bytes)
    happened = {int(code) for d in run.decisions for code in np.unique(d.outcome)}
    assert happened >= {"drop": {DROPPED}, "substitute": {SUBSTITUTED}}.get(miss, {FETCHED})
    budget = int(np.sum(own.policy.budget))
    assert run.most_bytes <= budget + own.staging * own.store.expert_bytes
    size = np.array([0, *own.store.level_bytes])
    assert run.most_bytes >= max(int(size[d.level].sum()) for d in run.decisions)
    assert run.most_resident >= max(int((d.level > 0).sum()) for d in run.decisions)


def test_every_rule_but_the_hosts_has_a_case():
    assert {miss for miss, *_ in (*CASES, *SLOW)} == {name for name, rule in MISS.items() if not rule().hosts}


@pytest.mark.slow
def test_experts_with_biases(monkeypatch):
    dtype = "bfloat16"
    own = engine("cascade", "40%", ("int4", "int8", dtype), "gpt_oss", dtype, numbers={"high": 0.3, "low": 0.2})
    run, passes = watched(own, monkeypatch)
    check_pages(own, passes)
    assert run.events_equal(own.policy.replay(run.trace)[1])
    cfg, params, _, prompts, _ = made("gpt_oss", dtype)
    pinned = stores("gpt_oss", dtype, ("int4", "int8", dtype))[1]
    rule = {"eviction": "lru", "capacity": "40%", "miss": "cascade", "numbers": {"high": 0.3, "low": 0.2}}
    other = Offloaded(cfg, params, pinned, **rule).generate(prompts, STEPS, keep_logits=True)
    np.testing.assert_array_equal(run.tokens, other.tokens)
    check_equal(run.logits, other.logits, True)
    assert {int(q) for d in run.decisions for q in np.unique(d.level)} == {0, 1, 2, 3}


@pytest.mark.parametrize("more", [{"batch": 2}, {"routing": "cache_aware"}], ids=["batch", "routing"])
def test_beside_batches_and_routing_by_the_cache(more):
    own = engine("cascade", "40%", numbers={"high": 0.4, "low": 0.3}, **more)
    prompts, text = made("olmoe", "float32")[3], np.arange(2 * STEPS).reshape(2, STEPS)
    run = own.generate(prompts, STEPS, keep_logits=True)
    again = own.generate(prompts, STEPS, keep_logits=True, text=text)
    for one in (run, again):
        assert one.events_equal(own.policy.replay(one.trace)[1])
        np.testing.assert_array_equal(one.tokens, one.logits.argmax(axis=-1))
    np.testing.assert_array_equal(run.logits[0, 0], again.logits[0, 0])  # the first prompt, before any text
    itself = own.generate(prompts, STEPS, keep_logits=True, text=run.tokens)
    np.testing.assert_array_equal(itself.logits, run.logits)


def test_copies_of_few_bits_are_replaced_by_better_ones():
    own = engine("cascade", "40%", numbers={"high": 0.4, "low": 0.3})
    run = own.generate(made("olmoe", "float32")[3], STEPS)
    before, upgrades = np.zeros((3, 8), np.int8), 0
    for visit, d in enumerate(run.decisions):
        was = before[visit % 3]
        upgrades += int(((d.outcome == FETCHED) & (was > 0) & (d.row > was)).sum())
        before = d.level
    assert upgrades > 0


def test_fetch_at_several_precisions_is_fetch_at_one_bit_for_bit():
    cfg, params, _, prompts, whole = made("olmoe", "float32")
    one = Fused(
        cfg, params, stores("olmoe", "float32", ("float32",))[0], eviction="lru", capacity="4 slots", keep_logits=True
    ).generate(prompts, STEPS, keep_logits=True)
    several = engine("fetch", "4 slots").generate(prompts, STEPS, keep_logits=True)
    np.testing.assert_array_equal(several.logits, one.logits)
    np.testing.assert_array_equal(several.trace.logits, one.trace.logits)
    np.testing.assert_array_equal(several.tokens, np.concatenate([g.tokens for g in whole]))
    assert (several.most_resident, several.most_bytes) == (one.most_resident, one.most_bytes)


def test_the_lowest_bit_alone_is_the_resident_model_of_few_bits():
    cfg, params, stacks, prompts, _ = made("olmoe", "float32")
    run = engine("fetch_lowest_bit", "4 slots").generate(prompts, STEPS)
    low = quantize_store(jax.tree.map(np.asarray, stacks), "int4")
    whole = [moe.generate(cfg, params, low, prompt[None], STEPS) for prompt in prompts]
    np.testing.assert_array_equal(run.tokens, np.concatenate([g.tokens for g in whole]))
    check_equal(run.trace.logits, router_logits(whole), True)
    assert {int(q) for d in run.decisions for q in np.unique(d.level)} == {0, 1}


def test_a_text_is_read_in_place_of_the_models_own():
    _, _, _, prompts, whole = made("olmoe", "float32")
    text = np.concatenate([g.tokens for g in whole])
    resident = engine("fetch", "100%").generate(prompts, STEPS, keep_logits=True)
    own = engine("fetch_lowest_bit", "50%")
    run = own.generate(prompts, STEPS, keep_logits=True, text=text)
    assert run.events_equal(own.policy.replay(run.trace)[1])
    np.testing.assert_array_equal(run.tokens, run.logits.argmax(axis=-1))
    other = Offloaded(
        own.cfg, own.params, stores("olmoe", "float32", LEVELS)[1], eviction="lru", capacity="50%",
        miss="fetch_lowest_bit",
    ).generate(prompts, STEPS, keep_logits=True, text=text)  # fmt: skip
    check_equal(run.logits, other.logits, True)
    found = quality.compare(run, resident, text)
    np.testing.assert_allclose(found, quality.compare(other, resident, text), atol=2e-5)
    assert found.kl_nats > 0
    with pytest.raises(SpecmdError, match="expected no text in their place"):
        own.generate(prompts, STEPS, text=text, on_token=lambda *token: None)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_pool_is_one_for_all_precisions():
    several, one = engine("cascade", "50%"), engine("fetch", "50%")
    for own in (several, one):
        layout, pool = own.store.layout, own._form.pool
        live = own._begin()
        assert live.slots.shape == (pool.pages, layout.page_words) and live.slots.dtype == np.uint32
        places = own.capacity_slots + own.staging
        assert live.slots.nbytes <= places * pages.place_bytes(layout, own.store.level_bytes)
    fit = [int(several.policy.budget) // size * level.pages for size, level in
           zip(several.store.level_bytes, several.store.layout.levels, strict=True)]  # fmt: skip
    assert several._form.pool.pages >= max(fit) + several.staging * several.store.layout.most_pages
    assert one._form.pool.pages == (one.capacity_slots + one.staging) * one.store.layout.most_pages  # not a byte more


def test_pools_of_layers_and_of_more_than_everything():
    layered = engine("cascade", "2 slots/layer", scope="layer")._form.pool
    single = engine("cascade", "2 slots/layer")._form.pool
    assert layered.pages <= single.pages
    most = stores("olmoe", "float32", LEVELS)[0].layout.most_pages
    assert engine("cascade", "1GiB")._form.pool.pages == (3 * 8 + made("olmoe", "float32")[0].top_k) * most


@pytest.mark.parametrize("name", ["fused", "layerwise"])
def test_a_memory_is_divided_with_several_precisions(name):
    given = {"prompt_ids": (1, 2, 3), "steps": 4, "miss": "cascade", "precisions": ("int4", "int8", "native")}
    plan = make_plan(Completion(engine=name, memory="24MiB", **given).checked())
    cfg = plan.weights.cfg
    model = plan.weights.open(name, None, given["precisions"])
    own = model.engine(plan.setting)
    assert model.precisions == "int4+int8+float32" or model.precisions.endswith(cfg.dtype)
    room = plan.beside.bytes(plan.place_bytes) + own.capacity_slots * plan.place_bytes
    assert room <= 24 << 20 < room + plan.place_bytes or own.capacity_slots == len(cfg.moe_layers) * cfg.experts
    if name == "fused":
        plain, live = fused.beside(cfg, 3, 4), own._begin()
        held = own.capacity_slots + plain.experts - 2  # two on their way in a prefill are none of the pool
        assert live.slots.nbytes <= held * plan.place_bytes
        assert plan.beside.work_bytes == plain.work_bytes + live.cache.table.nbytes


# ---- errors, and the command line ------------------------------------------------------------------------------------


def test_why_no_kernels_serve_is_said():
    reasons = engine("cascade", "50%", kernels=True).reasons
    assert reasons["policy"] == "it has one stored precision, this has 3"
    assert reasons["experts"] == "experts at 3 precisions lie in pages, they read experts at one"
    assert set(reasons) == {"policy", "experts"}


@pytest.mark.slow
def test_dense_kernels_beside_pages():
    own = engine("cascade", "40%", numbers={"high": 0.4, "low": 0.3}, kernels=True)
    run = own.generate(made("olmoe", "float32")[3], STEPS, keep_logits=True)
    assert run.events_equal(own.policy.replay(run.trace)[1])


def test_errors_are_one_line():
    cfg, _, stacks, prompts, _ = made("olmoe", "float32")

    def stacked(*precisions, **options):
        return store.stack(cfg, stacks, precisions=precisions, **options)

    refused("'cascade' copies some experts at a lower", lambda: engine("cascade", "50%", ("float32",)))
    refused("'cpu': the fused engine runs all experts on the device", lambda: engine("cpu", "50%"))
    refused("int8, int4: expected ascending bits", lambda: stacked("int8", "int4"))
    refused("need 0.00 GiB of host memory", lambda: stacked("int4", "native", available_bytes=10))
    refused("lie in pages, expected one precision", lambda: stores("olmoe", "float32", LEVELS)[0].stack)
    refused(r"shape \[2, 5\], got \[1, 2\]", lambda: engine("fetch", "50%").generate(prompts, STEPS, text=[[1, 2]]))
    low = quantize_store(jax.tree.map(np.asarray, stacks), "int8")
    refused(
        "int4 experts cannot be encoded from int8",
        lambda: store.stack(cfg, low, precision="int8", precisions=("int4", "int8")),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"miss": "cascade"}, "--miss cascade: expected at least two --precisions"),
        ({"miss": "cpu", "engine": "fused"}, "--miss cpu: --engine fused runs no experts on the host"),
        ({"precisions": ("int4", "native"), "precision": "int8"}, "--precision and --precisions are given"),
        ({"precisions": ("int4", "native"), "hardware": "rtx4090"}, "--hardware predicts experts at one precision"),
    ],
)
def test_bad_settings_of_a_prompt(fields, message):
    with pytest.raises(SpecmdError) as caught:
        Completion(prompt_ids=(1, 2), **fields).checked()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rates_count_copies_by_their_bytes():
    own = engine("fetch_lowest_bit", "2 slots")
    run = own.generate(made("olmoe", "float32")[3], STEPS)
    rates = predict.PassRates(prefill_s=0.0, decode_s=0.0, copy_s=1.0, prefill_copy_s=1.0)
    fetched = np.array([(d.outcome == FETCHED).sum() for d in run.decisions])
    visit_s = predict.predict_passes(own.policy, run.trace, rates).visit_s
    np.testing.assert_allclose(visit_s, fetched * own.store.level_bytes[0] / own.store.expert_bytes)
    found = predict.fit_alike([run])
    again = predict.predict_passes(own.policy, run.trace, found).visit_s.sum()
    assert again == pytest.approx(run.ttft_s.sum() + (STEPS - 1) * run.tpot_s.sum(), rel=0.5)


def test_the_command_line_compares_with_the_resident_model(tmp_path, capsys):
    options = "--engine fused --smoke --miss cascade --precisions int4,int8,native --prefetches none --steps 3"
    experiments.offload.main([*options.split(), "--prompt-tokens", "4", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "engine: fused, miss rule: cascade" in told and "experts held as: int4+int8+float32" in told
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines())
    assert (row["engine"], row["miss"], row["events_equal"]) == ("fused", "cascade", "True")
    assert float(row["kl_nats"]) > 0 and float(row["perplexity"]) > 1 and float(row["copy_bytes_per_token"]) > 0


def test_a_prompt_is_completed_under_a_rule(capsys):
    options = "--engine fused --miss cascade --precisions int4,int8,native --memory 24MiB --prompt-ids 1,2,3 --steps 4"
    experiments.offload.main(options.split())
    told = capsys.readouterr().out
    assert "int4+int8+bfloat16), fused engine" in told and "miss rule cascade" in told and "events differ" not in told
