"""Which requests a predictor learns from, which choose its settings, and which judge it: whole groups of requests."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.types import Trace

UNITS = ("request", "category", "dataset")


class Split(NamedTuple):
    """Request numbers; no group of requests is in two parts."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def groups(trace: Trace, unit: str) -> npt.NDArray[np.str_]:
    """Gives the group of each request [R], from the trace's meta (a row per request) or the request itself."""
    if unit not in UNITS:
        raise unknown("unit of a split", unit, UNITS)
    rows = trace.meta.get("requests")
    if unit == "request":
        return np.array([f"{r:06d}" for r in range(trace.requests)])
    if not isinstance(rows, list) or len(rows) != trace.requests or not all(unit in row for row in rows):
        raise SpecmdError(f"{trace.model}: meta names no {unit} of each request; split by request instead")
    return np.array([str(row[unit]) for row in rows])


def split(trace: Trace, unit: str = "category", seed: int = 0, *, validation: float = 0.1, test: float = 0.2) -> Split:
    """Draws a number of 0..1 for each group from its name and `seed`: the lowest are the test, the next the validation.

    A group is therefore in the same part whichever other requests a trace holds, so that a predictor trained on all of
    a collection can be judged on a part of it. `validation` and `test` are the expected shares of the groups; a part
    that would be empty takes the next group.

    Raises SpecmdError for an unknown unit, a trace without that unit, or fewer than three groups.
    """
    group = groups(trace, unit)
    names = np.unique(group)
    if len(names) < 3:
        raise SpecmdError(f"{trace.model}: {len(names)} groups by {unit}, expected at least 3 to train, validate, test")
    drawn = np.array([_drawn(str(name), seed) for name in names])
    names, drawn = names[np.argsort(drawn)], np.sort(drawn)
    first = min(max(1, int(np.sum(drawn < test))), len(names) - 2)
    second = min(max(first + 1, int(np.sum(drawn < test + validation))), len(names) - 1)
    parts = (names[second:], names[first:second], names[:first])
    return Split(*(np.flatnonzero(np.isin(group, part)) for part in parts))


def _drawn(name: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
