"""The page of `experiments.starts`, drawn from its table: what a profile is worth, and where pinning loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.document import Document
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number

COLUMNS: dict[str, Column] = {
    "model": Column("str", "model that the trace was captured from"),
    "eviction": Column("str", "eviction policy of what is not pinned"),
    "start": Column("str", "cold: the cache begins empty; warm: with the profile's most used experts"),
    "pin_share": Column("float", "share of the cache that the profile's most used experts keep for good"),
    "admission": Column("str", "which demand copies may stay"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_pct": Column("float", "cache size as a share of all experts, in %"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "demand": Column("int", "demanded experts, summed over visits"),
    "misses": Column("int", "demanded experts that were not resident"),
    "miss_pct": Column("float", "misses / demand, in %"),
    "admitted": Column("int", "demand copies that stayed; empty: not counted, as nothing is turned away"),
    "profile": Column("str", "where the profile comes from, and whether it saw the replayed requests"),
    "evidence": Column("str", "simulated"),
}
KEY = ("eviction", "start", "pin_share", "admission", "capacity_bytes")
TABLE = Table("starts", COLUMNS, KEY)
PLAIN = "lru"

Cells = dict[str, dict[int, Row]]  # mix -> capacity in bytes -> row


def name_of(row: Row) -> str:
    """Gives a mix in words."""
    parts = [str(row["eviction"])]
    if number(row, "pin_share"):
        share = 100 * number(row, "pin_share")
        parts = ["static"] if share == 100 else [*parts, f"{share:g} % pinned"]
    if row["start"] == "warm":
        parts.append("warm start")
    if row["admission"] != "always":
        parts.append(str(row["admission"]))
    return ", ".join(parts)


def cells_of(rows: Sequence[Row]) -> Cells:
    found: Cells = {}
    for row in rows:
        found.setdefault(name_of(row), {})[int(number(row, "capacity_bytes"))] = row
    return found


def findings(cells: Cells) -> list[str]:
    """Gives sentences that follow from the table."""
    lines: list[str] = []
    pins = [name for name in cells if name.endswith("pinned") and name.startswith(f"{PLAIN},")]
    for size, row in sorted(cells[PLAIN].items()):
        plain, where = number(row, "miss_pct"), f"at {number(row, 'capacity_pct'):.0f} %"

        def miss(name: str, size: int = size) -> float:
            return number(cells[name][size], "miss_pct")

        warm = miss(f"{PLAIN}, warm start")
        best = min(pins, key=miss) if pins else "static"
        lines.append(
            f"{where} {PLAIN} misses {plain:.2f} %, warm-started {warm:.2f} % ({_change(warm, plain)}), static "
            f"{miss('static'):.2f} % ({_change(miss('static'), plain)}), {best} {miss(best):.2f} % "
            f"({_change(miss(best), plain)}), belady {miss('belady'):.2f} %"
        )
    sizes = sorted(cells[PLAIN])
    for name in [*pins, "static"]:
        lost = [s for s in sizes if number(cells[name][s], "misses") > number(cells[PLAIN][s], "misses")]
        lines.append(f"{name} loses to {PLAIN} at {len(lost)} of {len(sizes)} sizes")
    return lines


def _change(found: float, plain: float) -> str:
    """Gives a number of misses against another."""
    change = 100 * (found / plain - 1) if plain else 0.0
    return "as many" if abs(change) < 0.5 else f"{abs(change):.0f} % {'more' if change > 0 else 'fewer'}"


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; the findings as text for a terminal."""
    manifest, rows = read_manifest(out), read_rows(out)
    cells, config = cells_of(rows), manifest["config"]
    page = Document(f"{rows[0]['model']}: what a profile of other requests is worth", manifest)
    source = next((str(row["profile"]) for row in rows if row["profile"] is not None), "none")
    cache = (
        "a cache that begins anew before each request" if config["reset_per_request"] else "one cache for all of them"
    )
    page.text(
        f"Simulated on recorded routing ({config['tokens'] or 'all'} tokens of every other request, event contract, "
        f"scope {config['scope']}, no prefetch, {cache}). Profile: {source}. Misses in % of "
        "the demanded experts, those of the cold start included. Static and pinned caches begin with what they keep; "
        "beside it they begin empty. Belady and belady_bypass know the future and bound caches that begin as they do."
    )
    page.heading("Findings")
    lines = findings(cells)
    page.bullets(lines)
    page.heading("Misses, % of demand")
    sizes = sorted(cells[PLAIN])
    heads = [f"{number(cells[PLAIN][size], 'capacity_pct'):.0f} % of experts" for size in sizes]
    order = sorted(cells, key=lambda name: number(cells[name][sizes[-1]], "misses"))
    page.table(
        ("cache", *heads),
        [[name, *(f"{number(cells[name][size], 'miss_pct'):.2f}" for size in sizes)] for name in order],
    )
    return "\n".join([*lines, *map(str, page.save(out))])
