"""What `experiments.benchmark` prints, from its table alone."""

from __future__ import annotations

from pathlib import Path

from specmd_jax.report.charts import Field
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.reader import ROWS, read_manifest, read_rows
from specmd_jax.report.rows import number

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
TABLE = Table("benchmark", COLUMNS, KEY)


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; gives a line per number, in the order in which they were measured,
    as text for a terminal.
    """
    rows = read_rows(out)
    page = Document(f"{rows[0]['what']}: {_shown(rows[0])} ({rows[0]['evidence']})", read_manifest(out))
    page.answer(
        [Said(f"{row['what']}: {_shown(row)}", str(row["evidence"])) for row in rows if row["value"] is not None]
    )
    page.data("rows", [{"section": str(row["section"])} | {name: row[name] for name in COLUMNS} for row in rows])
    page.filters(section="section", evidence="evidence", contract="contract")
    page.heading("All numbers")
    page.rows("rows", [Field(name, name.replace("_", " ")) for name in COLUMNS], "Every number")
    return "\n".join([*map(line, rows), *map(str, page.save(out)), str(out / ROWS)])


def _shown(row: Row) -> str:
    value = number(row, "value")
    return f"{f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'} {row['unit']}"


def line(row: Row) -> str:
    """Gives a row in words."""
    size = f", {row['capacity_slots']} slots (C/T {row['cycles']})" if row["capacity_slots"] else ""
    how = f"{row['evidence']}, {row['contract']}{size}" if row["contract"] else row["evidence"]
    note = f"; {row['note']}" if row["note"] else ""
    return f"{row['section']:>12}: {row['what']}: {_shown(row)} [{how}]{note}"
