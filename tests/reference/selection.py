"""Selections of CONTRACT.md section 4: which of the wanted experts are asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class TopK:
    """The n best, n = floor(count + 1/2); `count` is K of the trace (no schedule carries it) times the overfetch."""

    def __init__(self, count: float = 1.0):
        self.n = int(np.floor(count + 0.5))

    def choose(self, target: int, want: dict[int, np.float32]) -> list[int]:
        del target
        return sorted(want, key=lambda e: (-want[e], e))[: self.n]


def score_bin(score: np.float32) -> int:
    """Eighth of an octave (linear within it), read off the float's bits: 0 holds 2^-16, 159 ends at 2^4."""
    bits = int(np.float32(score).view(np.uint32))
    return min(max((bits >> 20) - ((127 - 16) << 3), 0), 159)


class Percentile:
    """Scores in a bin above t, the first with ``count(bins <= t) * 100 >= percentile * total``.

    Only positive scores count.
    """

    def __init__(self, percentile: float = 80.0):
        self.percentile = percentile
        self.histogram: dict[int, list[int]] = {}

    def choose(self, target: int, want: dict[int, np.float32]) -> list[int]:
        histogram = self.histogram.setdefault(target, [0] * 160)
        bins = {e: score_bin(score) for e, score in want.items() if score > 0}
        for b in bins.values():
            histogram[b] += 1
        total, below, threshold = sum(histogram), 0, 159
        for t, count in enumerate(histogram):
            below += count
            if below * 100 >= self.percentile * total:
                threshold = t
                break
        return sorted(e for e, b in bins.items() if b > threshold)


SELECTION: dict[str, Callable[..., TopK | Percentile]] = {"topk": TopK, "percentile": Percentile}
