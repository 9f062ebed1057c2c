"""The differentiable cache: its limit is the exact engine, its gradients are those of finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import run_until

from specmd_jax import run
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.features import Features
from specmd_jax.replay.metrics import Metrics
from specmd_jax.soft import replay as soft
from specmd_jax.soft import search as tuning
from specmd_jax.soft.replay import Expected, Given, Knobs
from specmd_jax.soft.top_c import kept
from specmd_jax.specs.hardware import hardware
from specmd_jax.trace import select_requests, synthesize
from specmd_jax.types import Schedule, Trace

WEIGHTS = np.round(np.array([0.5, 0.3, 1.0, 0.7, 0.4, 0.6]) * 1024) / 1024
NUMBERS = dict(zip(Features._fields, WEIGHTS, strict=True))
SIZE = 1 << 20  # bytes of an expert
STRICT = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Gradients are compared and limits are taken in float64."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def recorded(tokens: int = 30, requests: int = 2, prompt: int = 0, seed: int = 0) -> Trace:
    return synthesize(
        layers=4, experts=8, top_k=2, tokens=tokens, requests=requests, prompt_tokens=prompt, seed=seed,
        expert_bytes=SIZE,
    )  # fmt: skip


def sums(found: Expected) -> dict[str, float]:
    return {name: float(jnp.sum(values)) for name, values in found._asdict().items()}


Values = list[jax.Array]


def used_before(schedule: Schedule) -> np.ndarray:
    """[V, E] what the `previous` prefetcher wants at each visit: the next layer's gate mass in its last pass."""
    ahead = np.zeros_like(schedule.mass)
    ahead[schedule.layers - 1 :] = schedule.mass[: len(ahead) - schedule.layers + 1]
    return ahead


def budget_of(slots: Any) -> Any:
    return np.asarray(slots) * SIZE if np.ndim(slots) else slots * SIZE


def exactly(trace: Trace, slots: Any, machine: str = "pcie4-x16", **options: Any) -> Metrics:
    scope = "layer" if np.ndim(slots) else "global"
    jax.config.update("jax_enable_x64", False)  # as the engine always runs
    try:
        return run(
            trace, eviction="weighted", capacity=budget_of(slots), scope=scope, hardware=machine, **NUMBERS, **options
        )
    finally:
        jax.config.update("jax_enable_x64", True)


@jax.jit
def softly(given: Given, knobs: Knobs, temperature: float) -> Expected:
    """Compiled once for each shape."""
    return soft.replay(given, knobs, temperature, steps=60)


def knobs_of(slots: Any, trace: Trace | None = None) -> Knobs:
    """With a trace, also the scores of `previous`."""
    budget, weights = jnp.asarray(np.asarray(slots) * float(SIZE)), jnp.asarray(WEIGHTS)
    if trace is None:
        return Knobs(weights, budget)
    want = jnp.asarray(used_before(prepare(trace).schedule), jnp.float64)[..., None]
    return Knobs(weights, budget, jnp.asarray(1e-6), want)


@STRICT
@pytest.mark.parametrize("slots", [[11, 5], [[3, 2, 4, 3], [2, 2, 1, 3]]], ids=["global", "layer"])
def test_the_limit_is_the_exact_engine(slots: Any) -> None:
    """The prompt asks for more than most pools hold; a quota of one expert is smaller than any demand."""
    trace = recorded(prompt=3)
    given = soft.given([prepare(trace)], hardware("pcie4-x16"))
    decoded = soft.given([prepare(trace, phase="decode")], hardware("pcie4-x16"))
    for each in slots:
        exact, found = exactly(trace, each), sums(softly(given, knobs_of(each), 1e-11))
        assert found["misses"] == pytest.approx(exact.misses, abs=1e-6)
        # a demand that no pool holds is copied in another order, so only the others' seconds are the same
        exact, found = exactly(trace, each, phase="decode"), sums(softly(decoded, knobs_of(each), 1e-11))
        assert found["misses"] == pytest.approx(exact.misses, abs=1e-6)
        assert found["stall_s"] == pytest.approx(exact.stall_s, rel=1e-6)


@STRICT
def test_the_limit_of_prefetching_is_the_exact_engine() -> None:
    """Copies in flight, late ones and those that time or room leave out, with the scores of `previous`."""
    trace, slots = recorded(), 12
    for machine in ("pcie4-x16", "h200-pcie5", "h200-pcie5:overlaps=0.25:sync_s=1e-5"):
        exact = exactly(trace, slots, machine, prefetch="previous")
        given = soft.given([prepare(trace)], hardware(machine))
        found = sums(softly(given, knobs_of(slots, trace), 1e-11))
        assert found["misses"] == pytest.approx(exact.misses, abs=1e-6)
        assert found["late"] == pytest.approx(exact.hits_late, abs=1e-6)
        assert found["misses"] + found["prefetched"] == pytest.approx(exact.loads, abs=1e-6)
        assert found["stall_s"] == pytest.approx(exact.stall_s, rel=1e-6)


