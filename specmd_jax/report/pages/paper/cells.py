"""Numbers as the cells of the page's tables show them; NaN, nothing to show, is a dash."""

from __future__ import annotations

import math

from specmd_jax.report.columns import Row
from specmd_jax.report.rows import number


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f} %"


def change(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * (value - 1):+.1f} %"


def milliseconds(row: Row, name: str) -> str:
    value = number(row, name)
    return "-" if math.isnan(value) else f"{1e3 * value:,.1f}"


def short(value: float) -> str:
    return "-" if math.isnan(value) else "inf" if math.isinf(value) else f"{value:.3g}"
