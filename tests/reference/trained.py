"""The policies that a trained network scores for, in slow numpy on int64: what the engine computes in float32.

The stored arrays are read by name; no code is shared with the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import specmd_jax
from specmd_jax.types import Schedule

from .base import Eviction, Predictor
from .cache import Cache
from .history import Expert
from .schedule import Visit

Ints = npt.NDArray[np.int64]


class Network:
    """Scores of a layer's experts from the visits so far."""

    def __init__(self, head: str, layers: int, experts: int, checkpoint: str = "") -> None:
        path = (
            Path(checkpoint) if checkpoint else Path(specmd_jax.__file__).parent / "policies" / "data" / f"{head}.npz"
        )
        with np.load(path) as file:
            self.arrays: dict[str, Any] = {
                name: file[name].astype(np.int64) for name in file.files if file[name].dtype.kind == "i"
            }
        self.tied = self.arrays["tied/bias"].shape == (layers, experts)
        self.memory = [[Expert() for _ in range(experts)] for _ in range(layers)]

    def visit(self, layer: int, mass: dict[int, np.float32]) -> None:
        for e, expert in enumerate(self.memory[layer]):
            expert.visit(e in mass, mass.get(e, np.float32(0)))

    def scores(self, layer: int) -> list[int]:
        seen = np.array([expert.features() for expert in self.memory[layer]])
        found = self._free("tied/free" if self.tied else "free", seen)
        if self.tied:
            every = [expert for row in self.memory for expert in row]
            found = found + self.arrays["tied/bias"][layer]
            found = found + self._context("tied/wave", [expert.level() for expert in every], layer, 4)
            found = found + self._context("tied/topic", [expert.slow() for expert in every], layer, 6)
        return [int(score) for score in found]

    def _free(self, part: str, seen: Ints) -> Ints:
        hidden = seen @ self.arrays[f"{part}/hidden"] + self.arrays[f"{part}/hidden_bias"]
        return _active(hidden, 8) @ self.arrays[f"{part}/out"] + self.arrays[f"{part}/bias"]

    def _context(self, part: str, inputs: list[int], layer: int, shift: int) -> Ints:
        into = self.arrays[f"{part}/into"]
        hidden = np.array(inputs) @ into[layer if len(into) > 1 else 0] + self.arrays[f"{part}/bias"][layer]
        return self.arrays[f"{part}/out"][layer] @ _active(hidden, shift)


def _active(hidden: Ints, shift: int) -> Ints:
    return np.clip(hidden >> shift, 0, 1023)


def odds(score: int) -> np.float32:
    """2 to the score's logit, linear within an octave."""
    octave, rest = divmod(min(max(score, -16 * 4096), 16 * 4096), 4096)
    return np.float32(2.0**octave * (1 + rest / 4096))


class Learned(Eviction):
    """A score for each expert of a layer at each of its visits; what was prefetched stays until then."""

    def __init__(self, cache: Cache, next_use: list[int], checkpoint: str = ""):
        super().__init__(cache, next_use)
        self.network = Network("evictor", cache.layers, cache.experts, checkpoint)
        self.score = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        self.network.visit(visit.layer, visit.mass)
        for e, score in enumerate(self.network.scores(visit.layer)):
            self.score[visit.flat(e)] = score

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.score[flat] = 1 << 24

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.score[flat], self.touch[flat])


class LearnedPrefetch(Predictor):
    """The odds of a trained predictor, for every expert of the target."""

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None, checkpoint: str = ""):
        super().__init__(schedule, horizon, future)
        self.network = Network("prefetcher", schedule.layers, schedule.experts, checkpoint)

    def learn(self, layer: int) -> None:
        self.network.visit(layer, self.now)

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        del visit, h
        return {e: odds(score) for e, score in enumerate(self.network.scores(target))}
