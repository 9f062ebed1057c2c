"""Numbers of docs/reference_model.md: what studies find of the model that comes with the package."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from experiments import hidden_prefetch, routing
from experiments.documenting.blocks import table
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.hidden_prefetch.page import recalls, spent, stalls
from specmd_jax.report.pages.routing.page import side_by_side, specialised
from specmd_jax.report.pages.routing.table import traces_of
from specmd_jax.report.reader import read_rows


def beside(results: Path) -> str:
    """Gives a line per measure of routing, a column per trace."""
    rows = _routing(results)
    return table(*side_by_side(rows, traces_of(rows)))


def domains(results: Path) -> str:
    """Says how far experts belong to domains."""
    rows = _routing(results)
    return "".join(f"- {text}\n" for name in traces_of(rows) for text, _ in specialised(rows, name))


def recall(results: Path) -> str:
    """Gives a line per predictor: how many of the next layer's experts it names."""
    return table(*recalls(_hidden(results)))


def work(results: Path) -> str:
    """Gives a line per predictor that computes: its work at a visit."""
    return table(*spent(_hidden(results)))


def saved(results: Path) -> str:
    """Gives a line per link and predictor: the stall that it saves."""
    return table(*stalls(_hidden(results)))


@functools.cache
def _routing(results: Path) -> list[Row]:
    routing.main(["--out", str(results / "routing")])
    return read_rows(results / "routing")


@functools.cache
def _hidden(results: Path) -> list[Row]:
    hidden_prefetch.main(["--out", str(results / "hidden_prefetch")])
    return read_rows(results / "hidden_prefetch")


STUDIED: Mapping[str, Callable[[Path], str]] = MappingProxyType(
    {"routing": beside, "domains": domains, "recall": recall, "work": work, "saved": saved}
)
"""Block -> what makes it of a study's results folder, which it fills first; minutes."""