@STRICT
@pytest.mark.parametrize(("slots", "fetches"), [(11.3, False), (11.3, True), ([5.5, 3.2, 4.0, 7.0], False)])
def test_the_budget_holds_and_nothing_comes_without_a_copy(slots: Any, fetches: bool) -> None:
    trace = recorded(prompt=0 if fetches else 3)
    given = soft.given([prepare(trace)], hardware("pcie4-x16"))
    knobs = knobs_of(slots, trace if fetches else None)
    for temperature in (1.0, 0.1, 1e-3):
        found = softly(given, knobs, temperature)
        occupancy, loads = np.asarray(found.occupancy_bytes), np.cumsum(found.misses + found.prefetched, axis=0) * SIZE
        assert (occupancy <= np.sum(slots) * SIZE * (1 + 1e-9)).all()
        assert (occupancy <= loads * (1 + 1e-9)).all()
        assert (np.asarray(found.misses) <= np.asarray(given.demand.sum(axis=1)) + 1e-12).all()
        if not fetches and not np.ndim(slots):  # a full pool stays full
            assert occupancy[-1] == pytest.approx(slots * SIZE, rel=1e-6)


def batch(machine: str | None = "pcie4-x16", tokens: int = 16) -> Given:
    trace = recorded(tokens)
    parts = [prepare(select_requests(trace, [r])) for r in range(2)]
    return soft.given(parts, None if machine is None else hardware(machine))


@STRICT
@pytest.mark.parametrize(("scope", "fetches"), [("global", True), ("layer", False)])
def test_gradients_are_those_of_finite_differences(scope: str, fetches: bool) -> None:
    """Of the weights, the layers' shares or the whole budget, the threshold, and the predictor behind the scores."""
    given = batch()
    noise = jnp.asarray(np.random.default_rng(0).normal(size=given.demand.shape))
    seen = jnp.roll(given.demand, 1, axis=0).astype(noise.dtype)

    def cost(values: Values) -> jax.Array:
        # not a whole number of slots: there a budget has a kink, as the cache just fills up
        weights, logits, threshold, predictor = values
        budget = soft.quotas(logits, 19.7 * SIZE) if scope == "layer" else 11.3 * SIZE + SIZE * jnp.sum(logits)
        want = predictor[None, :1] * seen + noise * predictor[None, 1:]
        knobs = Knobs(weights, budget, threshold if fetches else None, want if fetches else None)
        found = soft.replay(given, knobs, 0.2, steps=40, window=7)
        return jnp.sum(found.misses) + 3000 * jnp.sum(found.stall_s)

    both = jax.jit(jax.value_and_grad(cost))
    experts = jnp.ones((given.demand.shape[1] + 1, 1))  # one factor for what was seen, one for each expert's noise
    values = [jnp.asarray(WEIGHTS), jnp.array([0.0, 0.1, -0.1, 0.05]), jnp.asarray(0.5), experts]
    slopes = both(values)[1]
    rng = np.random.default_rng(1)
    for i, value in enumerate(values):
        for _ in range(3):
            step = jnp.asarray(rng.normal(size=value.shape)) * 1e-6
            ends = [both([*values[:i], value + sign * step, *values[i + 1 :]])[0] for sign in (1, -1)]
            slope = float(jnp.sum(slopes[i] * step))
            assert slope == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-4, abs=1e-10), i
        assert bool(jnp.any(slopes[i] != 0)) == (i < 2 or fetches)


def test_the_soft_top_keeps_what_fits() -> None:
    rng = np.random.default_rng(0)
    score, amount = (jnp.asarray(rng.random((5, 4, 2))) for _ in range(2))
    total = jnp.sum(amount, 0, keepdims=True)
    room = jnp.asarray([0.0, 0.4, 1.0, 1.5]).reshape(1, 4, 1) * total

    @jax.jit
    def kept_of(amount: jax.Array, temperature: float) -> jax.Array:
        return kept(score, amount, room, jnp.asarray(temperature), (0,), 40)

    for temperature in (1e-6, 1e-2, 10.0):
        share = np.asarray(kept_of(amount, temperature))
        np.testing.assert_allclose((share * amount).sum(0, keepdims=True), np.minimum(room, total), 1e-6, 1e-12)
        assert (share >= 0).all() and (share[:, 2:] == 1).all()
    slope = jax.jit(jax.grad(lambda amount: jnp.sum(kept_of(amount, 0.1) ** 2)))(amount)
    assert bool(jnp.all(jnp.isfinite(slope))) and bool(jnp.any(slope != 0))


