"""Which demand copies stay in the cache (CONTRACT.md section 2, "Admission")."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from .schedule import Visit


class Always:
    """Lets every copy in, and making room spares it."""

    competes: ClassVar[bool] = False

    def turned_away(self, visit: Visit, starts_pass: bool) -> set[int]:
        """Expert ids of the visit whose copies run from a buffer."""
        del visit, starts_pass
        return set()

    def handicap(self, keys: tuple[float, ...]) -> tuple[float, ...]:
        """Keep-score of an expert that came at this visit, as making room sees it."""
        return keys


class Compete(Always):
    competes = True


class Limited(Always):
    def __init__(self, copies: int = 4):
        self.copies, self.so_far = copies, 0

    def turned_away(self, visit: Visit, starts_pass: bool) -> set[int]:
        if starts_pass:
            self.so_far = 0
        away = set()
        for e in visit.by_mass:
            if e not in visit.loaded:
                continue
            if self.so_far < self.copies:
                self.so_far += 1
            else:
                away.add(e)
        return away


class Margin(Compete):
    def __init__(self, gain: float = 1):
        self.gain = np.float32(gain)

    def handicap(self, keys: tuple[float, ...]) -> tuple[float, ...]:
        first = keys[0]
        if isinstance(first, float):
            return (float(np.float32(first) - self.gain), *keys[1:])
        return (int(first) - round(float(self.gain)), *keys[1:])


ADMISSION: dict[str, Callable[..., Always]] = {
    "always": Always,
    "compete": Compete,
    "limited": Limited,
    "margin": Margin,
}
