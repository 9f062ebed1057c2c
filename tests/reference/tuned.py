"""Eviction by the scores of another policy and the features of `weighted`, weighed together in integers."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .adaptive import Adaptive
from .base import Eviction
from .cache import Cache
from .online import Online
from .schedule import Visit
from .trained import Learned
from .weighted import Weighted

NAMES = ("recency", "frequency", "fast", "slow", "mass", "distance", "fast_decay", "slow_decay")


class Tuned(Eviction):
    """The sum is in 2^-20: scores in 2^-12 times a weight in 2^-10, rounded down; features and weights in 2^-10."""

    kind: ClassVar[type[Any]]

    def __init__(self, cache: Cache, next_use: list[int], trust: float = 1.0, **settings: Any):
        super().__init__(cache, next_use)
        begin = dict.fromkeys(NAMES[:6], 0.0)
        of_features = {name: settings.pop(name) for name in NAMES if name in settings}
        self.weight = int(np.rint(np.float32(trust) * np.float32(1024)))
        self.policy = self.kind(cache, next_use, **settings)
        self.features = Weighted(cache, next_use, **{**begin, **of_features})

    def begin_warm(self, by_count: list[int]) -> None:
        for part in (self.policy, self.features):
            part.begin_warm(by_count)

    def carry(self, before: Eviction) -> None:
        assert isinstance(before, Tuned)
        self.policy.carry(before.policy)

    def observe(self, visit: Visit) -> None:
        for part in (self.policy, self.features):
            part.observe(visit)

    def arrive(self, visit: Visit, flat: int) -> None:
        for part in (self.policy, self.features):
            part.arrive(visit, flat)

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        score, touch = self.policy.keep(visit, flat)
        if score >= 1 << 24:
            return (1 << 30, touch)
        most = (1 << 20) - 1
        total, _ = self.features.keep(visit, flat)
        return ((self.weight * int(min(max(score, -most), most)) >> 2) + total, touch)


class _Adaptive(Tuned):
    kind = Adaptive


class _Learned(Tuned):
    kind = Learned


class _Online(Tuned):
    kind = Online


TUNED = {"tuned(adaptive)": _Adaptive, "tuned(learned)": _Learned, "tuned(online)": _Online}
