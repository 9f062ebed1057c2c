"""Residency: who is in the cache, at which precision, and how many bytes that takes (CONTRACT.md section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def unit_bytes(level_bytes: Sequence[Sequence[int]], experts: int) -> int:
    """The bytes in which sizes are counted, for so many experts in all layers."""
    sizes = [int(size) for row in level_bytes for size in row]
    unit, largest = math.gcd(*sizes), max(sizes)
    if experts * (largest // unit) >= 2**30:
        unit = 1
        while experts * -(-largest // unit) >= 2**30:
            unit += 1
    return unit


class Cache:
    """Who is resident at which level, in one pool or in one a layer."""

    def __init__(self, layers: int, experts: int, budget: int | Sequence[int], level_bytes: Sequence[Sequence[int]]):
        self.layers, self.experts, self.level_bytes = layers, experts, level_bytes
        self.unit = unit_bytes(level_bytes, layers * experts)
        self.global_pool = isinstance(budget, (int, np.integer))
        given = [int(budget)] if isinstance(budget, (int, np.integer)) else [int(b) for b in budget]
        if len(given) != (1 if self.global_pool else layers):
            raise ValueError(f"{len(given)} layer budgets for {layers} layers")
        rows = [list(range(layers))] if self.global_pool else [[row] for row in range(layers)]
        self.budgets = [self._whole(one, pool) for one, pool in zip(given, rows, strict=True)]
        self.pools: list[dict[int, int]] = [{} for _ in self.budgets]  # flat id -> level
        self.held_bytes = [0] * len(self.budgets)
        self.table = np.zeros((layers, experts), np.int8)  # the same levels as an array, to be recorded

    @property
    def top(self) -> int:
        return len(self.level_bytes)

    def pool(self, flat: int) -> int:
        return 0 if self.global_pool else flat // self.experts

    def level(self, flat: int) -> int:
        return self.pools[self.pool(flat)].get(flat, 0)

    def size_bytes(self, flat: int, level: int) -> int:
        return self.level_bytes[level - 1][flat // self.experts] if level else 0

    def room_bytes(self, flat: int, level: int) -> int:
        """Bytes that an expert takes of a budget: whole units, rounded up."""
        return -(-self.size_bytes(flat, level) // self.unit) * self.unit

    def _whole(self, budget: int, rows: list[int]) -> int:
        """A budget in whole units, rounded down; one of at least all experts of these layers holds them all."""
        flats = [row * self.experts for row in rows]
        everything = self.experts * sum(self.size_bytes(flat, self.top) for flat in flats)
        if budget >= everything:
            return max(budget, self.experts * sum(self.room_bytes(flat, self.top) for flat in flats))
        return budget // self.unit * self.unit

    def set(self, flat: int, level: int) -> None:
        pool = self.pool(flat)
        self.held_bytes[pool] += self.room_bytes(flat, level) - self.room_bytes(flat, self.level(flat))
        if level:
            self.pools[pool][flat] = level
        else:
            del self.pools[pool][flat]
        self.table[flat // self.experts, flat % self.experts] = level

    def bytes_of(self, flats: set[int], pool: int) -> int:
        """Bytes that the residents among `flats` hold in a pool."""
        return sum(self.room_bytes(f, self.level(f)) for f in flats if self.pool(f) == pool)
