"""Rows of a table as numbers and names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row

Floats = npt.NDArray[np.float64]


def number(row: Row, name: str) -> float:
    """Gives a number of a row; NaN for an empty cell."""
    value = row[name]
    if isinstance(value, str):
        raise SpecmdError(f"column {name}: expected a number, got {value!r}")
    return float("nan") if value is None else float(value)


def values(rows: Sequence[Row], name: str) -> Floats:
    """Gives a column [n] as float64, NaN for empty cells."""
    return np.array([number(row, name) for row in rows], dtype=np.float64)


def mix_name(eviction: str, prefetch: str) -> str:
    """ "lru", or "lru + transition"."""
    return eviction if prefetch == "none" else f"{eviction} + {prefetch}"
