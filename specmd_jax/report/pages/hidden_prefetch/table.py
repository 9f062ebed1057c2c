"""The table of `experiments.hidden_prefetch`, and how its rows are found again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.rows import number

COLUMNS: dict[str, Column] = {
    "study": Column("str", "texts, training, recall, cost, replay; done: a study has all its rows"),
    "measure": Column("str", "what the value is"),
    "predictor": Column("str", "what predicts; a map names the activations that it sees"),
    "ahead": Column("int", "layers from those activations to the predicted router; 0: the same layer's"),
    "count": Column("float", "experts predicted for a layer, in units of K"),
    "layer": Column("int", "predicted layer; empty: all that are predicted"),
    "capacity": Column("str", "cache size"),
    "link": Column("str", "layer times that a copy takes, or a preset"),
    "value": Column("float", "a share is 0 to 1"),
    "low": Column("float", "lower end of the central 95 % of a bootstrap over texts"),
    "high": Column("float", "upper end"),
    "evidence": Column("str", "measured, simulated or estimated"),
}
KEY = ("study", "measure", "predictor", "ahead", "count", "layer", "capacity", "link")
TABLE = Table("hidden_prefetch", COLUMNS, KEY)
DONE = "done"

IDS, GATE = "learned from ids", "gate_ahead"
AFTER, BEFORE = "map after attention", "map before attention"
NONE, BOUND = "none", "perfect"


def low_rank(rank: int) -> str:
    """Names a smaller map."""
    return f"{BEFORE}, rank {rank}"


def found(rows: Sequence[Row], study: str, measure: str, **wanted: object) -> Iterator[Row]:
    """Gives the rows of a measure with these cells; of all layers together where none is asked for."""
    wanted = {"layer": None, "study": study, "measure": measure} | wanted
    return (row for row in rows if all(row[name] == value for name, value in wanted.items()))


def value(rows: Sequence[Row], study: str, measure: str, **wanted: object) -> float:
    """Gives the number of the first such row; NaN if there is none."""
    return next((number(row, "value") for row in found(rows, study, measure, **wanted)), math.nan)
