"""The table of `experiments.benchmark`: a row a number."""

from __future__ import annotations

from typing import Any

from specmd_jax.report.table import Column, Row

COLUMNS: dict[str, Column] = {
    "section": Column("str", "what is compared"),
    "what": Column("str", "what is measured"),
    "value": Column("float", "the number"),
    "unit": Column("str", "its unit"),
    "evidence": Column("str", "measured; counted (exact); extrapolated (from a measured slice)"),
    "contract": Column("str", "event or sequential, where a trace is replayed"),
    "capacity_slots": Column("str", "slots of the cache, or their range"),
    "cycles": Column("str", "C/T: capacity over what a token needs in all layers, or its range"),
    "repeats": Column("int", "runs that the median is taken over"),
    "note": Column("str", "what else there is to know"),
}
KEY = ("section", "what")


def row(what: str, value: float, unit: str, evidence: str = "measured", **rest: Any) -> Row:
    empty: Row = {"contract": None, "capacity_slots": None, "cycles": None, "repeats": None, "note": None}
    return {"what": what, "value": float(value), "unit": unit, "evidence": evidence, **empty, **rest}


def shown(row: Row) -> str:
    value = row["value"]
    assert isinstance(value, float)
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    size = f", {row['capacity_slots']} slots (C/T {row['cycles']})" if row["capacity_slots"] else ""
    how = f"{row['evidence']}, {row['contract']}{size}" if row["contract"] else row["evidence"]
    note = f"; {row['note']}" if row["note"] else ""
    return f"{row['section']:>12}: {row['what']}: {shown} {row['unit']} [{how}]{note}"
