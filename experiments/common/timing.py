"""Wall-clock times of calls: medians of some repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def median_s(call: Callable[[], Any], repeats: int, unmeasured: int = 1) -> float:
    """Gives the median seconds of a call with its work done, after some ``unmeasured`` ones (the first compiles)."""
    for _ in range(unmeasured):
        jax.block_until_ready(call())
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def issue_s(call: Callable[[], Any], repeats: int = 20) -> float:
    """Gives the median seconds of the host until a call returns, its work not waited for."""
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = call()
        took.append(time.perf_counter() - began)
        jax.block_until_ready(out)
    return statistics.median(took)
