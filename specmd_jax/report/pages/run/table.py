"""The tables of a single replay: its metrics in one row, and beside it who was in the cache, stay by stay."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text
from specmd_jax.report.columns import DRAWN, Column, Row, Table
from specmd_jax.report.pages.sweep.table import COLUMNS, HOST_COLUMNS
from specmd_jax.report.reader import parse_rows

RESIDENCY = "residency.csv"
KEY = ("model", "eviction", "capacity_bytes")
OWN: dict[str, Column] = {
    "passes": Column("int", "passes of the replay: a prompt is one, a decoded token another"),
    "first_shown": Column("int", "first pass that residency.csv has"),
    "shown": Column("int", "how many passes it has"),
    "layers": Column("int", "layers with experts"),
    "experts": Column("int", "experts of a layer"),
}
_LEFT_OUT = ("gap_closed",)  # of several policies
_KINDS = {bool: "bool", int: "int", float: "float"}


def table_of(setting: Mapping[str, Any]) -> Table:
    """Gives the table of a replay with this setting (`Setting.row`)."""
    known = {name: column for name, column in (COLUMNS | HOST_COLUMNS).items() if name not in _LEFT_OUT}
    more = {
        name: Column(_KINDS.get(type(value), "str"), "of the setting, see specmd_jax.Setting")
        for name, value in setting.items()
        if name not in known and value is not None
    }
    return Table("run", known | more | OWN, KEY, beside=(*DRAWN, RESIDENCY))


def looked_into(trace: object, row: Row) -> str:
    """Says how to see one cell of another study over time; `row` names its policies and its cache."""
    prefetch = row.get("prefetch")
    ahead = "" if prefetch in (None, "none") else f" --prefetch {prefetch}"
    words = f"--trace {trace} --eviction {row['eviction']}{ahead} --capacity {row['capacity_bytes']} --out FOLDER"
    return f"Which experts such a cache holds, pass by pass, is on the page of: python -m experiments.run {words}"


class Stay(NamedTuple):
    """Passes, one after the other, in which an expert of a layer is in the same state."""

    layer: int
    expert: int
    first: int
    last: int
    state: str


_STAY = {"layer": "int", "expert": "int", "first": "int", "last": "int", "state": "str"}


def write_stays(path: str | os.PathLike[str], stays: Iterable[Stay]) -> None:
    """Writes a line for each stay, as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([Stay._fields, *stays])
    replace_text(path, text.getvalue())


def read_stays(path: Path) -> list[Stay]:
    """Gives what `write_stays` wrote. Raises `SpecmdError` naming the first line that is not one."""
    found: list[Stay] = []
    for number, row in enumerate(parse_rows(path, _STAY), start=2):
        if any(row[name] is None for name in _STAY) or not int(str(row["first"])) <= int(str(row["last"])):
            raise SpecmdError(f"{path}, line {number}: expected layer, expert, first and last pass, and a state")
        found.append(Stay(*row.values()))  # pyright: ignore[reportArgumentType]
    return found
