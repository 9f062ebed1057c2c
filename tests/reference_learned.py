"""The learned policies in slow numpy, on int64: what `specmd_jax.policies.trained` computes in float32.

It reads the stored arrays by name, and shares no code with the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import specmd_jax

USE = [np.float32(d) for d in (0.5, 0.7, 0.84, 0.92, 0.96, 0.98, 0.992)]
MASS = [np.float32(d) for d in (0.84, 0.98)]
SHARES = {d: np.float32((1 - d) / d) for d in (0.5, 0.7, 0.84, 0.92, 0.96, 0.98, 0.992)}
NEVER = 1 << 20

Ints = npt.NDArray[np.int64]


class Expert:
    """What is remembered of one expert."""

    def __init__(self) -> None:
        self.use = [np.float32(0)] * len(USE)
        self.mass = [np.float32(0)] * len(MASS)
        self.age = self.gap = NEVER
        self.visits = 0
        self.last = np.float32(0)

    def visit(self, used: bool, mass: np.float32) -> None:
        mass = np.float32(mass) if used else np.float32(0)
        self.use = [_fade(value, np.float32(used), decay) for value, decay in zip(self.use, USE, strict=True)]
        self.mass = [_fade(value, mass, decay) for value, decay in zip(self.mass, MASS, strict=True)]
        self.gap = self.age if used else self.gap
        self.age = 0 if used else min(self.age + 1, NEVER)
        self.visits += 1
        self.last = mass

    def features(self) -> list[int]:
        use = [value * share for value, share in zip(self.use, SHARES.values(), strict=True)]
        mass = [value * SHARES[decay] for value, decay in zip(self.mass, (0.84, 0.98), strict=True)]
        counts = [np.float32(count + 1) for count in (self.age, self.gap, self.visits)]
        return [
            *(_whole(share) for share in use),
            *(_log2(share * np.float32(256)) for share in use),
            *(_whole(share) for share in mass),
            _whole(self.last),
            *(_log2(count) for count in counts),
        ]

    def level(self) -> int:
        """What the wavefront shows of it."""
        return 16 + min(int(self.last * np.float32(16)), 16) if self.last > 0 else 0

    def slow(self) -> int:
        return _whole(self.use[5] * SHARES[0.98])


def _fade(value: np.float32, new: np.float32, decay: np.float32) -> np.float32:
    value = (value + new) * decay
    return value if value >= np.finfo(np.float32).tiny else np.float32(0)


def _whole(share: np.float32) -> int:
    return min(int(share * np.float32(256)), 255)


def _log2(value: np.float32) -> int:
    return min(max((int(np.float32(value).view(np.int32)) >> 18) - (127 << 5), 0), 255)


class Predictor:
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


class Online:
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
