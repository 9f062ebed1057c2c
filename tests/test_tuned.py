"""A policy's scores and features weighed together: event for event as the reference, and the policy itself at first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from parity import LINK, compare, engine, small_trace

from specmd_jax import run, tuned
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.evaluation import hits_by_request
from specmd_jax.policies.choice import Choice, Mix, choose

WEIGHTS = {
    "trust": 0.37, "recency": -1.3, "frequency": 0.4, "fast": 0.9, "slow": -0.7, "mass": 2.2, "distance": 0.6,
    "fast_decay": 0.6, "slow_decay": 0.9,
}  # fmt: skip


def compared(name: str, numbers: dict[str, Any], schedule: dict[str, Any], **options: Any) -> None:
    mix = Mix.of(tuned(name), "previous", numbers={"eviction": numbers, "selection": {"count": 2.0}})
    compare(small_trace(2, tokens=14), mix, 420_000, hardware=LINK, horizon=2, schedule=schedule, **options)


@pytest.mark.parametrize(
    ("name", "numbers"), [("adaptive", {"fade": 0.8, "rate": 1.0}), ("learned", {}), ("online", {"rate": 0.2})]
)
def test_it_equals_the_reference(name: str, numbers: dict[str, Any]) -> None:
    """With prefetching, whose arrivals stay, and over a reset, which only what was learned outlasts."""
    compared(name, WEIGHTS | numbers, {"reset_per_request": True})


@pytest.mark.parametrize("inner", [choose("eviction", "adaptive", {"rate": 0.5}), choose("eviction", "learned")])
def test_it_begins_as_the_policy_itself(inner: Choice) -> None:
    """Every event of a replay with prefetching, and the hits of the curves."""
    replays = prepare(small_trace(3, tokens=14), reset_per_request=True)
    found = []
    for eviction in (inner, tuned(inner)):
        mix = Mix.of(eviction, "previous", numbers={"selection": {"count": 2.0}})
        found.append(engine(replays, mix, 300_000, LINK, horizon=2)[1])
    np.testing.assert_array_equal(found[0].outcome, found[1].outcome)
    np.testing.assert_array_equal(found[0].level, found[1].level)
    np.testing.assert_array_equal(found[0].seconds, found[1].seconds)
    moved = engine(replays, Mix.of(tuned(inner), numbers={"eviction": {"recency": 4.0}}), 300_000, LINK)[1]
    assert (moved.level != engine(replays, Mix.of(inner), 300_000, LINK)[1].level).any()


def test_curves_and_the_scan_agree() -> None:
    trace, budget = small_trace(5, tokens=14, expert_bytes=40960), [4 * 3 * 40960]
    hits = hits_by_request(trace, tuned("adaptive"), budget, WEIGHTS)
    by_scan = run(
        trace, eviction=tuned("adaptive"), capacity=budget[0], hardware=None, reset_per_request=True, engine="scan",
        **WEIGHTS,
    )  # fmt: skip
    assert by_scan.hits == hits.sum()
    plain = hits_by_request(trace, "adaptive", budget)
    np.testing.assert_array_equal(hits_by_request(trace, tuned("adaptive"), budget), plain)


def test_what_cannot_be_weighed_is_named() -> None:
    with pytest.raises(SpecmdError, match="eviction 'lru' declares no scorer"):
        tuned("lru")
    with pytest.raises(SpecmdError, match=r"eviction 'tuned\(adaptive\)': trust is 2.0, expected 0 up to 1"):
        run(small_trace(0), eviction=tuned("adaptive"), capacity="50%", hardware=None, trust=2.0)
    with pytest.raises(SpecmdError, match="declares no scorer"):
        tuned(tuned("adaptive"))

    def clashes(mass: float = 0.0) -> Any:
        del mass
        return choose("eviction", "online").build()

    with pytest.raises(SpecmdError, match="the policy has a setting 'mass'"):
        tuned(clashes)
