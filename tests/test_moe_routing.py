"""Routing by the cache in running models: the simulator's events, and a plain model that is told what to use."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportCallIssue=false
from __future__ import annotations

import csv
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import PROMPT, STEPS, made

import experiments.offload
from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import quality
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.forward import finish
from specmd_jax.moe.model.routing import ROUTERS, weigh
from specmd_jax.moe.runtime import store
from specmd_jax.policies.base import Routing
from specmd_jax.policies.routing import cache_aware
from specmd_jax.replay.routing import choose
from specmd_jax.replay.totals import DROPPED, FETCHED, HOST, SUBSTITUTED
from specmd_jax.trace import synthesize

ENGINES = {"layerwise": Offloaded, "fused": Fused}
STRENGTH = 0.5


@functools.cache
def held(name, family, precisions=("float32",)):
    cfg, _, stacks, *_ = made(family, "float32")
    return store.stack(cfg, stacks) if name == "fused" else store.pin_stacks(cfg, stacks, precisions=precisions)


def engine(name, family="olmoe", capacity="40%", precisions=("float32",), **options):
    """An engine that routes by the cache, unless it is told something else."""
    cfg, params, *_ = made(family, "float32")
    options = {"eviction": "lru", "routing": "cache_aware", "capacity": capacity, **options}
    if options["routing"] == "cache_aware":
        options = {"strength": STRENGTH, **options}
    return ENGINES[name](cfg, params, held(name, family, precisions), **options)


def hit_rate(run):
    outcome = np.stack([d.outcome for d in run.decisions])
    return ((outcome > 0) & (outcome < FETCHED)).sum() / (outcome > 0).sum()


def passes(run):
    """(first token, tokens) of each pass, in the trace's order."""
    fed = [n for prompt in run.trace.prompt_lengths for n in (int(prompt), *[1] * (run.tokens.shape[1] - 1))]
    return list(zip(np.cumsum([0, *fed]), fed, strict=False))


def rerouted(run, cfg, strength=STRENGTH):
    """The experts that each token uses, [N, L, K], in plain numpy from the recorded logits and what was resident."""
    logits, layers = run.trace.logits, len(cfg.moe_layers)
    ids = np.zeros_like(run.trace.expert_ids, np.int32)
    total, seen, level, visit = np.zeros(layers, np.float32), 0, np.zeros((layers, cfg.experts), np.int8), 0
    for at, n in passes(run):
        seen += n
        for layer in range(layers):
            rows = logits[at : at + n, layer]
            for z in rows:
                total[layer] += z.max() - z.min()
            average = total[layer] / np.float32(seen)
            for place, z in enumerate(rows, at):
                moved = z + np.float32(strength) * average * (level[layer] > 0)
                chosen = np.sort(np.argsort(-moved, kind="stable")[: cfg.top_k])
                ids[place, layer] = chosen[np.argsort(-z[chosen], kind="stable")]
            level, visit = run.decisions[visit].level, visit + 1
    return ids


@functools.partial(jax.jit, static_argnums=0)
def _told(cfg, params, stacks, tokens, caches, start, ids):
    """One pass of the all-resident model with the experts ids [L, T, K]: also what its router would have chosen."""
    net, rows = moe.build(cfg), iter(range(len(cfg.moe_layers)))
    x, kept, own = net.embed(params["embed"], tokens), [], []
    for index, layer in enumerate(net.layers):
        weights = params["layers"][index]
        x, h, cache = layer.attend(weights, x, caches[index], start)
        kept.append(cache)
        if layer.route is None:
            x = finish(x, layer.mlp(weights, h))
            continue
        row = next(rows)
        chosen, _, logits = layer.route(weights, h)
        own.append(chosen)
        y = net.experts(h, ids[row], weigh(cfg, logits, ids[row]), moe_experts.stacked(stacks[row]))
        x = finish(x, y) if layer.shared is None else finish(x, y, layer.shared(weights, h))
    return net.head(params["head"], x[:, -1])[0], tuple(kept), jnp.stack(own)


