"""The page of `experiments.starts`, drawn from its table: what a profile is worth, and where pinning loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.charts import Chart, Field, lines
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.document import Document, Said, sentence
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import looks
from specmd_jax.units import GIB

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
    said: list[str] = []
    pins = [name for name in cells if name.endswith("pinned") and name.startswith(f"{PLAIN},")]
    for size, row in sorted(cells[PLAIN].items()):
        plain, where = number(row, "miss_pct"), f"at {number(row, 'capacity_pct'):.0f} %"

        def miss(name: str, size: int = size) -> float:
            return number(cells[name][size], "miss_pct")

        warm = miss(f"{PLAIN}, warm start")
        best = min(pins, key=miss) if pins else "static"
        said.append(
            f"{where} {PLAIN} misses {plain:.2f} %, warm-started {warm:.2f} % ({_change(warm, plain)}), static "
            f"{miss('static'):.2f} % ({_change(miss('static'), plain)}), {best} {miss(best):.2f} % "
            f"({_change(miss(best), plain)}), belady {miss('belady'):.2f} %"
        )
    sizes = sorted(cells[PLAIN])
    for name in [*pins, "static"]:
        lost = [s for s in sizes if number(cells[name][s], "misses") > number(cells[PLAIN][s], "misses")]
        said.append(f"{name} loses to {PLAIN} at {len(lost)} of {len(sizes)} sizes")
    return said


def _change(found: float, plain: float) -> str:
    """Gives a number of misses against another."""
    change = 100 * (found / plain - 1) if plain else 0.0
    return "as many" if abs(change) < 0.5 else f"{abs(change):.0f} % {'more' if change > 0 else 'fewer'}"


def title(cells: Cells) -> str:
    """States what a warm start is worth where it is worth most, and whether pinning beats recency."""
    warm, plain = cells[f"{PLAIN}, warm start"], cells[PLAIN]
    model = next(iter(plain.values()))["model"]
    size = max(plain, key=lambda size: number(plain[size], "miss_pct") - number(warm[size], "miss_pct"))
    found, base = number(warm[size], "miss_pct"), number(plain[size], "miss_pct")
    if base <= found:
        return f"{model}: a warm start saves no misses"
    return (
        f"{model}: begun with a profile's most used experts, {PLAIN} misses {_change(found, base)} with "
        f"{number(plain[size], 'capacity_pct'):.0f} % cached"
    )


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; the findings as text for a terminal."""
    manifest, rows = read_manifest(out), read_rows(out)
    cells, config = cells_of(rows), manifest["config"]
    page = Document(title(cells), manifest)
    source = next((str(row["profile"]) for row in rows if row["profile"] is not None), "none")
    cache = (
        "a cache that begins anew before each request" if config["reset_per_request"] else "one cache for all of them"
    )
    found = findings(cells)
    page.answer([Said(sentence(line, cells), "simulated") for line in found])
    page.text(
        f"Simulated on recorded routing ({config['tokens'] or 'all'} tokens of every other request, event contract, "
        f"scope {config['scope']}, no prefetch, {cache}). Profile: {source}. Misses in % of "
        "the demanded experts, those of the cold start included. Static and pinned caches begin with what they keep; "
        "beside it they begin empty. Belady and belady_bypass know the future and bound caches that begin as they do."
    )
    sizes = sorted(cells[PLAIN])
    order = sorted(cells, key=lambda name: number(cells[name][sizes[-1]], "misses"))
    _views(page, cells, order)
    page.heading("Misses, % of demand")
    heads = [f"{number(cells[PLAIN][size], 'capacity_pct'):.0f} % of experts" for size in sizes]
    page.table(
        ("cache", *heads),
        [[name, *(f"{number(cells[name][size], 'miss_pct'):.2f}" for size in sizes)] for name in order],
    )
    return "\n".join([*found, *map(str, page.save(out))])


PCT, MISSES = Field("pct", "cache size, % of all experts", ".3~g"), Field("misses", "misses, % of demand", ".2f")
TOLD = (
    Field("series", "cache"),
    PCT,
    Field("gib", "GiB", ".2f"),
    Field("cycles", "token cycles", ".2f"),
    MISSES,
    Field("against", "against lru, %", "+.1f"),
    Field("admitted", "demand copies that stayed", ",d"),
)


def _views(page: Document, cells: Cells, order: Sequence[str]) -> None:
    """Adds misses against capacity, and against LRU that begins empty."""
    page.data(
        "rows",
        [
            {
                "series": name,
                "start": str(row["start"]),
                "pinned": f"{100 * number(row, 'pin_share'):g} %",
                "admission": str(row["admission"]),
                "pct": number(row, "capacity_pct"),
                "gib": size / GIB,
                "cycles": number(row, "cycles"),
                "misses": number(row, "miss_pct"),
                "against": 100 * (number(row, "misses") / number(cells[PLAIN][size], "misses") - 1)
                if number(cells[PLAIN][size], "misses")
                else None,
                "admitted": row["admitted"],
            }
            for name in order
            for size, row in sorted(cells[name].items())
        ],
    )
    page.filters(start="start", pinned="pinned", admission="admission")
    fair = [name for name in order if not name.startswith("belady")]
    shown = {PLAIN, f"{PLAIN}, warm start", "static", "belady", *fair[:3]}
    found = looks(order)
    page.series({name: found[name] for name in order}, [name for name in order if name in shown], "caches, best first")
    middle = sorted(cells[PLAIN])[len(cells[PLAIN]) // 2]
    where = f"{number(cells[PLAIN][middle], 'capacity_pct'):.0f} %"
    best = min(fair, key=lambda name: number(cells[name][middle], "misses"))
    told = "; ".join(f"{name} {number(cells[name][middle], 'miss_pct'):.1f} %" for name in order)
    few = {"dots": True, "y_scale": {"zero": True}}
    page.chart(
        Chart(
            f"At {where} {best} misses least: {number(cells[best][middle], 'miss_pct'):.1f} % (simulated)",
            f"Misses against cache size. At {where}: {told}.",
            lines(PCT, MISSES, TOLD, **few), ("rows",), {"table": "rows", "x": "pct", "y": "misses"},
        )
    )  # fmt: skip
    change = number(cells["static"][middle], "misses") / max(number(cells[PLAIN][middle], "misses"), 1) - 1
    page.chart(
        Chart(
            f"A static set misses {abs(100 * change):.0f} % {'more' if change > 0 else 'less'} than {PLAIN} at {where} "
            "(simulated)",
            f"Misses against those of {PLAIN} that begins empty; below zero is better.",
            lines(PCT, Field("against", f"misses against {PLAIN}, %"), TOLD, dots=True),
            ("rows",), {"table": "rows", "x": "pct", "y": "against"},
        )
    )  # fmt: skip
    page.rows("rows", TOLD, "Every cache at every size")
