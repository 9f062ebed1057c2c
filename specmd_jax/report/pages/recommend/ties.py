"""Which of two cells is faster, if the requests tell: a bootstrap over requests of the time of a decode pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specmd_jax.report.columns import Row
from specmd_jax.report.rows import Floats, number

DRAWS, SEED, COVERAGE = 2000, 0, 0.95
SAME = 0.01
"""A smaller difference is a tie, however sure it is."""


def rank(row: Row) -> tuple[float, float]:
    """Less is better: TPOT, then TTFT."""
    return number(row, "tpot_s"), number(row, "ttft_s")


def interval(row: Row) -> tuple[float, float] | None:
    """Gives the bootstrap interval of TPOT in seconds; None where fewer than two requests were counted."""
    spent = _spent(row)
    if len(spent[0]) < 2:
        return None
    low, high = np.quantile(_drawn(*spent), _ENDS)
    return float(low), float(high)


def tied(row: Row, base: Row) -> bool:
    """Whether TPOT differs by less than 1 %, or by less than the spread over requests, which are paired."""
    change = number(row, "tpot_s") / number(base, "tpot_s") - 1
    mine, theirs = _spent(row), _spent(base)
    if abs(change) < SAME:
        return True
    if len(mine[0]) < 2 or len(mine[0]) != len(theirs[0]):
        return False
    low, high = np.quantile(_drawn(*mine) / _drawn(*theirs) - 1, _ENDS)
    return bool(low <= 0 <= high)


def each(row: Row, name: str) -> Floats:
    """Gives a column that has a number for each request."""
    return np.array(str(row[name] or "").split(), np.float64)


def best_of(rows: Sequence[Row]) -> Row:
    """Gives the plainest of the cells that tie with the fastest: without prefetching, then LRU, then the fastest."""
    fastest = min(rows, key=rank)
    equal = [row for row in rows if tied(row, fastest)]
    return min(equal, key=lambda row: (row["prefetch"] != "none", row["eviction"] != "lru", *rank(row)))


_ENDS = ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2)


def _spent(row: Row) -> tuple[Floats, Floats]:
    """Gives the seconds and the number of decode passes of each request."""
    seconds, passes = each(row, "request_decode_s"), each(row, "request_decodes")
    return seconds[passes > 0], passes[passes > 0]


def _drawn(seconds: Floats, passes: Floats) -> Floats:
    """Gives TPOT over requests drawn with replacement, the same ones for every row with as many."""
    chosen = np.random.default_rng(SEED).integers(0, len(seconds), (DRAWS, len(seconds)))
    return seconds[chosen].sum(axis=1) / passes[chosen].sum(axis=1)
