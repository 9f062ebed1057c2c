"""Residency: who is in the cache, at which precision, and how many bytes that takes (CONTRACT.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Cache:
    """Who is resident at which level, in one pool or in one a layer."""

    def __init__(self, layers: int, experts: int, budget: int | Sequence[int], level_bytes: Sequence[Sequence[int]]):
        self.layers, self.experts, self.level_bytes = layers, experts, level_bytes
        self.global_pool = isinstance(budget, (int, np.integer))
        self.budgets = [int(budget)] if isinstance(budget, (int, np.integer)) else [int(b) for b in budget]
        if len(self.budgets) != (1 if self.global_pool else layers):
            raise ValueError(f"{len(self.budgets)} layer budgets for {layers} layers")
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

    def set(self, flat: int, level: int) -> None:
        pool = self.pool(flat)
        self.held_bytes[pool] += self.size_bytes(flat, level) - self.size_bytes(flat, self.level(flat))
        if level:
            self.pools[pool][flat] = level
        else:
            del self.pools[pool][flat]
        self.table[flat // self.experts, flat % self.experts] = level

    def bytes_of(self, flats: set[int], pool: int) -> int:
        """Bytes that the residents among `flats` hold in a pool."""
        return sum(self.size_bytes(f, self.level(f)) for f in flats if self.pool(f) == pool)
