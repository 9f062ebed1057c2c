"""Predictors moved along the gradient of a soft cache: they begin as they are stored, and that gradient is right."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import run_until

from experiments import train
from experiments.common.train import read_card
from specmd_jax.errors import SpecmdError
from specmd_jax.learn import through_cache as work
from specmd_jax.learn.examples import batch, examples
from specmd_jax.learn.predictor import PLACES
from specmd_jax.learn.settings import CacheSettings, Settings
from specmd_jax.learn.training import fit
from specmd_jax.policies.choice import choose
from specmd_jax.policies.trained import HEADS, ONE, Weights, flatten, load, scores
from specmd_jax.policies.use_history import blank, visited
from specmd_jax.soft.scores import scores_by_request
from specmd_jax.specs.hardware import Hardware, hardware
from specmd_jax.trace import save_trace, synthesize
from specmd_jax.types import Trace

SIZE = 1 << 20
TRACE = synthesize(layers=3, experts=8, top_k=2, tokens=24, requests=6, seed=1, expert_bytes=SIZE, stickiness=0.6)
BUDGET = np.full(3, 3 * SIZE)
SETTINGS = CacheSettings("request", updates=6, rounds=3, batch=2, tokens=8, learning_rate=0.02, count=2)
MACHINE = hardware("pcie4-x16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    folder = tmp_path_factory.mktemp("trained")
    small = Settings("evictor", "request", epochs=2, batch=16, hidden=8, width=4, topics=4, engine="jax")
    return {head: fit(TRACE, replace(small, head=head), folder / head, lambda line: None).weights for head in HEADS}


def moved(
    weights: dict[str, Weights], folder: Path, machine: Hardware | None = MACHINE, settings: CacheSettings = SETTINGS,
    report: Any = lambda line: None, trace: Trace = TRACE,
) -> work.Tuned:  # fmt: skip
    return work.tune(trace, weights, np.full(trace.layers, 3 * SIZE), machine, settings, folder, report)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(3, 8), (4, 6)])
def test_logits_are_the_stored_scores(trained: dict[str, Weights], head: str, shape: tuple[int, int]) -> None:
    """Of a model of the weights' shape, and of another, through the part that serves all."""
    layers, experts = shape
    trace = synthesize(layers=layers, experts=experts, top_k=2, tokens=12, requests=2, seed=3)
    weights = {head: trained[head]}
    found = examples(trace, np.arange(2))
    seen = batch(found, found.demand.astype(np.float32), np.arange(24), head)
    params, still = work._params(trained[head], trace), work.frozen(weights, trace)[head]
    logits = np.rint(np.asarray(work.logits(PLACES[head], params, still, seen)) * ONE)
    memory = blank(layers, experts)
    for token in range(12):
        for layer in range(layers):
            if head == "prefetcher":
                told = scores(trained[head], memory, jnp.array([layer], jnp.int32))[0]
                np.testing.assert_array_equal(logits[token, layer], told)
            ids, gates = trace.expert_ids[token, layer].astype(int), trace.gates
            demand, mass = np.zeros(experts, bool), np.zeros(experts, np.float32)
            demand[ids] = True
            mass[ids] = 0.5 if gates is None else gates[token, layer]
            memory = visited(memory, jnp.int32(layer), jnp.asarray(demand), jnp.asarray(mass))
            if head == "evictor":
                told = scores(trained[head], memory, jnp.array([layer], jnp.int32))[0]
                np.testing.assert_array_equal(logits[token, layer], told)
    restored = work._stored(trained[head], params, trace, "here")
    again = work._params(restored, trace)
    assert all((again[name] == params[name]).all() for name in params)


