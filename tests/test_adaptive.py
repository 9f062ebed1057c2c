"""The policies that adapt to a model: event for event as the reference, over resets, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
from parity import compare, small_trace

from specmd_jax.policies.choice import Mix


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_adaptive_equals_the_reference(scope: str, reset: bool) -> None:
    numbers = {"eviction": {"fade": 0.8, "rate": 1.0}, "prefetch": {"rate": 0.9}, "selection": {"count": 2.0}}
    budget = 420_000 if scope == "global" else np.array([130_000, 80_000, 125_000, 95_000])
    mix = Mix.of("adaptive", "adaptive", numbers=numbers)
    compare(small_trace(2, tokens=30), mix, budget, horizon=3, schedule={"reset_per_request": reset})
