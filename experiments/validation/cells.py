"""`published_cells`: measurements that others published, each with its source; beside the table, in ``cells.csv``."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError

CELLS = Path(__file__).with_name("cells.csv")
MISSES = ("fetch", "cpu", "split")
MISSES_FROM = ("hit rate", "copies", "resident", "share", "lru")


@dataclass(frozen=True)
class Cell:
    """One measurement. Empty texts and None are not published, or not needed."""

    id: str
    engine: str
    model: str
    precision: str
    device: str
    link_gb_per_s: float | None  # host or storage to device, as measured or nominal
    capacity: str
    policy: str
    batch: int
    context: str
    tokens_per_s: float
    hit_rate: float | None
    copies_per_token: float | None
    miss: str  # in `MISSES`
    misses_from: str  # in `MISSES_FROM`; empty: the cell cannot be expressed
    slots: int | None  # experts of a layer that LRU keeps, where nothing else says how many miss
    top_k: int | None  # None: the model's own
    ranks: int  # devices that share every matrix
    expert_bytes: int | None  # of one rank
    dense_bits: float | None  # of dense part and head; None: as published
    hardware: str  # as `specmd_jax.specs.hardware.hardware` reads it
    source: str
    assumed: str
    reason: str  # why it cannot be expressed; empty: it can


_READ: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}


def published_cells(path: Path = CELLS) -> list[Cell]:
    """Reads the table. Raises `SpecmdError` naming the file, the line and the column of what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecmdError(f"{path}: cannot read it: {error.strerror}") from error
    lines = csv.DictReader(text.splitlines())
    names = [one.name for one in fields(Cell)]
    if lines.fieldnames != names:
        raise SpecmdError(f"{path}: expected the columns {', '.join(names)}")
    cells = [_cell(row, f"{path}, line {number}") for number, row in enumerate(lines, 2)]
    if len({cell.id for cell in cells}) != len(cells):
        raise SpecmdError(f"{path}: two cells have the same id")
    return cells


def digest(path: Path = CELLS) -> str:
    """Gives the SHA-256 of the table."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cell(row: dict[str, str], place: str) -> Cell:
    values: dict[str, Any] = {}
    for one in fields(Cell):
        text, kind = row[one.name] or "", str(one.type)
        if "None" in kind and text == "":
            values[one.name] = None
            continue
        try:
            values[one.name] = _READ[kind.partition(" ")[0]](text)
        except ValueError:
            raise SpecmdError(f"{place}: {one.name} is {text!r}, expected {kind.partition(' ')[0]}") from None
    cell = Cell(**values)
    _check(cell, place)
    return cell


def _check(cell: Cell, place: str) -> None:
    for name in ("id", "engine", "model", "precision", "device", "source"):
        if not getattr(cell, name):
            raise SpecmdError(f"{place}: {name} is empty, expected a text")
    if not cell.tokens_per_s > 0:
        raise SpecmdError(f"{place}: tokens_per_s is {cell.tokens_per_s}, expected above 0")
    if cell.hit_rate is not None and not 0 <= cell.hit_rate <= 1:
        raise SpecmdError(f"{place}: hit_rate is {cell.hit_rate}, expected 0 to 1")
    if cell.miss not in MISSES:
        raise SpecmdError(f"{place}: miss is {cell.miss!r}, expected one of {', '.join(MISSES)}")
    if bool(cell.reason) == bool(cell.misses_from):
        raise SpecmdError(f"{place}: expected either misses_from or the reason why the cell cannot be expressed")
    needed = {"hit rate": cell.hit_rate, "copies": cell.copies_per_token, "lru": cell.slots}
    if not cell.reason:
        if cell.misses_from not in MISSES_FROM:
            raise SpecmdError(f"{place}: misses_from is {cell.misses_from!r}, expected one of {', '.join(MISSES_FROM)}")
        if needed.get(cell.misses_from, 0) is None or not cell.hardware or cell.expert_bytes is None:
            raise SpecmdError(f"{place}: expected hardware, expert_bytes and what misses_from asks for")


ENGINES: tuple[str, ...] = tuple(dict.fromkeys(cell.engine for cell in published_cells()))
"""Engines of the table, in its order."""
