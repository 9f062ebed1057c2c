"""The table of `experiments.routing`, and how its rows are found again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.rows import number

COLUMNS: dict[str, Column] = {
    "trace": Column("str", "recorded routing"),
    "model": Column("str", "model that it was captured from"),
    "measure": Column("str", "what is counted; `specmd_jax/trace/measures.py` has the definitions"),
    "policy": Column("str", "eviction or prefetch policy"),
    "layer": Column("int", "MoE layer; empty: the mean of all"),
    "place": Column("float", "quantile, lag in tokens, distance in shares of the experts, first token of a window, "
                    "or experts predicted in units of K"),
    "capacity": Column("str", "cache size"),
    "domain": Column("str", "kind of text"),
    "expert": Column("int", "expert of the layer"),
    "value": Column("float", "a share is 0 to 1; distances are experts or tokens, as the measure says"),
    "low": Column("float", "lower end of the central 95 % of a bootstrap over requests; empty: fewer than 5 requests"),
    "high": Column("float", "upper end"),
    "evidence": Column("str", "measured: counted on the recorded routing; simulated: by a replay of it"),
}  # fmt: skip
KEY = ("trace", "measure", "policy", "layer", "place", "capacity", "domain", "expert")
TABLE = Table("routing", COLUMNS, KEY)
DONE = "done"


def traces_of(rows: Sequence[Row]) -> list[str]:
    """Gives the names of the traces, in order."""
    return list(dict.fromkeys(str(row["trace"]) for row in rows))


def found(rows: Sequence[Row], measure: str, **wanted: object) -> Iterator[Row]:
    """Gives the rows of a measure with these cells; where ``layer`` is not asked for, those of all layers together."""
    wanted = {"layer": None, "measure": measure} | wanted
    return (row for row in rows if all(row[name] == value for name, value in wanted.items()))


def value(rows: Sequence[Row], measure: str, **wanted: object) -> float:
    """Gives the number of the one such row; NaN if there is none."""
    return next((number(row, "value") for row in found(rows, measure, **wanted)), math.nan)
