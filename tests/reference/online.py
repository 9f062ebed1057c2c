"""The policies that learn while they run: linear predictors in Python integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Schedule

from .base import Eviction, Predictor
from .cache import Cache
from .history import Expert
from .schedule import Visit


class Linear:
    """A linear predictor that learns on the way: values in 1/16384, weights in 2^-24, all of them Python integers."""

    def __init__(self, layers: int, experts: int, sources: int, rate: float) -> None:
        self.experts = experts
        self.rate = int(np.rint(np.float32(rate) * np.float32(1024)))
        self.shares = [[2340 << 10] * 7 + [0] for _ in range(layers)]
        self.pairs = [[[[0] * experts for _ in range(sources)] for _ in range(experts)] for _ in range(layers)]
        self.memory = [[Expert() for _ in range(experts)] for _ in range(layers)]

    def see(self, layer: int, demand: set[int]) -> None:
        for e, expert in enumerate(self.memory[layer]):
            expert.visit(e in demand, np.float32(0))

    def inputs(self, layer: int) -> list[list[int]]:
        return [[*expert.features()[:7], 256] for expert in self.memory[layer]]

    def values(self, layer: int, inputs: list[list[int]], sources: list[set[int]]) -> list[int]:
        found = []
        for e in range(self.experts):
            value = sum((w >> 10) * x for w, x in zip(self.shares[layer], inputs[e], strict=True)) >> 8
            for row, source in zip(self.pairs[layer][e], sources, strict=True):
                value += sum(row[s] >> 10 for s in source) // max(len(source), 1)
            found.append(value)
        return found

    def learn(self, layer: int, inputs: list[list[int]], sources: list[set[int]], errors: list[int]) -> None:
        for k in range(8):
            slope = sum((error >> 2) * x[k] for error, x in zip(errors, inputs, strict=True)) // self.experts
            self.shares[layer][k] = _weight(self.shares[layer][k] + (slope * self.rate >> 5))
        for e, error in enumerate(errors):
            for row, source in zip(self.pairs[layer][e], sources, strict=True):
                for s in source:
                    row[s] = _weight(row[s] + error * self.rate)


def _weight(value: int) -> int:
    return min(max(value, -(4 << 24)), 4 << 24)


class Online(Eviction):
    """Learns how soon experts are used again: the value of a visit should have been 1, or `fade` times the next one."""

    def __init__(self, cache: Cache, next_use: list[int], fade: float = 0.85, rate: float = 0.0625):
        super().__init__(cache, next_use)
        self.fade = int(np.rint(np.float32(fade) * np.float32(1024)))
        self.model = Linear(cache.layers, cache.experts, 2, rate)
        self.latest: list[set[int]] = [set() for _ in range(cache.layers)]
        self.told: dict[int, tuple[list[set[int]], list[int]]] = {}  # layer -> sources and values of its latest visit
        self.score = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        model, layer, demand = self.model, visit.layer, set(visit.demand)
        before = model.inputs(layer)
        model.see(layer, demand)
        self.latest[layer] = demand
        inputs, sources = model.inputs(layer), [demand, self.latest[(layer - 1) % len(self.latest)]]
        later = [self.fade * min(max(v, 0), 16384) // 1024 for v in model.values(layer, inputs, sources)]
        if layer in self.told:
            told_sources, told = self.told[layer]
            errors = [(16384 if e in demand else later[e]) - told[e] for e in range(visit.experts)]
            model.learn(layer, before, told_sources, errors)
        values = model.values(layer, inputs, sources)
        self.told[layer] = sources, [min(max(v, 0), 16384) for v in values]
        for e, value in enumerate(values):
            self.score[visit.flat(e)] = value

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.score[flat] = 1 << 24

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.score[flat], self.touch[flat])


class OnlinePrefetch(Predictor):
    """Learns each layer's next demand from its last one and those of the three layers before it; wants every expert."""

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None, rate: float = 0.0625):
        super().__init__(schedule, horizon, future)
        self.model = Linear(schedule.layers, schedule.experts, 4, rate)

    def sources(self, target: int) -> list[set[int]]:
        return [set(self.latest.get((target - back) % self.schedule.layers, {})) for back in range(4)]

    def learn(self, layer: int) -> None:
        inputs, sources = self.model.inputs(layer), self.sources(layer)
        told = self.model.values(layer, inputs, sources)
        errors = [(16384 if e in self.now else 0) - min(max(v, 0), 16384) for e, v in enumerate(told)]
        self.model.learn(layer, inputs, sources, errors)
        self.model.see(layer, set(self.now))

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        del visit, h
        values = self.model.values(target, self.model.inputs(target), self.sources(target))
        return {e: np.float32(min(max(v, 1), 4 * 16384)) / np.float32(16384) for e, v in enumerate(values)}
