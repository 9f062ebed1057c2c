"""Rows of `experiments.benchmark`, one per number."""

from __future__ import annotations

from typing import Any

from specmd_jax.report.columns import Row


def row(what: str, value: float, unit: str, evidence: str = "measured", **rest: Any) -> Row:
    empty: Row = {"contract": None, "capacity_slots": None, "cycles": None, "repeats": None, "note": None}
    return {"what": what, "value": float(value), "unit": unit, "evidence": evidence, **empty, **rest}
