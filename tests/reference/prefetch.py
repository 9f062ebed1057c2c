"""Predictors of CONTRACT.md section 4: what is wanted of the next layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Schedule

from .adaptive import AdaptivePrefetch
from .base import Predictor
from .hashing import hash31
from .online import OnlinePrefetch
from .schedule import Visit
from .trained import LearnedPrefetch


class Previous(Predictor):
    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        return dict(self.latest.get(target, {}))


class Popular(Predictor):
    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None):
        super().__init__(schedule, horizon, future)
        self.uses: dict[int, dict[int, int]] = {}

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        uses = self.uses.setdefault(visit.layer, {})
        for e in visit.demand:
            uses[e] = uses.get(e, 0) + 1

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        return {e: np.float32(uses) for e, uses in self.uses.get(target, {}).items()}


def positive(scores: npt.NDArray[Any]) -> dict[int, np.float32]:
    return {int(e): np.float32(scores[e]) for e in np.flatnonzero(scores > 0)}


class Future(Predictor):
    """`perfect` and `shuffled`: they differ in the array that the caller hands over."""

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        if self.future is None:
            raise ValueError("this predictor needs `future`")
        return positive(self.future[visit.index, h - 1])


class Noisy(Future):
    """Tosses a coin for each expert, float32: its needs pass with `recall`, others as often as `precision` allows.

    What passes is wanted in an order of its own, drawn from the next seed.
    """

    def __init__(
        self,
        schedule: Schedule,
        horizon: int,
        future: npt.NDArray[Any] | None,
        precision: float = 0.8,
        recall: float = 0.8,
        seed: int = 0,
    ):
        super().__init__(schedule, horizon, future)
        self.precision, self.recall, self.seed = np.float32(precision), np.float32(recall), seed

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        needed = super().want(visit, h, target)
        experts, n = visit.experts, np.float32(len(needed))
        others = np.float32(max(experts - len(needed), 1))
        wrong = self.recall * n * (np.float32(1) - self.precision) / (self.precision * others)
        wants: dict[int, np.float32] = {}
        for e in range(experts):
            seen = visit.index + h - 1  # one draw for each visit that is predicted, wherever it is predicted from
            coin = np.float32(hash31(self.seed, seen, e)) / np.float32(2**31)
            if coin < (self.recall if e in needed else wrong):
                wants[e] = np.float32(hash31(self.seed + 1, seen, e) >> 8) + np.float32(1)
        return wants


class GateAhead(Predictor):
    """The next layer's gate on this layer's activations: one layer ahead, never from the last layer."""

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        if self.schedule.ahead is None:
            raise ValueError("gate_ahead needs `ahead` in the schedule")
        if h > 1 or visit.layer == self.schedule.layers - 1:
            return {}
        return positive(self.schedule.ahead[visit.index])


class Transition(Predictor):
    """Co-activation learned online: how often expert f of a layer followed expert e of the layer h before (cyclically).

    At each complete demand of layer l and each h, every pair (e in the latest demand of layer l - h, f demanded now)
    counts once and every such e counts once as a source, also if nothing is demanded now; a layer not visited yet
    gives nothing. Learning comes first; then ``want[f] = sum_e pairs[e, f] / sum_e sources[e]`` over the e demanded
    now, float32, 0 being no want.
    """

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None):
        super().__init__(schedule, horizon, future)
        self.pairs: dict[tuple[int, int, int], dict[int, int]] = {}  # (layer, h, e) -> f -> count
        self.sources: dict[tuple[int, int, int], int] = {}  # (layer, h, e) -> count

    def learn(self, layer: int) -> None:
        for h in range(1, self.horizon + 1):
            for e in self.latest.get((layer - h) % self.schedule.layers, {}):
                self.sources[layer, h, e] = self.sources.get((layer, h, e), 0) + 1
                row = self.pairs.setdefault((layer, h, e), {})
                for f in self.now:
                    row[f] = row.get(f, 0) + 1

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        followed: dict[int, int] = {}
        for e in self.latest[visit.layer]:
            for f, count in self.pairs.get((target, h, e), {}).items():
                followed[f] = followed.get(f, 0) + count
        sources = sum(self.sources.get((target, h, e), 0) for e in self.latest[visit.layer])
        return {f: np.float32(count) / np.float32(sources) for f, count in followed.items()}


PREFETCH: dict[str, Callable[..., Predictor]] = {
    "none": Predictor,
    "previous": Previous,
    "popular": Popular,
    "transition": Transition,
    "learned": LearnedPrefetch,
    "online": OnlinePrefetch,
    "adaptive": AdaptivePrefetch,
    "gate_ahead": GateAhead,
    "perfect": Future,
    "noisy": Noisy,
    "shuffled": Future,
}