def test_padding_and_windows_change_nothing() -> None:
    parts = [prepare(select_requests(recorded(9), [0])), prepare(select_requests(recorded(7, seed=3), [1]))]
    budget, weights = jnp.asarray([3.3, 2.5, 4.0, 2.0]) * SIZE, jnp.asarray(WEIGHTS)

    @partial(jax.jit, static_argnames="truncate")
    def cost(given: Given, weights: jax.Array, truncate: bool) -> Any:
        def misses(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = soft.replay(given, Knobs(weights, budget), 0.1, window=4, truncate=truncate).misses
            return jnp.sum(found), found

        return jax.value_and_grad(misses, has_aux=True)(weights)

    given = soft.given(parts)
    (_, found), whole = cost(given, weights, False)
    (_, same), cut = cost(given, weights, True)
    alone = jax.jit(lambda given: soft.replay(given, Knobs(weights, budget), 0.1).misses)(soft.given(parts[1:]))
    np.testing.assert_allclose(found[: len(alone), 1], alone[:, 0], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found, same)
    assert not np.asarray(found)[len(alone) :, 1].any()
    assert bool(jnp.any(cut != 0)) and not np.allclose(cut, whole)


def test_whole_quotas() -> None:
    sizes = np.array([10, 10, 20])
    assert soft.whole_quotas([24.0, 33.0, 43.0], sizes, 8).tolist() == [30, 30, 40]
    assert soft.whole_quotas([1e6, 0, 0], sizes, 3).tolist() == [30, 30, 60]  # a layer has three experts
    with pytest.raises(SpecmdError, match="at least one expert of every layer"):
        soft.whole_quotas([10.0, 10, 10], sizes, 8)
    with pytest.raises(SpecmdError, match="expected one for each of 3 layers"):
        soft.whole_quotas([10.0], sizes, 8)


def test_bad_input_is_named() -> None:
    given, weights = batch(None), jnp.asarray(WEIGHTS)
    whole = jnp.asarray(1e7)
    for knobs, message in (
        (Knobs(weights[:3], whole), "weights of shape"),
        (Knobs(weights, jnp.ones(3)), "a number or one a layer"),
        (Knobs(weights, whole, None, given.demand), "want-scores need a threshold, and hardware"),
    ):
        with pytest.raises(SpecmdError, match=message):
            soft.replay(given, knobs, 0.1)
    with pytest.raises(SpecmdError, match=r"temperature is 0\.0"):
        soft.replay(given, Knobs(weights, whole), 0.0)
    trace = recorded(6)
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"contract": "sequential"}, "expected 'event'"),
        ({"reset_per_request": True}, "resets"),
        ({"precisions": (4.0, 16.0)}, "2 stored precisions"),
    )
    for options, message in refused:
        with pytest.raises(SpecmdError, match=message):
            soft.given([prepare(trace, **options)])
    with pytest.raises(SpecmdError, match="no requests"):
        soft.given([])


SEARCH = tuning.Search(steps=6, batch=2, rounds=3, population=2)


def search(
    method: str, folder: Path, report: Any = lambda line: None, settings: tuning.Search = SEARCH
) -> tuning.Found:
    jax.config.update("jax_enable_x64", False)
    trace = recorded(16, requests=4)
    parts = [prepare(select_requests(trace, [r])) for r in range(4)]
    batches = [soft.given(parts[:2]), soft.given(parts[1:3])]
    return tuning.tune(batches, soft.given(parts[3:]), 12.0 * SIZE, method, "both", settings, folder, report)


@pytest.mark.parametrize("method", tuning.METHODS)
def test_searches_keep_the_total_and_their_price(method: str, tmp_path: Path) -> None:
    found = search(method, tmp_path)
    assert found.budget_bytes.sum() == 12 * SIZE and (found.budget_bytes % SIZE == 0).all()
    assert found.validation == min(found.history) and len(found.history) == 3
    assert found.replays == 6 * 2 * 3 if method == "gradient" else 9 * 2 * 2
    numbers: dict[str, Any] = dict(found.weights)
    metrics = run(
        recorded(6), eviction="weighted", capacity=found.budget_bytes, scope="layer", hardware=None, **numbers
    )
    assert metrics.misses > 0
    again = search(method, tmp_path)
    assert again.history == found.history and again.weights == found.weights


def test_a_killed_search_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = search("gradient", tmp_path / "whole")
    script = f"from test_soft import search\nsearch('gradient', Path({str(tmp_path / 'cut')!r}), report)\n"
    run_until("update 4", script)
    said: list[str] = []
    resumed = search("gradient", tmp_path / "cut", said.append)
    assert said[0] == "goes on after update 4 of 6" and len(said) == 2
    assert resumed.history == whole.history and resumed.weights == whole.weights
    np.testing.assert_array_equal(resumed.loose_bytes, whole.loose_bytes)


def test_bad_settings_of_a_search_are_named(tmp_path: Path) -> None:
    for change, message in (
        ({"population": 3}, "even"),
        ({"steps": 0}, "steps is 0"),
        ({"hot": 0.0}, "hot is 0.0"),
        ({"slow_decay": 1.0}, "slow_decay is 1.0"),
    ):
        with pytest.raises(SpecmdError, match=message):
            search("gradient", tmp_path / "run", settings=replace(SEARCH, **change))
    with pytest.raises(SpecmdError, match="did you mean 'gradient'"):
        search("gradiant", tmp_path / "run")
    assert not (tmp_path / "run").exists()
