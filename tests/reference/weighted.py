"""Eviction by a weighted sum of integer features."""

from __future__ import annotations

import numpy as np

from .base import Eviction, cyclic_distance
from .cache import Cache
from .schedule import Visit


class Weighted(Eviction):
    """Sums of integers: weights and features in units of 1/1024, features rounded down (logs: linear in an octave)."""

    def __init__(
        self,
        cache: Cache,
        next_use: list[int],
        recency: float = 0.5,
        frequency: float = 0.0,
        fast: float = 1.0,
        slow: float = 1.0,
        mass: float = 0.0,
        distance: float = 0.0,
        fast_decay: float = 0.7,
        slow_decay: float = 0.95,
    ):
        super().__init__(cache, next_use)
        weights = (recency, frequency, fast, slow, mass, distance)
        self.weights = [int(np.rint(np.float32(weight) * np.float32(1024))) for weight in weights]
        self.decays = [np.float32(decay) for decay in (fast_decay, slow_decay, slow_decay)]
        self.uses = [0] * self.size
        self.last = [-1] * self.size  # pass of the last use, or that it was prefetched for
        self.values = [np.zeros((cache.layers, cache.experts), np.float32) for _ in self.decays]

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.uses[visit.flat(e)] += 1
            self.last[visit.flat(e)] = visit.pass_id
            for value, new in zip(self.values, (1, 1, visit.mass[e]), strict=True):
                value[visit.layer, e] += np.float32(new)
        for value, decay in zip(self.values, self.decays, strict=True):
            value[visit.layer] *= decay
            value[visit.layer][value[visit.layer] < np.finfo(np.float32).tiny] = 0

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.last[flat] = visit.pass_id + (flat // self.cache.experts <= visit.layer)

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        shares = [
            min(int(np.float32(value.flat[flat] * (np.float32(1) - decay)) * np.float32(1024)), 16 * 1024)
            for value, decay in zip(self.values, self.decays, strict=True)
        ]
        features = [
            -log2_eighths(max(visit.pass_id - self.last[flat], 0) + 1),
            log2_eighths(self.uses[flat] + 1),
            *shares,
            -(cyclic_distance(self.cache, visit, flat) * 1024 // self.cache.layers),
        ]
        return (sum(w * f for w, f in zip(self.weights, features, strict=True)), self.touch[flat])


def log2_eighths(count: int) -> int:
    """1024 * log2(count) / 8, linear between powers of two and rounded down."""
    octave = count.bit_length() - 1
    return 128 * octave + (128 * count >> octave) - 128
