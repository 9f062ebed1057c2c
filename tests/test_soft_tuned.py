"""The soft cache on top of a policy's own scores: its limit, its gradients, and a search that begins at the policy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmd_jax import run, tuned
from specmd_jax.engines.prepared import prepare
from specmd_jax.policies.choice import choose
from specmd_jax.soft import replay as soft
from specmd_jax.soft import search as tuning
from specmd_jax.soft.replay import Given, Knobs
from specmd_jax.soft.scores import scores_by_request
from specmd_jax.specs.hardware import hardware
from specmd_jax.trace import select_requests, synthesize
from specmd_jax.types import Trace

SIZE = 1 << 20  # bytes of an expert
MACHINE = "pcie4-x16"
MIXES = {
    "as it is": [0.0, 0, 0, 0, 0, 0, 1],
    "all of it": [0.5, 0.25, 1.0, -0.75, 0.5, 0.625, 0.5],
    "recency above all": [4.0, 0, 0, 0, 0, 0, 0.25],
}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Gradients are compared and limits are taken in float64; engines run as they always do."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", False)


def recorded(tokens: int = 24, requests: int = 1, seed: int = 0) -> Trace:
    return synthesize(
        layers=4, experts=8, top_k=2, tokens=tokens, requests=requests, seed=seed, expert_bytes=SIZE, stickiness=0.6
    )


def requests_of(trace: Trace, machine: str | None = MACHINE) -> Given:
    parts = [prepare(select_requests(trace, [r])) for r in range(trace.requests)]
    scores = scores_by_request(trace, choose("eviction", "adaptive"))
    return soft.given(parts, None if machine is None else hardware(machine), scores=scores)


def previous(trace: Trace) -> np.ndarray:
    """[V, E] what the `previous` prefetcher wants at each visit: the next layer's gate mass in its last pass."""
    schedule = prepare(trace).schedule
    ahead = np.zeros_like(schedule.mass)
    ahead[schedule.layers - 1 :] = schedule.mass[: len(ahead) - schedule.layers + 1]
    return ahead


@partial(jax.jit, static_argnames="steps")
def softly(given: Given, knobs: Knobs, temperature: float, steps: int = 60) -> dict[str, jax.Array]:
    found = soft.replay(given, knobs, temperature, steps=steps)
    return {name: jnp.sum(values) for name, values in found._asdict().items()}


def numbers_of(mix: str) -> dict[str, float]:
    names = ("recency", "frequency", "fast", "slow", "mass", "distance", "trust")
    return dict(zip(names, map(float, MIXES[mix]), strict=True))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("fetches", [False, True])