def told(run, family, ids):
    """Logits [R, S, V] of the plain model that uses the experts ids [N, L, K], fed the run's own tokens."""
    cfg, params, stacks, prompts, _ = made(family, "float32")
    fed = [part for prompt, row in zip(prompts, run.tokens, strict=True) for part in (prompt, *row[:-1, None])]
    logits, caches, start = [], None, 0
    for (at, n), tokens in zip(passes(run), fed, strict=True):
        if n > 1:  # a prompt
            caches, start = moe.init_cache(cfg, 1, PROMPT + STEPS - 1), 0
        given = jnp.asarray(tokens, jnp.int32)[None], caches, jnp.full(1, start, jnp.int32)
        row, caches, own = _told(cfg, params, stacks, *given, ids[at : at + n].swapaxes(0, 1))
        np.testing.assert_array_equal(own, run.trace.expert_ids[at : at + n].swapaxes(0, 1))
        logits.append(row)
        start += n
    return np.stack(logits).reshape(*run.tokens.shape, -1)


def check_rerouted(own, run, family):
    """The simulator's events, the router's own choice in the trace, the demand that was chosen."""
    cfg = made(family, "float32")[0]
    replays, events = own.policy.replay(run.trace)
    assert run.events_equal(events)
    logits = run.trace.logits.reshape(-1, cfg.experts)
    ids, gates = ROUTERS[cfg.router](cfg, jnp.asarray(logits))
    np.testing.assert_array_equal(run.trace.expert_ids.reshape(ids.shape), ids)
    np.testing.assert_allclose(run.trace.gates.reshape(gates.shape), gates, rtol=1e-5)
    outcome = np.stack([d.outcome for d in run.decisions])
    np.testing.assert_array_equal(replays.schedule.count > 0, outcome > 0)
    np.testing.assert_array_equal(
        replays.schedule.clock, np.cumsum((outcome > 0).sum(axis=1) + 1) - (outcome > 0).sum(axis=1) - 1
    )
    np.testing.assert_allclose(replays.schedule.mass.sum(axis=1), replays.schedule.tokens, rtol=1e-5)


slow = pytest.mark.slow
CASES = [
    ("olmoe", "40%", {}),
    pytest.param("olmoe", "1 slots", {"eviction": "least_stale"}, marks=slow),
    pytest.param("olmoe", "50%", {"eviction": "score", "prefetch": "gate_ahead"}, marks=slow),
    pytest.param("olmoe", "60%", {"eviction": "lfu_decay", "prefetch": "previous", "scope": "layer"}, marks=slow),
    pytest.param("mixtral", "4 slots", {"eviction": "slru", "prefetch": "transition", "horizon": 2}, marks=slow),
    pytest.param("gpt_oss", "50%", {"eviction": "weighted", "numbers": {"mass": 1.0}}, marks=slow),
    pytest.param("qwen2_moe", "40%", {"eviction": "lfu"}, marks=slow),
]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("family", "capacity", "policy"), CASES)
def test_events_are_the_simulators_and_logits_those_of_a_model_told_what_to_use(name, family, capacity, policy):
    cfg, *_, prompts, _ = made(family, "float32")
    own = engine(name, family, capacity, **policy)
    run = own.generate(prompts, STEPS, keep_logits=True)
    check_rerouted(own, run, family)
    ids = rerouted(run, cfg)
    np.testing.assert_allclose(run.logits, told(run, family, ids), atol=2e-5)
    changed = (np.sort(ids) != np.sort(run.trace.expert_ids)).any(axis=(1, 2))
    second = slice(PROMPT + STEPS - 1, 2 * PROMPT + STEPS - 1)
    assert changed[second].any() and changed[second.stop :].any()  # a prompt's tokens, and decoded ones
    assert "prefetch" in policy or not changed[:PROMPT].any()  # an empty cache has no say


@pytest.mark.parametrize("name", ENGINES)
def test_a_strength_of_nothing_is_standard_routing(name):
    *_, prompts, whole = made("olmoe", "float32")
    plain = engine(name, routing="standard").generate(prompts, STEPS, keep_logits=True)
    run = engine(name, strength=0.0).generate(prompts, STEPS, keep_logits=True)
    np.testing.assert_array_equal(run.tokens, np.concatenate([g.tokens for g in whole]))
    np.testing.assert_array_equal(run.logits, plain.logits)
    for mine, theirs in zip(run.decisions, plain.decisions, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ENGINES)
