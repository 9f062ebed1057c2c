"""Calibration: parts are timed by the engine's own path, and rates give the times that they were made of."""

# pyright: reportArgumentType=false
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from configs.calibrate import CalibrateConfig
from experiments.calibration import passes, rates, visits
from experiments.calibration.loops import Loop
from experiments.calibration.subject import Subject, few_layers, make_subject, model_config
from specmd_jax import moe, run
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.measure import predict
from specmd_jax.moe.model.experts import combine, pair_outputs, stacked
from specmd_jax.moe.runtime.policy import make_policy
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.calibrate import FORMAT, HARDWARE, RATES, draw, point
from specmd_jax.report.rows import number
from specmd_jax.specs.hardware import HardwareNotes, save_hardware
from specmd_jax.trace import synthesize

CONFIG = dataclasses.replace(
    CalibrateConfig().smoke(), tokens=(4,), prompt=4, visits=3, prompt_visits=3, loop_repeats=1, repeats=1, steps=3
)
LOOP_S, EXPERT_S, MISSING_S, FIRST_S = 4e-6, 5e-6, 250e-6, 2e-6
DENSE_S, POLICY_S, HEAD_S, LAUNCH_S, MANY_S = 60e-6, 9e-6, 80e-6, 3e-6, 5e-5


def subject(kernels: bool) -> Subject:
    whole = model_config("tiny")
    return make_subject("tiny", whole, few_layers(whole, 2), "30%", kernels)


def made_points(cfg: Any, config: CalibrateConfig) -> list[Row]:
    """Points of an engine whose parts take the seconds above."""
    top_k, rows = cfg.top_k, []

    def add(what: str, amount: int, seconds: float, loop_s: float = LOOP_S) -> None:
        rows.append(point(what, amount, "kernels", seconds + loop_s))

    for count in (1, 9):
        add("launch", count, count * LAUNCH_S)
    for count in range(1, top_k + 1):
        add("resident", count, 1e-6 + count * EXPERT_S)
        add("visit", count, FIRST_S + count * MISSING_S)
    add("visit", 0, 1e-6 + top_k * EXPERT_S)
    for tokens, dense_s, policy_s in ((1, DENSE_S, POLICY_S), (config.prompt, 4e-4, 2e-5)):
        add("dense", tokens, dense_s)
        add("policy", tokens, policy_s)
    add("head", 1, HEAD_S)
    for tokens in config.tokens:
        add("many resident", tokens, MANY_S)
        add("many missing", tokens, MANY_S + rates.demanded(cfg, tokens) * 2e-4)
        add("host", tokens, tokens * 1e-4, 0.0)
    add("host", 1, 1e-3, 0.0)
    return rows


