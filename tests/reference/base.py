"""What every eviction policy and every predictor does: `lru` and `none`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Schedule

from .cache import Cache
from .schedule import Visit


class Eviction:
    """Lowest `keep` leaves first. The base remembers touches, which is all that `lru` needs."""

    pins_demand: ClassVar[bool] = True

    def __init__(self, cache: Cache, next_use: list[int]):
        self.cache = cache
        self.next_use = next_use  # of each flat id, kept up to date by the replay; only the oracles read it
        self.size = cache.layers * cache.experts
        self.touch = [-1] * self.size

    def begin_warm(self, by_count: list[int]) -> None:
        """The cache begins with the first of these flat ids, which are sorted by falling count."""
        for rank, flat in enumerate(by_count):
            self.touch[flat] = -1 - rank

    def carry(self, before: Eviction) -> None:
        """A reset put this one in the place of another: takes over what outlasts it."""
        del before

    def observe(self, visit: Visit) -> None:
        for rank, e in enumerate(visit.demand):
            self.touch[visit.flat(e)] = visit.clock + rank

    def arrive(self, visit: Visit, flat: int) -> None:
        """A prefetch copy was started."""
        self.touch[flat] = visit.after_demand

    def select(self, flat: int, for_pass: int) -> None:
        """A predictor selected this expert for its layer's visit in that pass."""
        del flat, for_pass

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        del visit
        return (self.touch[flat],)


def cyclic_distance(cache: Cache, visit: Visit, flat: int) -> int:
    return (flat // cache.experts - visit.layer) % cache.layers or cache.layers


class Predictor:
    """Wants nothing. The base remembers the latest complete demand of each layer, with its gate masses."""

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None):
        self.schedule, self.horizon, self.future = schedule, horizon, future
        self.latest: dict[int, dict[int, np.float32]] = {}  # layer -> expert -> mass
        self.now: dict[int, np.float32] = {}  # demand of this (pass, layer) so far

    def carry(self, before: Predictor) -> None:
        """A reset put this one in the place of another: takes over what outlasts it."""
        del before

    def observe(self, visit: Visit) -> None:
        self.now.update(visit.mass)
        if visit.ends_layer:
            self.learn(visit.layer)
            self.latest[visit.layer], self.now = self.now, {}

    def learn(self, layer: int) -> None:
        """Sees ``self.now`` complete, before it replaces the layer's latest demand."""
        del layer

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        """Scores of the wanted experts of layer `target`, h layers ahead; all others are -inf."""
        del visit, h, target
        return {}
