"""A claim, what was found for it case by case, and the verdict that follows.

The rules, in full:

* A **case** is one trace (and setting) on which the claim can be tested. It *agrees* if the value found lies on the
  same side of "no effect" as the paper's and is no fainter than a fiftieth of it, and is *close* if it also lies within
  a factor of two of the paper's range.
* **reproduced**: at least two thirds of the cases are close. A claim without a number (`held` cases) needs all to hold.
* **reproduced in direction**: at least two thirds of the cases agree.
* **contradicted**: anything less.
* **not testable here**: no case.

A claim about a level ("hit rates of 88 to 92 %") has no side: its cases agree only if they are close.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPRODUCED = "reproduced"
DIRECTION = "reproduced in direction"
CONTRADICTED = "contradicted"
UNTESTABLE = "not testable here"

SHARE = 2 / 3
FACTOR = 2.0
FAINT = 1 / 50


class Case(NamedTuple):
    """One test of a claim. `low` to `high` is what the paper reports, `none` the value of no effect (None: a level)."""

    label: str
    value: float
    low: float
    high: float
    none: float | None

    @property
    def close(self) -> bool:
        """Within a factor of two of the paper's range, and on its side."""
        value, low, high = self.value, self.low, self.high
        if high < 0:
            value, low, high = -value, -high, -low
        return self.on_its_side and low / FACTOR <= value <= high * FACTOR

    @property
    def on_its_side(self) -> bool:
        """On the paper's side of no effect and not too faint; always, for a level."""
        if self.none is None:
            return True
        theirs = (self.low + self.high) / 2 - self.none
        return (self.value - self.none) / theirs >= FAINT

    @property
    def agrees(self) -> bool:
        return self.close if self.none is None else self.on_its_side


def held(label: str, holds: bool) -> Case:
    """Gives a case of a claim without a number: it holds or it does not."""
    return Case(label, float(holds), 1.0, 1.0, 0.5)


class Judged(NamedTuple):
    """A verdict and what it rests on."""

    verdict: str
    cases: int
    agree: int
    close: int
    median: float
    least: float
    most: float


def judge(cases: Sequence[Case], *, with_number: bool = True) -> Judged:
    """Gives the verdict of the rules above. Cases whose value is NaN (nothing to compare) do not count."""
    counted = [case for case in cases if not math.isnan(case.value)]
    if not counted:
        return Judged(UNTESTABLE, 0, 0, 0, math.nan, math.nan, math.nan)
    agree, close = sum(case.agrees for case in counted), sum(case.close for case in counted)
    enough = SHARE * len(counted)
    full = enough if with_number else len(counted)
    verdict = REPRODUCED if close >= full else DIRECTION if agree >= enough else CONTRADICTED
    values = sorted(case.value for case in counted)
    return Judged(verdict, len(counted), agree, close, _median(values), values[0], values[-1])


def _median(values: Sequence[float]) -> float:
    """Gives the middle value; the mean of two, unless one is infinite."""
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return low if low == high else (low + high) / 2


def ratio(one: float, other: float) -> float:
    """Gives `one` / `other`: infinite if only the latter is zero, NaN if both are."""
    if other == 0:
        return math.nan if one == 0 else math.inf
    return one / other


def cut_pct(before: float, after: float) -> float:
    """By how much `after` is less than `before`, in %; NaN if there was nothing to cut."""
    return math.nan if before == 0 else 100 * (1 - after / before)


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-a: share of pairs in the same order minus share in the opposite one. NaN below two items."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if len(a) < 2:
        return math.nan
    above = np.triu_indices(len(a), 1)
    return float(np.mean((np.sign(a[:, None] - a) * np.sign(b[:, None] - b))[above]))