def test_the_limit_is_the_exact_engine(mix: str, fetches: bool) -> None:
    trace, slots = recorded(), 12 if fetches else 11
    exact = run(
        trace, eviction=tuned("adaptive"), capacity=slots * SIZE, hardware=MACHINE,
        prefetch="previous" if fetches else "none", **dict[str, Any](numbers_of(mix)),
    )  # fmt: skip
    given = requests_of(trace)
    jax.config.update("jax_enable_x64", True)
    knobs = Knobs(jnp.asarray(MIXES[mix], jnp.float64), jnp.asarray(float(slots * SIZE)))
    if fetches:
        knobs = knobs._replace(threshold=jnp.asarray(1e-6), want=jnp.asarray(previous(trace), jnp.float64)[..., None])
    found = softly(given, knobs, 1e-11)
    assert float(found["misses"]) == pytest.approx(exact.misses, abs=1e-6)
    assert float(found["late"]) == pytest.approx(exact.hits_late, abs=1e-6)
    assert float(found["stall_s"]) == pytest.approx(exact.stall_s, rel=1e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_gradients_are_those_of_finite_differences(mix: str, scope: str) -> None:
    """Of the stall by every weight, that of the policy's scores included, and of the budgets; in float64."""
    given = requests_of(recorded(14, requests=2))
    jax.config.update("jax_enable_x64", True)
    sums = 11.3 * SIZE if scope == "global" else np.array([3.3, 2.6, 4.2, 2.7]) * SIZE

    @jax.jit
    def cost(weights: jax.Array, budget: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def stall(weights: jax.Array, budget: jax.Array) -> jax.Array:
            return 3000 * jnp.sum(soft.replay(given, Knobs(weights, budget * SIZE), 0.2, steps=40, window=7).stall_s)

        return jax.value_and_grad(stall, argnums=(0, 1))(weights, budget)

    values = [jnp.asarray(MIXES[mix], jnp.float64), jnp.asarray(sums / SIZE, jnp.float64)]
    slopes = cost(*values)[1]
    rng = np.random.default_rng(1)
    for i, value in enumerate(values):
        assert bool(jnp.any(slopes[i] != 0))
        for _ in range(3):
            step = jnp.asarray(rng.normal(size=value.shape)) * 1e-6
            ends = [cost(*values[:i], value + sign * step, *values[i + 1 :])[0] for sign in (1, -1)]
            expected = float(ends[0] - ends[1]) / 2
            assert float(jnp.sum(slopes[i] * step)) == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_scores_go_on_over_requests_where_the_policy_carries_them() -> None:
    trace = recorded(20, requests=3)
    whole = scores_by_request(trace, choose("eviction", "adaptive"))
    last = scores_by_request(select_requests(trace, [2]), choose("eviction", "adaptive"))
    assert [len(rows) for rows in whole] == [80, 80, 80]
    assert (whole[2] != last[0]).any()
    np.testing.assert_array_equal(
        scores_by_request(trace, choose("eviction", "online"))[2],
        scores_by_request(select_requests(trace, [2]), choose("eviction", "online"))[0],
    )


SEARCH = tuning.Search(steps=6, batch=2, rounds=3, population=2)


def search(folder: Path, tuned_: str = "weights", settings: tuning.Search = SEARCH) -> tuning.Found:
    trace = recorded(16, requests=4)
    parts = [prepare(select_requests(trace, [r])) for r in range(4)]
    scores = scores_by_request(trace, choose("eviction", "adaptive"))
    batches = [soft.given(parts[:2], scores=scores[:2]), soft.given(parts[1:3], scores=scores[1:3])]
    held = soft.given(parts[3:], scores=scores[3:])
    said: list[str] = []
    found = tuning.tune(batches, held, 12.0 * SIZE, "gradient", tuned_, settings, folder, said.append)
    assert said[0].startswith(("as it is: validation misses", "goes on after"))
    return found


def test_a_search_begins_at_the_policy_and_keeps_it_where_nothing_is_better(tmp_path: Path) -> None:
    found = search(tmp_path / "found")
    assert found.weights["trust"] == 1 and set(found.weights) >= {"recency", "distance", "fast_decay"}
    again = search(tmp_path / "found")
    assert (again.weights, again.history) == (found.weights, found.history)
    wild: Any = SEARCH.__class__(steps=2, batch=2, rounds=1, population=2, learning_rate=50.0)
    kept = search(tmp_path / "wild", settings=wild)
    assert kept.validation < kept.history[0]
    assert [kept.weights[name] for name in tuning.AS_IT_IS._fields] == [0] * 6


def test_the_exact_stall_falls_along_the_soft_gradient() -> None:
    """From a mix that ranks by recency alone, on routing that recency says little about; exact ends, not soft ones."""
    trace = recorded(40, requests=4, seed=2)
    given, budget = requests_of(trace), 12.0 * SIZE
    begin = jnp.array([2.0, 0, 0, 0, 0, 0, 0.25])

    def cost(weights: jax.Array) -> jax.Array:
        return jnp.sum(soft.replay(given, Knobs(weights, jnp.asarray(budget)), 0.1).stall_s)

    slope = np.asarray(jax.jit(jax.grad(cost))(begin)).copy()
    slope[-1] = 0  # trust stays
    step = slope / np.linalg.norm(slope)
    stalls = []
    for size in (-1.5, 0.0, 1.5):
        weights = np.round((np.asarray(begin) + size * step) * 1024) / 1024
        names = ("recency", "frequency", "fast", "slow", "mass", "distance", "trust")
        numbers: dict[str, Any] = dict(zip(names, map(float, weights), strict=True))
        found = run(trace, eviction=tuned("adaptive"), capacity=12 * SIZE, hardware=MACHINE, reset_per_request=True,
                    **numbers)  # fmt: skip
        stalls.append(found.stall_s)
    assert stalls[0] < 0.99 * stalls[1] < 0.99 * stalls[2]