def test_with_everything_resident_any_strength_is_standard_routing(name):
    cfg, params, stacks, *_ = made("olmoe", "float32")
    prompt = np.random.default_rng(3).integers(0, cfg.vocabulary, 40)
    own = engine(name, capacity="100%", strength=3.0)
    run = own.generate([prompt], STEPS)
    assert (run.decisions[2].level > 0).all()  # behind the prompt
    np.testing.assert_array_equal(run.tokens, moe.generate(cfg, params, stacks, prompt[None], STEPS).tokens)
    assert run.events_equal(own.policy.replay(run.trace)[1])


@pytest.mark.parametrize("name", ENGINES)
def test_hits_rise_with_the_strength(name):
    prompts = made("olmoe", "float32")[3]
    runs = [engine(name, strength=strength).generate(prompts, STEPS) for strength in (0.0, 0.2, 0.8)]
    rates = [hit_rate(run) for run in runs]
    assert all(a < b for a, b in itertools.pairwise(rates)), rates


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("miss", "happens", "options"),
    [
        pytest.param("drop", DROPPED, {"numbers": {"keep": 1}}, marks=slow),
        ("substitute", SUBSTITUTED, {"numbers": {"tolerance": 0.4}, "strength": 0.1}),
    ],
)
def test_miss_rules_see_what_was_chosen(name, miss, happens, options):
    own = engine(name, miss=miss, **options)
    run = own.generate(made("olmoe", "float32")[3], STEPS)
    check_rerouted(own, run, "olmoe")
    outcome = np.stack([d.outcome for d in run.decisions])
    assert (outcome == happens).any()
    replays, _ = own.policy.replay(run.trace)
    lost = quality.lost_share(run, replays.schedule.mass, np.arange(len(run.decisions)))
    assert lost[miss == "substitute"] == pytest.approx(
        replays.schedule.mass[outcome == happens].sum() / replays.schedule.mass.sum()
    )


@pytest.mark.slow
@pytest.mark.parametrize("miss", ["cascade", "fetch_priority", "fetch_lowest_bit", "cpu"])
def test_the_layerwise_engine_has_the_other_rules_too(miss):
    precisions = ("float32",) if miss == "cpu" else ("int4", "int8", "float32")
    own = engine("layerwise", precisions=precisions, miss=miss, prefetch="previous")
    run = own.generate(made("olmoe", "float32")[3], STEPS)
    check_rerouted(own, run, "olmoe")
    outcome, levels = (np.stack([getattr(d, name) for d in run.decisions]) for name in ("outcome", "row"))
    assert (outcome == HOST).any() if miss == "cpu" else len(np.unique(levels)) > 1


def test_both_engines_make_the_same():
    runs = [engine(name, eviction="lfu").generate(made("olmoe", "float32")[3], STEPS) for name in ENGINES]
    np.testing.assert_array_equal(*(run.tokens for run in runs))
    np.testing.assert_array_equal(*(np.stack([d.outcome for d in run.decisions]) for run in runs))


