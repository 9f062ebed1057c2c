"""What `experiments.pack_moe` prints, from its table alone: bits per byte before and after, against the bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.reader import ROWS, read_rows
from specmd_jax.report.rows import number, values
from specmd_jax.report.terminal import aligned

COLUMNS = {
    "domain": Column("str", "whose held-out text was read"),
    "tokens": Column("int", "tokens of it that were predicted"),
    "bits_per_byte": Column("float", "before packing; empty: those weights are not here"),
    "packed_bits_per_byte": Column("float", "packed: experts at int4, other matrices at int8"),
    "recorded_bits_per_byte": Column("float", "before packing, as recorded when it was done, of the same text"),
    "recorded_packed_bits_per_byte": Column("float", "the same, packed"),
    "evidence": Column("str", "measured"),
}
TABLE = Table("pack_moe", COLUMNS, ("domain",))
BAR_PCT = 2.0
"""Packing may cost so much, in % of the bits per byte."""
AS_RECORDED = 2e-3
"""Bits per byte that another machine or version may give: activations are in bfloat16."""
HEAD = ("domain", "tokens", "before", "packed", "change %", "recorded before", "recorded packed")


def draw(out: Path) -> str:
    """Gives the rows as text for a terminal, and what follows from them."""
    rows = read_rows(out)
    lines = aligned(HEAD, [*map(_cells, rows), _cells(mean(rows))])
    return "\n".join([*lines, *verdict(rows), str(out / ROWS)])


def mean(rows: Sequence[Row]) -> Row:
    """Gives the plain mean of the domains; empty where a domain lacks a number."""
    found: Row = {"domain": "mean", "tokens": sum(int(number(row, "tokens")) for row in rows)}
    for name in (name for name, column in COLUMNS.items() if column.kind == "float"):
        whole = all(row[name] is not None for row in rows)
        found[name] = float(values(rows, name).mean()) if whole else None
    return found


def verdict(rows: Sequence[Row]) -> list[str]:
    """Says what packing costs against the bar, and whether packed weights read as they were recorded to."""
    said, whole = [], mean(rows)
    for before, after, when in (
        ("bits_per_byte", "packed_bits_per_byte", "measured"),
        ("recorded_bits_per_byte", "recorded_packed_bits_per_byte", "recorded when it was packed"),
    ):
        if whole[before] is not None:
            cost = change_pct(whole, before, after)
            met = "within" if cost <= BAR_PCT else "beyond"
            said.append(f"packing costs {cost:+.2f} % in bits per byte ({when}): {met} the bar of {BAR_PCT:g} %")
    if whole["recorded_packed_bits_per_byte"] is not None:
        most = max(
            abs(number(row, "packed_bits_per_byte") - number(row, "recorded_packed_bits_per_byte")) for row in rows
        )
        word = "as recorded" if most <= AS_RECORDED else "NOT as recorded"
        said.append(f"the packed weights read {word}: {most:.4f} bits per byte apart at most, expected {AS_RECORDED:g}")
    return said


def change_pct(row: Row, before: str = "bits_per_byte", after: str = "packed_bits_per_byte") -> float:
    return 100 * (number(row, after) / number(row, before) - 1)


def _cells(row: Row) -> list[str]:
    def text(name: str) -> str:
        return "-" if row[name] is None else f"{number(row, name):.4f}"

    change = "-" if row["bits_per_byte"] is None else f"{change_pct(row):+.2f}"
    numbers = [text(name) for name in ("bits_per_byte", "packed_bits_per_byte")]
    then = [text(name) for name in ("recorded_bits_per_byte", "recorded_packed_bits_per_byte")]
    return [str(row["domain"]), f"{number(row, 'tokens'):.0f}", *numbers, change, *then]
