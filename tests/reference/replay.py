"""The whole replay: policies by name, then visit after visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.types import NEVER, Schedule

from .admission import ADMISSION
from .cache import Cache
from .events import Replay
from .eviction import EVICTION, ORACLES
from .miss import MISS
from .prefetch import PREFETCH
from .routing import ROUTING
from .selection import SELECTION
from .start import Counts, by_count, fill, keep_for_good
from .step import Memory, UnderWay
from .tiers import HostTier
from .timing import Costs
from .tuned import TUNED


def lookup(table: Mapping[str, Any], kind: str, name: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r} (known: {', '.join(table)})")
    return table[name]


def replay(
    schedule: Schedule,
    *,
    eviction: str,
    numbers: Mapping[str, Any] | None = None,
    budget: int | Sequence[int],
    level_bytes: Sequence[Sequence[int]],
    oversize: str = "stream",
    prefetch: str = "none",
    prefetch_numbers: Mapping[str, Any] | None = None,
    selection: str = "topk",
    select_numbers: Mapping[str, Any] | None = None,
    horizon: int = 1,
    may_evict: bool = True,
    miss: str = "fetch",
    miss_numbers: Mapping[str, Any] | None = None,
    routing: str = "standard",
    routing_numbers: Mapping[str, Any] | None = None,
    admission: str = "always",
    admission_numbers: Mapping[str, Any] | None = None,
    warm_start: Counts | None = None,
    pins: tuple[float, Counts] | None = None,
    costs: Costs | None = None,
    draft_s: float = 0.0,
    first_use: npt.NDArray[Any] | None = None,
    future: npt.NDArray[Any] | None = None,
    host_budget: int | Sequence[int] | None = None,
    host_eviction: str = "lru",
    host_numbers: Mapping[str, Any] | None = None,
    host_hears: str = "misses",
    inclusion: str = "inclusive",
    prefetch_to: str = "device",
) -> Replay:
    """Replays a schedule through one cache, or one on the device and one in host memory.

    Args:
        numbers: the eviction policy's own; the other axes have theirs beside their name.
        budget: bytes of the only pool, or of each layer's pool.
        level_bytes: [Q][L] bytes of an expert at each stored precision, ascending.
        horizon: layers ahead, 1..L.
        warm_start: counts [L][E] of a profile; None: the cache begins empty.
        pins: the share of each pool that is kept for good, and the counts of its profile.
        costs: None makes everything take no time and puts no time limit on prefetch.
        draft_s: seconds of drafting before each decode pass.
        first_use: [L, E] first visit that demands each expert, read by `belady` for experts prefetched before any use.
        future: [V, H, E] what `perfect`, `noisy` and `shuffled` see of layer l + h, at h - 1.
        host_budget: as `budget`, of host memory; None: everything is there.
    """
    layers, experts = schedule.layers, schedule.experts
    if oversize not in ("stream", "hold"):
        raise ValueError(f"unknown oversize {oversize!r}")
    if not 1 <= horizon <= layers:
        raise ValueError(f"horizon {horizon} outside 1..{layers}")
    if routing == "cache_aware" and not schedule.ends_layer.all():
        raise ValueError("cache_aware needs whole visits, not a sequential schedule")
    rule = lookup(MISS, "miss rule", miss)
    next_use = [NEVER] * (layers * experts)
    if first_use is not None:
        next_use = [int(v) for v in np.asarray(first_use).reshape(-1)]

    def host_tier(device: Cache) -> HostTier | None:
        if host_budget is None:
            return None
        made = lookup(EVICTION, "eviction", host_eviction)
        return HostTier(
            Cache(layers, experts, host_budget, level_bytes),
            lambda cache: made(cache, next_use, **(host_numbers or {})),
            host_eviction in ORACLES,
            host_hears == "uses",
            inclusion == "exclusive",
            prefetch_to == "host",
            device,
        )

    def fresh() -> Memory:
        cache = Cache(layers, experts, budget, level_bytes)
        policy = lookup({**EVICTION, **TUNED}, "eviction", eviction)(cache, next_use, **(numbers or {}))
        kept = set() if pins is None else keep_for_good(cache, pins[1], pins[0])
        if warm_start is not None:
            fill(cache, warm_start, cache.budgets)
            policy.begin_warm(by_count(warm_start))
        return Memory(
            cache,
            policy,
            lookup(PREFETCH, "prefetch", prefetch)(schedule, horizon, future, **(prefetch_numbers or {})),
            lookup(SELECTION, "selection", selection)(**(select_numbers or {})),
            lookup(ROUTING, "routing", routing)(**(routing_numbers or {})),
            lookup(ADMISSION, "admission", admission)(**(admission_numbers or {})),
            kept,
            host_tier(cache),
        )

    under_way = UnderWay(schedule, fresh, next_use, costs, draft_s)
    for v in range(schedule.visits):
        under_way.visit(
            v,
            lambda visit, arrived: rule(visit, arrived, **(miss_numbers or {})),
            oversize == "stream",
            horizon,
            may_evict,
        )
    return under_way.end()