def synthetic(**options):
    cfg = made("olmoe", "float32")[0]
    return synthesize(
        layers=len(cfg.moe_layers), experts=cfg.experts, top_k=cfg.top_k, tokens=PROMPT + STEPS - 1, requests=2,
        prompt_tokens=PROMPT, with_ahead=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_replayed_routing_is_what_the_policy_starts_from(name):
    cfg, *_, prompts, _ = made("olmoe", "float32")
    trace, own = synthetic(with_logits=True), engine(name, capacity="50%", prefetch="gate_ahead")
    run = own.generate(prompts, STEPS, replay=trace, keep_logits=True)
    for column in ("expert_ids", "gates", "ahead", "logits"):
        np.testing.assert_array_equal(getattr(run.trace, column), getattr(trace, column))
    assert run.events_equal(own.policy.replay(trace)[1])
    assert (np.sort(rerouted(run, cfg)) != np.sort(trace.expert_ids)).any()
    with pytest.raises(SpecmdError, match="needs the router's full logits, and the trace has none"):
        own.generate(prompts, STEPS, replay=synthetic())


@pytest.mark.parametrize("name", ENGINES)
def test_a_policy_of_ones_own(name):
    def stubborn(bonus: float = 30.0) -> Routing:
        """Whatever is resident."""
        return Routing(lambda layers: (), lambda state, layer, logits, resident: (state, logits + bonus * resident))

    top_k = made("olmoe", "float32")[0].top_k
    own = engine(name, routing=stubborn, capacity="60%")
    run = own.generate(made("olmoe", "float32")[3], STEPS)
    assert run.events_equal(own.policy.replay(run.trace)[1])
    outcome, level = (np.stack([getattr(d, name) for d in run.decisions]) for name in ("outcome", "level"))
    there = [(level[v - 1, v % 3] > 0).sum() for v in range(1, len(level))]  # in the layer, before the visit
    enough = np.array(there) >= top_k
    assert enough.any() and not (outcome[1:] == FETCHED)[enough].any()


def test_padding_is_nobodys_choice():
    rng = np.random.default_rng(0)
    logits, resident = rng.normal(size=(5, 8)).astype(np.float32), jnp.arange(8) < 3
    policy = cache_aware(0.5)
    padded = np.concatenate([logits, np.full((3, 8), np.nan, np.float32)])
    for rows in (logits, logits[:1]):
        memory, chosen = choose(policy, policy.init(2), jnp.int32(1), jnp.asarray(rows), resident, 2)
        for behind in (1, 3):
            more = np.concatenate([rows, padded[5 : 5 + behind]])
            other, longer = choose(policy, policy.init(2), jnp.int32(1), jnp.asarray(more), resident, 2)
            for a, b in zip((*memory, *chosen), (*other, *(leaf[: len(rows)] for leaf in longer)), strict=True):
                np.testing.assert_array_equal(a, b)
            assert (longer.ids[len(rows) :] == -1).all() and (longer.gates[len(rows) :] == 0).all()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", ["phimoe", "deepseek_v2"])
def test_routers_that_choose_by_other_rules_are_refused(name, family):
    with pytest.raises(SpecmdError, match=r"its router '\w+' does not choose the K largest logits") as caught:
        ENGINES[name](moe.tiny(family), {}, dataclasses.replace(held(name, "olmoe")), routing="cache_aware")
    assert "\n" not in str(caught.value)


def test_the_command_line_names_the_routing_and_what_it_costs(tmp_path, capsys):
    options = (
        "--smoke --routing cache_aware --routing-numbers strength=0.6 --prefetches none --steps 3 --prompt-tokens 4"
    )
    experiments.offload.main([*options.split(), "--out", str(tmp_path)])
    assert "routing: cache_aware" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines())
    assert (row["routing"], row["events_equal"]) == ("cache_aware", "True") and float(row["dropped_share"]) == 0
    assert float(row["kl_nats"]) > 0 and float(row["perplexity"]) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--routing cache-awere", "unknown routing policy 'cache-awere'; did you mean 'cache_aware'?"),
        ("--routing-numbers strength=0.5", "unknown policy number 'strength'"),
        ("--routing cache_aware --routing-numbers strength=-1", "strength is -1.0, expected of at least 0"),
        ("--routing cache_aware --model Phi-3.5-MoE", "its router 'sparsemixer' does not choose the K largest logits"),
    ],
)
def test_bad_settings_of_the_command_line(options, message, tmp_path):
    with pytest.raises(SpecmdError) as caught:
        experiments.offload.main(["--smoke", "--out", str(tmp_path), *options.split()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


# the last of the file: what follows would be compiled without optimizations, too
@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("olmoe", {"eviction": "score", "prefetch": "gate_ahead"}),
        pytest.param("gpt_oss", {}, marks=slow),
        pytest.param("olmoe", {"miss": "drop", "numbers": {"keep": 1}}, marks=slow),
    ],
)
def test_kernels_run_the_same(family, policy):
    prompts = made(family, "float32")[3]
    own = engine("fused", family, kernels=True, **policy)
    assert list(own.reasons) == (["policy"] if "miss" in policy else [])  # routing keeps no part from its kernel
    run, plain = (one.generate(prompts, STEPS) for one in (own, engine("fused", family, **policy)))
    check_rerouted(own, run, family)
    np.testing.assert_array_equal(run.tokens, plain.tokens)
    np.testing.assert_array_equal(*(np.stack([d.outcome for d in one.decisions]) for one in (run, plain)))
