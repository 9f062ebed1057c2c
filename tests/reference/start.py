"""What lies in the cache before anything is demanded (CONTRACT.md section 2, "Start" and "Pins")."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

from .cache import Cache

Counts = Sequence[Sequence[float]]  # [L][E]


def by_count(counts: Counts) -> list[int]:
    """Flat ids by falling count; equal counts: the lower id first."""
    flat = [count for row in counts for count in row]
    return sorted(range(len(flat)), key=lambda e: (-flat[e], e))


def keep_for_good(cache: Cache, counts: Counts, share: float) -> set[int]:
    """Fills `share` of each pool; returns what was put there."""
    unit = gcd(*(int(size) for row in cache.level_bytes for size in row))
    limits = []
    for budget in cache.budgets:
        limit = int(np.floor(np.float32(share) * np.float32(budget // unit))) * unit
        limits.append(min(limit, budget))
    return fill(cache, counts, limits)


def fill(cache: Cache, counts: Counts, limits: Sequence[int]) -> set[int]:
    """Puts experts into each pool by falling count until the first that would exceed its limit; returns them."""
    came: set[int] = set()
    full = [False] * len(limits)
    for flat in by_count(counts):
        pool = cache.pool(flat)
        if full[pool] or cache.level(flat):
            continue
        if cache.held_bytes[pool] + cache.room_bytes(flat, cache.top) > limits[pool]:
            full[pool] = True
            continue
        cache.set(flat, cache.top)
        came.add(flat)
    return came