def test_gradients_are_those_of_finite_differences(
    trained: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stall with prefetching, by every moved weight of both heads, in float64 and without rounding."""
    monkeypatch.setattr(work, "rounded", lambda weight, most: weight)
    monkeypatch.setattr(work, "FINEST", 1e-300)
    monkeypatch.setattr(work, "STEPS", 40)
    windows = work.cut_up(TRACE, np.arange(3), 8)
    some, seen = work._given(windows, np.array([0, 4]), HEADS, MACHINE, 8)
    params = {head: work._params(each, TRACE) for head, each in trained.items()}
    measure = partial(work._cost, work._Static(HEADS, 2), work.frozen(trained, TRACE))
    jax.config.update("jax_enable_x64", True)
    try:
        # noise, as experts that were never used tie, and a tie of wants is a kink
        noise = np.random.default_rng(1)
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64) / 8 + noise.normal(size=x.shape)), params)
        budget = jnp.asarray(np.array([3.3, 2.7, 3.6]) * SIZE)
        cost = jax.jit(lambda params: measure(params, some, seen, budget, jnp.float64(0.4)))
        slopes, rng = jax.jit(jax.grad(cost))(params), np.random.default_rng(0)
        for head in HEADS:
            for name in params[head]:
                step = jnp.asarray(rng.normal(size=params[head][name].shape)) * 1e-5

                def at(sign: int, head: str = head, name: str = name, step: jax.Array = step) -> float:
                    return float(cost({**params, head: {**params[head], name: params[head][name] + sign * step}}))

                expected = (at(1) - at(-1)) / 2
                found = float(jnp.sum(slopes[head][name] * step))
                assert expected != 0 or not jnp.any(slopes[head][name])
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-14), (head, name)
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(("heads", "machine"), [(("evictor",), None), (HEADS, MACHINE)])
def test_what_is_kept_validates_best_and_plays_alike(
    trained: dict[str, Weights], heads: tuple[str, ...], machine: Hardware | None, tmp_path: Path
) -> None:
    weights = {head: trained[head] for head in heads}
    found = moved(weights, tmp_path / "run", machine)
    assert len(found.history) == 4 and found.history[found.chosen] == min(found.history)
    for head, each in found.weights.items():
        changed = {name for name, array in flatten(each).items() if (array != flatten(trained[head])[name]).any()}
        assert changed <= {"tied/free/out", "tied/free/bias", "tied/bias", "tied/wave/out", "tied/topic/out"}
        assert not found.chosen or changed - {"tied/free/bias", "tied/bias"}
    assert set(found.weights) == set(heads)
    if len(heads) > 1:
        alone = work.tune(TRACE, weights, BUDGET, machine, SETTINGS, tmp_path / "alone", print, moves=("evictor",))
        assert set(alone.weights) == {"evictor"} and alone.history[0] == found.history[0] != alone.history[1]
    still = moved(weights, tmp_path / "still", machine, replace(SETTINGS, updates=1, rounds=1, learning_rate=1e3))
    assert still.chosen == 0
    np.testing.assert_array_equal(
        flatten(still.weights["evictor"])["tied/wave/out"], flatten(trained["evictor"])["tied/wave/out"]
    )


def test_the_gradient_lowers_the_misses_that_it_is_of(trained: dict[str, Weights], tmp_path: Path) -> None:
    """Windows of one request that repeats itself: what is right there can be learned in some updates."""
    ids = np.tile(TRACE.expert_ids[:12], (12, 1, 1))
    again = replace(
        TRACE, expert_ids=ids, gates=None, logits=None, ahead=None, meta={},
        lengths=np.full(6, 24, np.int32), prompt_lengths=np.zeros(6, np.int32),
    )  # fmt: skip
    settings = replace(SETTINGS, updates=60, batch=4, tokens=24, learning_rate=0.03)
    found = moved({"evictor": trained["evictor"]}, tmp_path, None, settings, trace=again)
    assert found.history[found.chosen] < 0.97 * found.history[0]


def test_a_killed_run_goes_on_bit_for_bit(trained: dict[str, Weights], tmp_path: Path) -> None:
    whole = moved(trained, tmp_path / "whole")
    arrays: dict[str, Any] = {f"{h}:{name}": array for h in HEADS for name, array in flatten(trained[h]).items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    script = (
        "import numpy as np\n"
        "from test_through_cache import HEADS, moved\n"
        "from specmd_jax.policies.trained import unflatten\n"
        f"arrays = np.load({str(tmp_path / 'weights.npz')!r})\n"
        "of = lambda head: {n.split(':')[1]: arrays[n] for n in arrays if n.startswith(head)}\n"
        f"moved({{h: unflatten(of(h), h) for h in HEADS}}, Path({str(tmp_path / 'cut')!r}), report=report)\n"
    )
    run_until("update 4", script)
    said: list[str] = []
    resumed = moved(trained, tmp_path / "cut", report=said.append)
    assert said[0] == "goes on after update 4 of 6" and len(said) == 2
    assert resumed.history == whole.history
    for head in HEADS:
        for name, array in flatten(whole.weights[head]).items():
            np.testing.assert_array_equal(array, flatten(resumed.weights[head])[name], name)


def test_scores_of_moved_weights_are_read_as_any(trained: dict[str, Weights], tmp_path: Path) -> None:
    from specmd_jax.learn.training import export

    found = moved({"evictor": trained["evictor"]}, tmp_path / "run", None)
    export(tmp_path / "evictor.npz", found.weights["evictor"], "evictor", {})
    told = scores_by_request(TRACE, choose("eviction", "learned", {"checkpoint": str(tmp_path / "evictor.npz")}))
    assert [rows.shape for rows in told] == [(72, 8)] * 6


def test_what_makes_no_sense_is_named(trained: dict[str, Weights], tmp_path: Path) -> None:
    for change, message in (
        ({"updates": 0}, "updates is 0"),
        ({"cold": 0.0}, r"cold is 0\.0"),
        ({"split": "letter"}, "unit of a split"),
    ):
        with pytest.raises(SpecmdError, match=message):
            moved(trained, tmp_path, settings=replace(SETTINGS, **change))
    with pytest.raises(SpecmdError, match="expected the evictor among them"):
        moved({"prefetcher": trained["prefetcher"]}, tmp_path)
    with pytest.raises(SpecmdError, match="expected hardware"):
        moved(trained, tmp_path, None)
    assert not (tmp_path / "settings.json").exists()


def test_one_command_moves_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(TRACE, tmp_path / "mine.npz")
    given = ["--smoke", "--trace", str(tmp_path / "mine.npz"), "--split", "request", "--out"]
    train.main([*given, str(tmp_path / "first")])
    moving = [*given, str(tmp_path / "out"), "--begin", str(tmp_path / "first"), "--hardware", "pcie4-x16"]
    train.main(moving)
    assert "update 2 of 2: validation" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["through_cache"]
    assert manifest["heads"] == ["evictor", "prefetcher"] and len(manifest["history"]) == 3
    for head in HEADS:
        load(head, str(tmp_path / "out" / f"{head}.npz"))
        card = read_card(tmp_path / "out" / f"{head}.npz")
        assert card["through_cache"]["capacity"] == "25%"
        assert card["request"] == read_card(tmp_path / "first" / f"{head}.npz")["request"]
    with pytest.raises(SpecmdError, match="already exists"):
        train.main(moving)
    with pytest.raises(SpecmdError, match=r"learned from request '.*', which this run holds out"):
        train.main([*given, str(tmp_path / "other"), "--begin", str(tmp_path / "first"), "--heads", "evictor",
                    "--seed", "3"])  # fmt: skip
    with pytest.raises(SpecmdError, match="expected --hardware, or --heads evictor alone"):
        train.main([*given, str(tmp_path / "other"), "--begin", "package"])
    with pytest.raises(SpecmdError, match=r"checkpoint nowhere/evictor\.npz"):
        train.main([*given, str(tmp_path / "other"), "--begin", "nowhere", "--heads", "evictor"])
    assert not (tmp_path / "other" / "manifest.json").exists()
