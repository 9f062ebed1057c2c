"""The engine equals the reference where its programs are compiled as users' are, with XLA's optimizations: every entry
of the policy tables, every contract, both scopes, precisions and host memory.

The other tests compile quickly (`conftest.py`) and cross what these take one by one.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import pytest
from parity import LINK, OPTIMIZED, compare, small_trace

from specmd_jax.policies import EVICTION, MISS, PREFETCH, SELECTION
from specmd_jax.policies.choice import AXES, Mix
from specmd_jax.replay.state import Tier

SSD = LINK.replace(storage_bytes_per_s=0.71e9, storage_latency_s=2.3e-5)
QUOTAS = np.array([130_000, 80_000, 125_000, 95_000])


class Cell(NamedTuple):
    eviction: str
    prefetch: str
    selection: str
    miss: str
    routing: str
    admission: str
    host_eviction: str
    quotas: bool


def dealt() -> list[Cell]:
    """As many cells as the longest table has entries; each axis goes round its own."""
    hosts = [name for name in AXES["host_eviction"].table if name != "none"]
    tables = EVICTION, PREFETCH, SELECTION, MISS, AXES["routing"].table, AXES["admission"].table, hosts
    rounds = [cycle(table) for table in (*tables, (False, False, True))]
    next(rounds[2])  # two axes of two entries would go in step
    found: list[Any] = [[next(each) for each in rounds] for _ in EVICTION]
    return [Cell(*values) for values in found]


CELLS = dealt()


def test_every_entry_has_a_cell() -> None:
    for axis in ("eviction", "prefetch", "selection", "miss", "routing", "admission"):
        assert {getattr(cell, axis) for cell in CELLS} == set(AXES[axis].table)


@pytest.mark.parametrize("number", range(len(CELLS)))
def test_optimized(number: int) -> None:
    cell = CELLS[number]
    miss = MISS[cell.miss]()
    routing = "standard" if EVICTION[cell.eviction]().oracle else cell.routing  # which would change what it knows
    numbers: dict[str, Any] = {"selection": {"count": 3.0} if cell.selection == "topk" else {"percentile": 60.0}}
    tiered = number % 3 == 0 and not miss.hosts
    mix = Mix.of(
        cell.eviction, cell.prefetch, cell.selection, miss=cell.miss, routing=routing, admission=cell.admission,
        host_eviction=cell.host_eviction if tiered else "none", numbers=numbers,
    )  # fmt: skip
    tier = {"tier": Tier(exclusive=number % 2 == 0), "host_budget": 600_000} if tiered else {}
    levels = (4.0, 8.0, 16.0) if miss.least_levels > 1 else None
    logits = routing == "cache_aware" or miss.needs_logits
    contracts = ("event",) if logits else ("event", "sequential", "sequential-id")
    found = compare(
        small_trace(number, tokens=30, top_k=3, with_logits=logits),
        mix,
        (QUOTAS if cell.quotas else 390_000) // (4 if levels else 1),
        hardware=SSD if tiered else LINK,
        precisions=levels,
        schedule={"contract": contracts[number // 2 % len(contracts)]},
        horizon=1 if cell.prefetch == "gate_ahead" else 2,
        program=OPTIMIZED,
        **tier,
    )
    assert found.outcome.any() and found.evictions.sum() > 0
