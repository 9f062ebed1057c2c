"""The policies that adapt to a model: a logistic predictor in Python integers, learned on the way and never reset."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Schedule

from .base import Eviction, Predictor
from .cache import Cache
from .history import Expert
from .schedule import Visit
from .trained import Network, odds

Source = list[tuple[int, int]]  # experts with their gates in sixteenths
SURE = 1 << 14
INPUTS = 21


class Given(NamedTuple):
    """What a layer is scored from."""

    inputs: list[list[int]]
    sources: dict[int, Source]  # by place
    told: list[int]  # logits by a trained predictor


class Model:
    """Weights of all layers: of histories, of sums of pairs, of pairs by (layer, place of the source, its expert)."""

    def __init__(self, layers: int, experts: int, rate: float, start: int) -> None:
        self.layers, self.experts = layers, experts
        self.rate = int(np.rint(np.float32(rate) * np.float32(1024)))
        self.history = [[0] * (INPUTS - 1) + [start << 20] for _ in range(layers)]
        self.history_power = [[np.float32(1)] * INPUTS for _ in range(layers)]
        self.gain = [4096] * layers
        self.gain_power = [np.float32(1)] * layers
        self.trust, self.trust_power = list(self.gain), list(self.gain_power)
        self.pairs: dict[tuple[int, int, int], list[int]] = {}
        self.times: dict[tuple[int, int, int], int] = {}

    def score(self, layer: int, given: Given) -> tuple[list[int], list[int]]:
        """Logits, and the parts of them by pairs."""
        logits, parts = [], []
        for e in range(self.experts):
            own = sum((w >> 6) * x for w, x in zip(self.history[layer], given.inputs[e], strict=True)) >> 10
            told = sum((self._pair(layer, place, s)[e] >> 4) * gate for place, s, gate in _each(given)) >> 8
            parts.append(min(max(told, -32767), 32767))
            logits.append(own + (self.gain[layer] * parts[-1] >> 12) + (self.trust[layer] * given.told[e] >> 12))
        return logits, parts

    def learn(self, layer: int, given: Given, parts: list[int], errors: list[int]) -> None:
        for k in range(INPUTS):
            column = [x[k] for x in given.inputs]
            squares = sum((error * x >> 14) ** 2 for error, x in zip(errors, column, strict=True))
            power = self.history_power[layer][k] = self.history_power[layer][k] + _power(squares)
            slope = sum((error >> 2) * x for error, x in zip(errors, column, strict=True)) >> 8
            step = _near(slope * max(_root(power) * 205 >> 10, 1), 8)
            self.history[layer][k] = _within(self.history[layer][k] + step, 8 << 20)
        for share, powers, part in ((self.gain, self.gain_power, parts), (self.trust, self.trust_power, given.told)):
            both = list(zip(errors, part, strict=True))
            powers[layer] = powers[layer] + _power(sum(_within(error * p >> 18, 1023) ** 2 for error, p in both))
            slope = _near(sum(_near(error * p, 12) for error, p in both), 2)
            step = _near(slope * max(_root(powers[layer]) * 102 >> 10, 1), 16)
            share[layer] = min(max(share[layer] + step, 0), 8192)
        for place, s, gate in _each(given):
            key = (layer, place, s)
            self.times[key] = self.times.get(key, 10) + 1
            pace = max(_root(np.float32(self.times[key])) * self.rate >> 12, 1)
            old = self._pair(*key)
            self.pairs[key] = [
                _within(w + _near(error * gate * pace, 10), 4 << 20) for w, error in zip(old, errors, strict=True)
            ]

    def _pair(self, layer: int, place: int, source: int) -> list[int]:
        return self.pairs.get((layer, place, source), [0] * self.experts)


class Memory:
    """What a reset empties: the history of every expert, and the latest demands of every layer, the newest first."""

    def __init__(self, layers: int, experts: int, trained: Network | None = None) -> None:
        self.layers, self.experts, self.trained = layers, experts, trained
        self.history = [[Expert() for _ in range(experts)] for _ in range(layers)]
        self.demands: list[list[Source]] = [[] for _ in range(layers)]

    def see(self, layer: int, masses: dict[int, np.float32]) -> None:
        for e, expert in enumerate(self.history[layer]):
            expert.visit(e in masses, masses.get(e, np.float32(0)))
        if self.trained is not None:
            self.trained.visit(layer, masses)
        best = sorted(masses, key=lambda e: (-masses[e], e))[:8]
        gates = [24 - 16 * place // max(len(best) - 1, 1) for place in range(len(best))]
        self.demands[layer] = [list(zip(best, gates, strict=True)), *self.demands[layer][:3]]

    def given(self, layer: int, skip: int = 0) -> Given:
        near = min(12, self.layers - 1)
        latest = [self.demands[(layer - 1 - back) % self.layers][:1] for back in range(near)]
        sources = {back: found[0] for back, found in enumerate(latest) if found and back >= skip}
        sources |= {near + back: found for back, found in enumerate(self.demands[layer])}
        told = [0] * self.experts if self.trained is None else self.trained.scores(layer)
        inputs = [[*expert.features(), 256] for expert in self.history[layer]]
        return Given(inputs, sources, [_within(logit, 32767) for logit in told])


def _each(given: Given) -> list[tuple[int, int, int]]:
    return [(place, s, gate) for place, source in given.sources.items() for s, gate in source]


def _chance(logit: int) -> int:
    middle = (min(max(logit >> 6, -512), 511) + 0.5) / 64
    return int(np.rint(SURE / (1 + math.exp(-middle))))


def _near(value: int, bits: int) -> int:
    return (value + (1 << bits - 1)) >> bits


def _within(value: int, most: int) -> int:
    return min(max(value, -most), most)


def _power(squares: int) -> np.float32:
    return np.float32(squares) * np.float32(2**-12)


def _root(value: np.float32) -> int:
    """SURE / sqrt(value), in the middle of the quarter of an octave that it lies in."""
    mantissa, exponent = math.frexp(float(value))  # value = mantissa * 2**exponent, mantissa in [0.5, 1)
    quarter = int((2 * mantissa - 1) * 4)
    return max(int(np.rint(SURE / math.sqrt(2.0 ** (exponent - 1) * (1 + (quarter + 0.5) / 4)))), 1)


class Adaptive(Eviction):
    """Learns how soon experts are used again: a visit's chance should have been 1, or `fade` times the next one."""

    def __init__(
        self, cache: Cache, next_use: list[int], fade: float = 0.95, rate: float = 0.2, checkpoint: str = "none"
    ):
        super().__init__(cache, next_use)
        self.fade = int(np.rint(np.float32(fade) * np.float32(1024)))
        self.model = Model(cache.layers, cache.experts, rate, -1 if checkpoint == "none" else 0)
        trained = None if checkpoint == "none" else Network("evictor", cache.layers, cache.experts, checkpoint)
        self.memory = Memory(cache.layers, cache.experts, trained)
        self.told: dict[int, tuple[Given, list[int], list[int]]] = {}  # by layer: inputs, parts, chances of its last
        self.score = [0] * self.size

    def carry(self, before: Eviction) -> None:
        assert isinstance(before, Adaptive)
        self.model = before.model

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        layer = visit.layer
        self.memory.see(layer, {e: np.float32(visit.mass[e]) for e in visit.demand})
        given = self.memory.given(layer)
        logits, parts = self.model.score(layer, given)
        chances = [_chance(logit) for logit in logits]
        if layer in self.told:
            before, said, told = self.told[layer]
            later = [SURE if e in visit.demand else self.fade * chances[e] // 1024 for e in range(visit.experts)]
            self.model.learn(layer, before, said, [a - b for a, b in zip(later, told, strict=True)])
        self.told[layer] = given, parts, chances
        for e, logit in enumerate(logits):
            self.score[visit.flat(e)] = logit

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.score[flat] = 1 << 24

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.score[flat], self.touch[flat])


class AdaptivePrefetch(Predictor):
    """Learns what each layer uses next from the visits before it and its own last ones; wants every expert."""

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None, rate: float = 0.4):
        super().__init__(schedule, horizon, future)
        self.model = Model(schedule.layers, schedule.experts, rate, -2)
        self.memory = Memory(schedule.layers, schedule.experts)

    def carry(self, before: Predictor) -> None:
        assert isinstance(before, AdaptivePrefetch)
        self.model = before.model

    def learn(self, layer: int) -> None:
        given = self.memory.given(layer)
        logits, parts = self.model.score(layer, given)
        errors = [(SURE if e in self.now else 0) - _chance(logit) for e, logit in enumerate(logits)]
        self.model.learn(layer, given, parts, errors)
        self.memory.see(layer, {e: np.float32(mass) for e, mass in self.now.items()})

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        del visit
        logits, _ = self.model.score(target, self.memory.given(target, h - 1))
        return {e: odds(logit) for e, logit in enumerate(logits)}
