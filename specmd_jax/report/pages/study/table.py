"""The table and the cells of a study: rows by place (a cache and a link), and what the cells cost."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.rows import number

CELLS = "cells"
KEY = ("eviction", "prefetch", "capacity_bytes", "link_bytes_per_s")
COLUMNS: dict[str, Column] = {
    "model": Column("str", "model"),
    "contract": Column("str", "replay contract"),
    "eviction": Column("str", "eviction policy"),
    "prefetch": Column("str", "predictor"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_pct": Column("float", "cache size as a share of all experts, in %"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "link_bytes_per_s": Column("float", "rate of the link"),
    "cells": Column("int", "values of the policy's number that were tried"),
    "number": Column("str", "the number that was varied; empty: none"),
    "value": Column("float", "its best value"),
    "tpot_s": Column("float", "mean time of a decode pass with that value, seconds"),
    "tpot_default_s": Column("float", "the same with the policy's default"),
    "tpot_worst_s": Column("float", "the same with the worst value"),
    "hit_rate": Column("float", "hits over demanded experts with the best value, 0 to 1"),
    "stall_s": Column("float", "time that the device waits for experts"),
    "link_bytes": Column("int", "bytes copied over the link, prefetched ones included"),
    "evidence": Column("str", "simulated"),
}
TABLE = Table("study", COLUMNS, KEY)
TIE_PCT = 1.0
"""Mixes within this much of the best TPOT share a place."""

Mix = tuple[str, str]


class Place(NamedTuple):
    """A capacity and a link, with the row of every mix."""

    capacity_bytes: int
    link_bytes_per_s: float
    rows: dict[Mix, Row]

    @property
    def best(self) -> Mix:
        return min(self.rows, key=lambda mix: number(self.rows[mix], "tpot_s"))

    @property
    def tied(self) -> list[Mix]:
        """Gives the mixes within a tie of the best, the best first."""
        least = number(self.rows[self.best], "tpot_s")
        near = [mix for mix, row in self.rows.items() if number(row, "tpot_s") <= least * (1 + TIE_PCT / 100)]
        return sorted(near, key=lambda mix: number(self.rows[mix], "tpot_s"))

    def gain_pct(self, base: Mix) -> float:
        """Gives what the best takes less than `base`."""
        return 100 * (1 - number(self.rows[self.best], "tpot_s") / number(self.rows[base], "tpot_default_s"))


def places(rows: Sequence[Row]) -> list[Place]:
    found: dict[tuple[int, float], dict[Mix, Row]] = {}
    for row in rows:
        key = int(number(row, "capacity_bytes")), number(row, "link_bytes_per_s")
        found.setdefault(key, {})[str(row["eviction"]), str(row["prefetch"])] = row
    return [Place(*key, found[key]) for key in sorted(found)]


class Cost(NamedTuple):
    """What the cells took, by the clock of the runs that replayed them."""

    cells: int
    visits: int  # of one cell
    took_s: float
    devices: tuple[str, ...]

    @property
    def rate(self) -> float:
        return self.cells * self.visits / self.took_s


def cost_of(out: Path) -> Cost:
    cells, visits, took_s, devices = 0, 0, 0.0, set[str]()
    for path in sorted((out / CELLS).glob("*.npz")):
        try:
            with np.load(path) as file:
                cells += file["tpot_s"].size
                visits, took_s = int(file["visits"]), took_s + float(file["took_s"])
                devices.add(str(file["device"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise SpecmdError(f"{path}: not a file of cells ({error}); delete it and run the study again") from error
    return Cost(cells, visits, took_s, tuple(sorted(devices)))


def base_of(mixes: Sequence[Mix]) -> Mix:
    """Gives the mix that others are held against: lru without prefetch, or the first."""
    return ("lru", "none") if ("lru", "none") in mixes else mixes[0]


def first_of(place: Place) -> Row:
    return next(iter(place.rows.values()))
