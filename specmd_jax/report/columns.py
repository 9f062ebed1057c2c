"""What a table of results is made of: typed columns, rows, and what tells its cells apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from specmd_jax.errors import SpecmdError, unknown

Scalar = int | float | str | bool | None
Row = dict[str, Scalar]

KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


class Column(NamedTuple):
    """A column of a table: `kind` is one of int, float, str, bool; any cell may also be empty (None)."""

    kind: str
    meaning: str


DRAWN = ("figures/*.png", "report.md", "report.html")
"""What a page is made of, as patterns of files in a result folder."""


class Table(NamedTuple):
    """The table that a study writes.

    `name` is the study's, as in ``python -m experiments.<name>``; the columns of `key` tell cells apart. `beside` are
    patterns of files in the result folder that belong to the rows and go with them when a new table begins.
    """

    name: str
    columns: Mapping[str, Column]
    key: tuple[str, ...]
    beside: tuple[str, ...] = DRAWN


def described(columns: Mapping[str, Column]) -> dict[str, dict[str, str]]:
    """Gives columns as JSON holds them. Raises `SpecmdError` for a kind that there is not."""
    for name, column in columns.items():
        if column.kind not in KINDS:
            raise unknown(f"kind of column {name}", column.kind, KINDS)
    return {name: column._asdict() for name, column in columns.items()}


def cell_text(name: str, kind: str, value: Scalar) -> str:
    """Writes a value as a CSV cell; `cell_value` reads it. Raises `SpecmdError` if it is not of the column's kind."""
    if value is None:
        return ""
    accepted = (int, float) if kind == "float" else KINDS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        raise SpecmdError(f"column {name}: expected {kind}, got {type(value).__name__} {value!r}")
    if isinstance(value, str) and (value == "" or "\n" in value or "\r" in value):
        raise SpecmdError(f"column {name}: expected one line of text, got {value!r}")
    return repr(float(value)) if kind == "float" else str(value)


def cell_value(kind: str, text: str) -> Scalar:
    """Gives the value of a cell. Raises `ValueError` if it is not of this kind."""
    if text == "":
        return None
    if kind == "bool":
        if text not in ("True", "False"):
            raise ValueError
        return text == "True"
    if kind == "str":
        return text
    return int(text) if kind == "int" else float(text)
