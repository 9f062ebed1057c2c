"""What learning policies remember of an expert, and how they see it: small integers."""

from __future__ import annotations

import numpy as np

USE = [np.float32(d) for d in (0.5, 0.7, 0.84, 0.92, 0.96, 0.98, 0.992)]
MASS = [np.float32(d) for d in (0.84, 0.98)]
SHARES = {d: np.float32((1 - d) / d) for d in (0.5, 0.7, 0.84, 0.92, 0.96, 0.98, 0.992)}
NEVER = 1 << 20


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