def test_points_give_the_rates_that_they_are_made_of() -> None:
    own = subject(kernels=False)
    points = rates.points_of(made_points(own.cfg, CONFIG), CONFIG.prompt)
    wanted = (LOOP_S, LAUNCH_S, 1e-6 + 3 * EXPERT_S, MISSING_S, FIRST_S, EXPERT_S, DENSE_S, POLICY_S, HEAD_S)
    np.testing.assert_allclose(points[:9], wanted, rtol=1e-6)
    found = rates.pass_rates(points, 16, rates.prompt_demand(own, CONFIG))
    layer_s = LOOP_S + DENSE_S + POLICY_S + 1e-6 + 3 * EXPERT_S
    prompt_layer_s = LOOP_S + 4e-4 + 2e-5 + MANY_S
    hidden_s = 1e-6 + 3 * EXPERT_S - FIRST_S
    wanted = (16 * prompt_layer_s + HEAD_S, 16 * layer_s + HEAD_S, MISSING_S, 2e-4, hidden_s, 0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("capacity", ["100%", "30%"])
def test_the_simulator_with_the_hardware_file_takes_what_the_parts_take(capacity: str) -> None:
    """Everything on the device: exactly. Where visits miss: nearly, as the contract has no time of a visit's own."""
    own = subject(kernels=False)
    own = own._replace(whole=own.cfg)
    points = made_points(own.cfg, CONFIG)
    parts = rates.points_of(points, CONFIG.prompt)
    derived = rates.pass_rates(parts, own.layers, rates.prompt_demand(own, CONFIG))
    machine = rates.hardware_of(own, CONFIG, points)
    dense, head = rates.dense_bytes(own.cfg)
    size = moe.expert_bytes(own.cfg)
    trace = synthesize(
        layers=own.layers, experts=own.cfg.experts, top_k=own.cfg.top_k, tokens=40, requests=2, prompt_tokens=4,
        stickiness=0.8, expert_bytes=size,
    )  # fmt: skip
    trace = dataclasses.replace(trace, meta={"model": "mine", "weights_bits": 32, "dense_bytes": [dense, dense + head]})
    policy = make_policy(own.cfg, size, eviction="lru", capacity=capacity)
    guess = predict.predict_passes(policy, trace, derived, 1)
    found = run(trace, eviction="lru", capacity=capacity, hardware=machine, warmup_tokens=40)
    assert found.tpot_s is not None and guess.tpot_s > derived.decode_s - 1e-9
    assert abs(found.tpot_s / guess.tpot_s - 1) < (1e-5 if capacity == "100%" else 0.04)


def test_what_does_not_rise_is_bounded_by_its_largest_amount() -> None:
    rows = [point("resident", amount, "xla", seconds) for amount, seconds in ((1, 4e-6), (2, 3e-6), (4, 2e-6))]
    assert rates.line(rows, "resident") == (0.0, 0.5e-6)
    assert rates.line(rows[:1], "resident") == (0.0, 4e-6)


def test_a_loop_takes_its_steps_in_turn_and_counts_them() -> None:
    def step(given: Any, state: Any, place: Any) -> Any:
        seen, at = state
        return seen.at[at % 6].set(place.layer * 10 + place.slot[1] + given), at + 1

    loop = Loop(step, (jnp.zeros(6, jnp.int32), jnp.int32(0)), 6, layers=2, experts=5)
    assert loop.seconds(jnp.int32(100), 1) > 0
    # layers in turn, each with slots of its own, other ones in each round: expert 1's is the 1st, 9th and 17th of five
    np.testing.assert_array_equal(loop.state[0], [101, 116, 104, 119, 102, 117])
    assert (
        int(loop.state[1]) == 3 * loop.steps == 3 * 4 * 6
    )  # two rows of programs that are not counted, and one that is
    program: Any = loop._program
    assert program._cache_size() == 1


@pytest.mark.parametrize("kernels", [False, True])
def test_parts_are_timed_by_the_engines_path(kernels: bool) -> None:
    own = subject(kernels)
    rows = [*passes.passes(own, CONFIG), *visits.visits(own, CONFIG)]
    assert all(number(row, "seconds") > 0 for row in rows)
    paths = {(row["what"], row["amount"]): row["path"] for row in rows}
    path = "kernels" if kernels else "xla"
    assert paths.pop(("dense", CONFIG.prompt)) == "xla"  # the kernels take one token
    assert set(paths.values()) == {path}
    amounts = {what: [amount for one, amount in paths if one == what] for what, _ in paths}
    assert amounts["visit"] == [0, 1, 2, 3] and amounts["resident"] == [3, 2, 1]
    counted = {**passes.kernels_of_pass(own, CONFIG), "experts": visits.kernels_of_visit(own)}
    assert counted == ({"dense": 5, "policy": 1, "experts": 2} if kernels else {"dense": 0, "policy": 0, "experts": 0})


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_visit_that_is_timed_does_its_work(kernels: bool, tokens: int) -> None:
    """Missing experts are copied into their slots, those of the layer alone, and the sum is the model's."""
    own = subject(kernels)
    cfg = own.cfg
    ids = np.arange(tokens * cfg.top_k).reshape(tokens, cfg.top_k) % cfg.experts
    chosen = np.unique(ids)
    given = visits.reads(own, own.host, ids)._replace(missing=visits.mask(own, chosen))
    empty = jax.tree.map(jnp.zeros_like, own.slots())
    loop = visits.visit_loop(own, empty, tokens, 1)
    loop.seconds(given, 1)
    slots, y = loop.state
    for got, wanted in zip(jax.tree.leaves(slots), jax.tree.leaves(own.store.stack), strict=True):
        np.testing.assert_array_equal(got[chosen], np.asarray(wanted)[chosen])
        assert not np.asarray(got[cfg.experts : 2 * cfg.experts]).any()  # a program of one step visits the first layer
    layer = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[: cfg.experts]), own.store.stack)
    out = pair_outputs(cfg, given.h, given.ids, stacked(layer))
    np.testing.assert_allclose(y, combine(out, given.ids, given.gates), atol=1e-5)


def test_loops_lower_for_a_gpu() -> None:
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    own = subject(kernels=True)
    own = own._replace(kernels=own.kernels._replace(interpret=False))
    host, ids = jax.tree.map(jnp.asarray, own.store.stack), np.arange(4 * own.cfg.top_k).reshape(4, -1) % 8
    one, many = (visits.visit_loop(own, own.slots(), tokens, 2) for tokens in (1, 4))
    cases = {
        "nothing": (passes._launches(own, 3, 2), None),
        "policy": passes._policy(own, 1, 2),
        "expert_down": (one, visits.reads(own, host, ids[:1])),
        "experts_down": (many, visits.reads(own, host, ids)),
        "attention": (passes._dense(own, CONFIG, 1, 2), passes._layers(own)),
        "project": (passes._head(own, 2), own.params),
    }
    with jax.sharding.use_abstract_mesh(gpu):
        for name, (loop, given) in cases.items():
            text = loop._program.trace(given, loop.state).lower(lowering_platforms=("cuda",)).as_text()
            assert name in text and "while" in text, name


def test_a_prompt_that_is_not_measured_is_refused() -> None:
    with pytest.raises(SpecmdError, match="prompt is 64, expected one of the tokens 16, 32"):
        dataclasses.replace(CalibrateConfig(), tokens=(16, 32)).checked()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"rates\.json: no such file"),
        ("{", r"rates\.json: .*, expected JSON"),
        (json.dumps({"format": FORMAT, "layers": 2}), r"rates\.json: cannot read rates: 'all_layers'"),
        (json.dumps({"format": "another"}), r'rates\.json: expected a file with "format": "specmd-jax calibration 1"'),
    ],
)
def test_a_damaged_file_of_rates_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    own = subject(kernels=False)
    machine = rates.hardware_of(own, CONFIG, made_points(own.cfg, CONFIG))
    save_hardware(machine, tmp_path / HARDWARE, HardwareNotes("a test", rates.EVIDENCE))
    if text is not None:
        (tmp_path / RATES).write_text(text)
    with pytest.raises(SpecmdError, match=message):
        draw(tmp_path)
