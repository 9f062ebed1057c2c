"""Hits of libCacheSim's caches on the accesses of our own replays, for policies that no table of keep-scores can hold.

Its caches take one access after the other, so everything here is of the sequential contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module, util
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.engines.prepared import prepare
from specmd_jax.schedule.demand import pack
from specmd_jax.specs.capacity import Budget
from specmd_jax.trace import select_requests
from specmd_jax.types import Trace

SMALLEST = 3
"""Slots below which some of its caches refuse to work."""

_SIZE = 100  # of an object: its queues take whole shares of the cache's bytes

RIVALS: dict[str, Callable[[Any, int], Any]] = {
    # at its default, a tenth of the cache, the small queue of S3-FIFO would hold no object at all below ten
    "S3-FIFO": lambda lib, slots: lib.S3FIFO(slots * _SIZE, hashpower=12, small_size_ratio=max(0.1, 1.01 / slots)),
    "ARC": lambda lib, slots: lib.ARC(slots * _SIZE, hashpower=12),
    "SIEVE": lambda lib, slots: lib.Sieve(slots * _SIZE, hashpower=12),
    "2Q": lambda lib, slots: lib.TwoQ(slots * _SIZE, hashpower=12, a_in_size_ratio=max(0.25, 1.01 / slots)),
    "LeCaR": lambda lib, slots: lib.LeCaR(slots * _SIZE, hashpower=12),
    "LRU": lambda lib, slots: lib.LRU(slots * _SIZE, hashpower=12),  # both sides have it: a check
}


def installed() -> bool:
    """Whether libCacheSim's Python package is there."""
    return util.find_spec("libcachesim") is not None


def rival_hits_by_request(trace: Trace, rival: str, budgets: Sequence[Budget]) -> npt.NDArray[np.int64]:
    """Gives [B, R] hits of a row of `RIVALS`, its caches fresh for every request; budgets in bytes, of one pool or [L].

    All experts must be of one size. A pool of fewer than `SMALLEST` slots is not replayed: -1.
    """
    library, size = import_module("libcachesim"), int(trace.expert_bytes[0])
    assert (trace.expert_bytes == size).all()
    request = library.Request()
    request.obj_size = _SIZE
    found = np.zeros((len(budgets), trace.requests), np.int64)
    for r in range(trace.requests):
        demand = pack(prepare(select_requests(trace, [r]), contract="sequential").schedule)
        for b, budget in enumerate(budgets):
            slots = np.atleast_1d(np.asarray(budget, np.int64) // size)
            if slots.min() < SMALLEST:
                found[b, r] = -1
                continue
            caches = [RIVALS[rival](library, int(count)) for count in slots]
            of = (demand.layer if len(caches) > 1 else np.zeros_like(demand.layer)).tolist()
            for pool, flat in zip(of, demand.flat.tolist(), strict=True):
                request.obj_id = flat
                found[b, r] += bool(caches[pool].get(request))
    return found
