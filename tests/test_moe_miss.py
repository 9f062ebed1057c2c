"""Miss rules at run time: the simulator's events one by one, and a plain model that is told what ran in whose place."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportCallIssue=false
from __future__ import annotations

import csv
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import PROMPT, STEPS, made, quantize_store, refused, router_logits

import experiments.offload
from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict, quality
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.forward import finish
from specmd_jax.moe.runtime import store
from specmd_jax.moe.runtime.policy import stored_sizes
from specmd_jax.policies import MISS
from specmd_jax.replay.totals import DROPPED, FETCHED, HOST, SUBSTITUTED

FAMILY, DTYPE = "olmoe", "float32"
LEVELS = ("int4", "int8", "float32")


@functools.cache
def levels(precisions):
    """A store at these precisions, and all of it as stacks, one a layer, for each precision."""
    cfg, _, stacks, *_ = made(FAMILY, DTYPE)
    pinned = store.pin_stacks(cfg, stacks, precisions=precisions)
    every = [
        tuple(jax.tree.map(lambda *leaves: jnp.stack([np.asarray(leaf) for leaf in leaves]), *row) for row in level)
        for level in pinned.levels
    ]
    return pinned, every


def engine(miss, capacity, precisions=LEVELS, eviction="lru", **policy):
    cfg, params, *_ = made(FAMILY, DTYPE)
    return Offloaded(cfg, params, levels(precisions)[0], eviction=eviction, capacity=capacity, miss=miss, **policy)


@functools.partial(jax.jit, static_argnums=0)
def _told(cfg, params, every, tokens, caches, start, level, instead):
    """One pass of the model with the expert of each (layer, token, choice) at a level (0: left out) and by name."""
    net = moe.build(cfg)
    x, kept, ids_of = net.embed(params["embed"], tokens), [], []
    for index, layer in enumerate(net.layers):
        x, h, cache = layer.attend(params["layers"][index], x, caches[index], start)
        kept.append(cache)
        ids, gates, _ = layer.route(params["layers"][index], h)
        own = jnp.where(instead[index] >= 0, instead[index], ids)
        out = jnp.zeros((*ids.shape, cfg.width), jnp.float32)
        for number, stacks in enumerate(every, 1):
            lookup = moe_experts.stacked(stacks[index])
            out = moe_experts.pair_outputs(cfg, h, jnp.where(level[index] == number, own, -1), lookup, out=out)
        masked = jnp.where(level[index] > 0, own, -1)
        x = finish(x, moe_experts.combine(out, masked, gates).astype(h.dtype))
        ids_of.append(ids)
    return net.head(params["head"], x[:, -1])[0], tuple(kept), jnp.stack(ids_of)


def told(run, every):
    """Logits [R, S, V] of the plain model under a run's outcomes, fed the run's own tokens."""
    cfg, params, _, prompts, _ = made(FAMILY, DTYPE)
    layers, visit, logits = len(cfg.moe_layers), 0, []
    at = 0
    for prompt, tokens in zip(prompts, run.tokens, strict=True):
        caches, start = moe.init_cache(cfg, 1, PROMPT + STEPS - 1), 0
        for fed in [prompt, *tokens[:-1, None]]:
            n = len(fed)
            ids = run.trace.expert_ids[at : at + n].swapaxes(0, 1).astype(int)  # [L, T, K]
            level, instead = np.zeros(ids.shape, int), np.full(ids.shape, -1)
            for layer in range(layers):
                d, own = run.decisions[visit + layer], ids[layer]
                outcome, other = d.outcome[own], d.instead[own]
                level[layer] = np.where(outcome == SUBSTITUTED, d.row[other], d.row[own])
                level[layer] = np.where(outcome == DROPPED, 0, np.where(outcome == HOST, len(every), level[layer]))
                instead[layer] = np.where(outcome == SUBSTITUTED, other, -1)
            row, caches, routed = _told(
                cfg, params, every, jnp.asarray(fed, jnp.int32)[None], caches, jnp.full(1, start, jnp.int32), level,
                instead,
            )  # fmt: skip
            np.testing.assert_array_equal(routed, ids)
            logits.append(row)
            start, at, visit = start + n, at + n, visit + layers
    return np.stack(logits).reshape(*run.tokens.shape, -1)


CASES = [
    ("fetch", "4 slots", {}),
    ("fetch_lowest_bit", "4 slots", {}),
    ("fetch_priority", "50%", {"eviction": "least_stale", "prefetch": "previous"}),
    ("cascade", "40%", {"numbers": {"high": 0.4, "low": 0.3}}),
    ("drop", "30%", {"numbers": {"keep": 1}}),
    ("drop", "100%", {"numbers": {"keep": 0}, "prefetch": "previous"}),
    ("substitute", "60%", {"numbers": {"tolerance": 0.2}, "eviction": "lfu"}),
    ("cpu", "50%", {"prefetch": "previous"}),
]


@functools.cache
def case(number):
    miss, capacity, policy = CASES[number]
    own = engine(miss, capacity, **policy)
    return own, own.generate(made(FAMILY, DTYPE)[3], STEPS, keep_logits=True)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{m}-{c}" for m, c, _ in CASES])
def test_events_are_the_simulators_and_logits_those_of_a_model_told_what_ran(number):
    own, run = case(number)
    replays, events = own.policy.replay(run.trace)
    assert run.events_equal(events) and run.visit_s.shape == (replays.schedule.visits,)
    assert run.most_bytes <= own.policy.budget + own.staging * own.store.expert_bytes
    np.testing.assert_allclose(run.logits, told(run, levels(LEVELS)[1]), atol=2e-5)
    happened = {int(code) for d in run.decisions for code in np.unique(d.outcome)}
    assert happened >= {"drop": {DROPPED}, "substitute": {SUBSTITUTED}, "cpu": {HOST}}.get(CASES[number][0], {FETCHED})


def test_every_rule_has_a_case():
    assert {miss for miss, _, _ in CASES} == {name for name, rule in MISS.items() if not rule().divides}


def test_copies_of_few_bits_are_replaced_by_better_ones():
    _, run = case([miss for miss, _, _ in CASES].index("cascade"))
    before = np.zeros((3, 8), np.int8)
    upgrades = 0
    for visit, d in enumerate(run.decisions):
        was = before[visit % 3]
        upgrades += int(((d.outcome == FETCHED) & (was > 0) & (d.row > was)).sum())
        before = d.level
    assert upgrades > 0


def test_fetch_at_several_precisions_is_the_resident_model_bit_for_bit():
    *_, whole = made(FAMILY, DTYPE)
    _, run = case(0)
    np.testing.assert_array_equal(run.tokens, np.concatenate([g.tokens for g in whole]))
    one = engine("fetch", "4 slots", ("float32",)).generate(made(FAMILY, DTYPE)[3], STEPS, keep_logits=True)
    np.testing.assert_array_equal(run.logits, one.logits)


def test_the_lowest_bit_alone_is_the_resident_model_of_few_bits():
    cfg, params, _, prompts, _ = made(FAMILY, DTYPE)
    own = engine("fetch_lowest_bit", "4 slots", keep_logits=True)
    run = own.generate(prompts, STEPS)
    whole = [moe.generate(cfg, params, levels(LEVELS)[1][0], prompt[None], STEPS) for prompt in prompts]
    np.testing.assert_array_equal(run.tokens, np.concatenate([g.tokens for g in whole]))
    np.testing.assert_array_equal(run.trace.logits, router_logits(whole))  # the router's at every gate, bit for bit
    assert {int(q) for d in run.decisions for q in np.unique(d.level)} == {0, 1}
    assert own.policy.sizes.level_bytes[:, 0].tolist() == list(own.store.level_bytes)  # scales included


def test_host_experts_give_the_resident_text():
    *_, prompts, whole = made(FAMILY, DTYPE)
    _, run = case(len(CASES) - 1)
    np.testing.assert_array_equal(run.tokens, np.concatenate([g.tokens for g in whole]))
    copied, hosted = (sum(int((d.outcome == code).sum()) for d in run.decisions) for code in (FETCHED, HOST))
    assert copied > 0 and hosted > 0  # the cache fills, and only a prefetch pushes anything out
    resident = engine("fetch", "100%").generate(prompts, STEPS, keep_logits=True)
    np.testing.assert_allclose(run.logits, resident.logits, atol=2e-5)


def test_quality_is_measured_on_the_resident_text():
    _, _, _, prompts, whole = made(FAMILY, DTYPE)
    resident = engine("fetch", "100%").generate(prompts, STEPS, keep_logits=True)
    text = np.concatenate([g.tokens for g in whole])
    own = engine("fetch_lowest_bit", "50%")
    run = own.generate(prompts, STEPS, keep_logits=True, text=text)
    assert run.events_equal(own.policy.replay(run.trace)[1])
    np.testing.assert_array_equal(run.tokens, run.logits.argmax(axis=-1))
    found = quality.compare(run, resident, text)
    assert found.kl_nats > 0 and 0 <= found.changed <= 1 and found.perplexity > 1
    assert found.changed == (run.tokens != text).mean()
    itself = quality.compare(resident, resident, text)
    assert itself.changed == itself.kl_nats == 0 and itself.perplexity == itself.resident_perplexity
    best = -np.log(jax.nn.softmax(resident.logits, axis=-1).max(axis=-1)).mean()  # greedy text is the likeliest
    assert found.resident_nll_nats == pytest.approx(best, rel=1e-5)
    with pytest.raises(SpecmdError, match=r"expected the run with the logits of \[2, 5\] tokens"):
        quality.compare(engine("fetch", "100%").generate(prompts, STEPS), resident, text)


def test_predicted_copies_weigh_what_they_take_and_the_host_works_beside():
    own, run = case(1)
    rates = predict.Rates(copy_s=1.0, expert_s=0.0, expert_token_s=0.0, layer_s=0.0, head_s=0.0, entry_s=0.0)
    visit_s = predict.predict(own.policy, run.trace, rates).visit_s
    fetched = np.array([(d.outcome == FETCHED).sum() for d in run.decisions])
    np.testing.assert_allclose(visit_s, fetched * own.store.level_bytes[0] / own.store.expert_bytes)
    own, run = case(len(CASES) - 1)
    hosted, rates = np.array([(d.outcome == HOST).sum() for d in run.decisions]), rates._replace(copy_s=0.0)
    demanded = np.array([(d.outcome > 0).sum() for d in run.decisions])
    visit_s = predict.predict(own.policy, run.trace, rates._replace(host_s=1.0, expert_s=0.5)).visit_s
    np.testing.assert_allclose(visit_s, np.maximum(hosted, 0.5 * (demanded - hosted)))
    visit_s = predict.predict(own.policy, run.trace, rates._replace(host_s=1.0, host_token_s=9.0)).visit_s
    at_work = hosted[:3] > 0  # a prefill, then decoded tokens
    assert at_work.any() and (visit_s[:3] > hosted[:3])[at_work].all() and (visit_s[3:15] == hosted[3:15]).all()
    dropping, run = case(4)
    visit_s = predict.predict(dropping.policy, run.trace, rates._replace(copy_s=0.0, expert_s=1.0)).visit_s
    np.testing.assert_allclose(visit_s, [((d.outcome > 0) & (d.outcome != DROPPED)).sum() for d in run.decisions])


def test_rates_of_a_rule_are_found_again():
    own, run = case(len(CASES) - 1)
    rates = predict.Rates(1e-4, 2e-5, 0.0, 3e-4, 1e-5, 1e-5)
    told = rates._replace(host_s=5e-4, rule_s=7e-5, host_token_s=2e-4)
    guess = predict.predict(own.policy, run.trace, told)
    found = predict.fit_rule(rates, own.policy, dataclasses.replace(run, visit_s=guess.visit_s))
    # beside the device's own work, so not exactly
    np.testing.assert_allclose((found.host_s, found.rule_s, found.host_token_s), (5e-4, 7e-5, 2e-4), rtol=0.3)


def test_errors_are_one_line():
    cfg, params, stacks, prompts, _ = made(FAMILY, DTYPE)

    def pinned(*precisions, **options):
        return store.pin_stacks(cfg, stacks, precisions=precisions, **options)

    refused("'cascade' copies some experts at a lower", lambda: engine("cascade", "50%", ("float32",)))
    refused("unknown miss policy 'ftech'", lambda: engine("ftech", "50%"))
    refused("no policy here takes the number 'keep'|keep", lambda: engine("fetch", "50%", numbers={"keep": 1}))
    refused("int8, int4: expected ascending bits", lambda: pinned("int8", "int4"))
    refused("unknown precision 'int5'", lambda: pinned("int5", "native"))
    refused("need 0.00 GiB of host memory", lambda: pinned("int4", "native", available_bytes=10))
    low = quantize_store(jax.tree.map(np.asarray, stacks), "int8")
    refused(
        "int4 experts cannot be encoded from int8",
        lambda: store.pin_stacks(cfg, low, precision="int8", precisions=("int4", "int8")),
    )
    refused("expected rising numbers", lambda: stored_sizes((5, 5), 2, 4))
    refused(
        "'cpu': the fused engine runs all experts on the device",
        lambda: Fused(cfg, params, store.stack(cfg, stacks), capacity="50%", miss="cpu"),
    )
    refused(r"shape \[2, 5\], got \[1, 2\]", lambda: engine("fetch", "50%").generate(prompts, STEPS, text=[[1, 2]]))


def test_no_room_for_the_hosts_copies(monkeypatch):
    cfg, _, stacks, *_ = made(FAMILY, DTYPE)
    pinned = store.pin_stacks(cfg, stacks)
    monkeypatch.setattr(weights, "available_memory_bytes", lambda: 10)
    with pytest.raises(SpecmdError, match="copy of the experts for the host's processor needs"):
        Offloaded(cfg, made(FAMILY, DTYPE)[1], pinned, capacity="50%", miss="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--miss cascade", "--miss cascade: expected at least two --precisions, such as int4,native"),
        (
            "--miss cpu --engine fused",
            "--miss cpu: --engine fused runs no experts on the host",
        ),
        ("--miss ftech", "unknown miss policy 'ftech'; did you mean 'fetch'?"),
        ("--precisions int8,int4", "precisions int8, int4: expected ascending bits"),
        ("--miss drop --miss-numbers kep=1", "unknown policy number 'kep'; did you mean 'keep'?"),
        ("--miss-numbers keep=1", "unknown policy number 'keep'"),
    ],
)
def test_bad_settings_of_the_command_line(options, message, tmp_path):
    with pytest.raises(SpecmdError) as caught:
        experiments.offload.main(["--smoke", "--out", str(tmp_path), *options.split()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_that_is_none(capsys):
    with pytest.raises(SystemExit):
        experiments.offload.main(["--miss-numbers", "keep=x"])
    assert "--miss-numbers: keep=x: expected name=number, such as keep=1" in capsys.readouterr().err


def test_the_command_line_names_the_rule_and_what_it_costs(tmp_path, capsys):
    options = "--smoke --miss drop --miss-numbers keep=1 --prefetches none --steps 3 --prompt-tokens 4"
    experiments.offload.main([*options.split(), "--out", str(tmp_path)])
    assert "miss rule: drop, routing: standard, experts held as: float32" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines())
    assert (row["miss"], row["events_equal"]) == ("drop", "True") and float(row["dropped_share"]) > 0
    assert float(row["kl_nats"]) > 0 and float(row["perplexity"]) > 1 and float(row["copy_bytes_per_token"]) > 0
