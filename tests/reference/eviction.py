"""Keep-scores of CONTRACT.md section 3: the lowest leaves first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .adaptive import Adaptive
from .base import Eviction, cyclic_distance
from .cache import Cache
from .hashing import hash31
from .online import Online
from .schedule import Visit
from .trained import Learned
from .weighted import Weighted


class Fifo(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.load = [-1] * self.size

    def begin_warm(self, by_count: list[int]) -> None:
        super().begin_warm(by_count)
        self.load = list(self.touch)

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.loaded:
            self.load[visit.flat(e)] = self.touch[visit.flat(e)]

    def arrive(self, visit: Visit, flat: int) -> None:
        self.load[flat] = visit.after_demand

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.load[flat],)


class Random(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], seed: int = 0):
        super().__init__(cache, next_use)
        self.seed = seed

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (hash31(self.seed, visit.index, flat),)


class Lfu(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.uses = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.uses[visit.flat(e)] += 1

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.uses[flat], self.touch[flat])


class LfuResident(Lfu):
    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.loaded:
            self.uses[visit.flat(e)] = 1

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.uses[flat] = 0


class LfuDecay(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], decay: float = 0.9):
        super().__init__(cache, next_use)
        self.decay = np.float32(decay)
        self.value = np.zeros((cache.layers, cache.experts), np.float32)

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.value[visit.layer, e] += np.float32(1)
        self.value[visit.layer] *= self.decay
        self.value[visit.layer][self.value[visit.layer] < np.finfo(np.float32).tiny] = 0

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (float(self.value.flat[flat]), self.touch[flat])


class Lfru(Lfu):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.touched_at = [0] * self.size  # visit of the last touch

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.touched_at[visit.flat(e)] = visit.index

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.touched_at[flat] = visit.index

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        age = visit.index - self.touched_at[flat] + 1
        return (float(np.float32(self.uses[flat]) / np.float32(age)), self.touch[flat])


class Slru(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], protected: float = 0.8):
        super().__init__(cache, next_use)
        self.protected = protected
        self.segment = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            if e in visit.hits:
                self.segment[visit.flat(e)] = 1
            elif e in visit.loaded:
                self.segment[visit.flat(e)] = 0
        unit = self.cache.unit
        for pool, residents in enumerate(self.cache.pools):
            shielded = {f for f in residents if self.segment[f]}
            limit = np.floor(np.float32(self.protected) * np.float32(self.cache.budgets[pool] // unit))
            while self.cache.bytes_of(shielded, pool) > int(limit) * unit:
                oldest = min(shielded, key=lambda f: self.touch[f])
                shielded.remove(oldest)
                self.segment[oldest] = 0
                self.touch[oldest] = visit.after_demand

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.segment[flat] = 0

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.segment[flat], self.touch[flat])


class Lhu(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.top_uses = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e, level in visit.runs_at.items():
            self.top_uses[visit.flat(e)] += level == self.cache.top

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.top_uses[flat], self.touch[flat])


class Fld(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], distance: str = "cyclic"):
        super().__init__(cache, next_use)
        if distance not in ("cyclic", "absolute"):
            raise ValueError(f"unknown fld distance {distance!r}")
        self.distance = distance

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        if self.distance == "cyclic":
            return (-cyclic_distance(self.cache, visit, flat),)
        return (-abs(flat // self.cache.experts - visit.layer),)


class Score(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.score = np.zeros(self.size, np.float32)

    def observe(self, visit: Visit) -> None:
        for e in visit.demand:
            self.score[visit.flat(e)] += visit.mass[e]

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (float(self.score[flat]),)


class LeastStale(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], reading: str = "cyclic"):
        super().__init__(cache, next_use)
        if reading not in ("cyclic", "left_first", "literal", "recency"):
            raise ValueError(f"unknown least_stale reading {reading!r}")
        self.reading = reading
        self.mark = [-1] * self.size  # pass for which it was last used or selected

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.mark[visit.flat(e)] = visit.pass_id

    def select(self, flat: int, for_pass: int) -> None:
        self.mark[flat] = for_pass

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        layer, touch = flat // self.cache.experts, self.touch[flat]
        current = self.mark[flat] >= visit.pass_id
        if self.reading == "cyclic":
            return (current, -cyclic_distance(self.cache, visit, flat), touch)
        if self.reading == "left_first":
            left = layer < visit.layer
            return (current, not left, layer if left else -layer, touch)
        return (current, flat) if self.reading == "literal" else (current, touch)


class Belady(Eviction):
    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (-self.next_use[flat],)


class BeladyBypass(Belady):
    pins_demand = False


EVICTION: dict[str, Callable[..., Eviction]] = {
    "lru": Eviction,
    "fifo": Fifo,
    "random": Random,
    "lfu": Lfu,
    "lfu_resident": LfuResident,
    "lfu_decay": LfuDecay,
    "lfru": Lfru,
    "slru": Slru,
    "lhu": Lhu,
    "fld": Fld,
    "fld_absolute": partial(Fld, distance="absolute"),
    "score": Score,
    "least_stale": LeastStale,
    "least_stale_left_first": partial(LeastStale, reading="left_first"),
    "least_stale_literal": partial(LeastStale, reading="literal"),
    "least_stale_recency": partial(LeastStale, reading="recency"),
    "weighted": Weighted,
    "learned": Learned,
    "online": Online,
    "adaptive": Adaptive,
    "belady": Belady,
    "belady_bypass": BeladyBypass,
}

ORACLES = ("belady", "belady_bypass")
"""Policies that read the future."""
