"""The page of `experiments.run`, from its tables alone: what one replay comes to, and who was in its cache when."""

from __future__ import annotations

from pathlib import Path

from specmd_jax.report.columns import Row
from specmd_jax.report.document import Document, Said
from specmd_jax.report.pages.run import views
from specmd_jax.report.pages.run.table import RESIDENCY, read_stays
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import mix_name, number
from specmd_jax.units import GIB


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; gives their paths for a terminal."""
    manifest, (row,) = read_manifest(out), read_rows(out)
    page = Document(title(row), manifest)
    page.answer(answer(row))
    stays = read_stays(out / RESIDENCY)
    if stays:
        page.data("stays", views.records(stays))
        page.data("layers", views.by_layer(stays, row))
        page.filters(layer="layer!")
        page.text(_shown(row))
        for chart in views.charts(stays, row):
            page.chart(chart)
    page.heading("All numbers")
    columns = manifest["columns"]
    page.table(
        ("simulated", "value"),
        [[f"{name}: {columns[name]['meaning']}", _text(value)] for name, value in row.items() if value is not None],
    )
    return "\n".join(map(str, page.save(out)))


def title(row: Row) -> str:
    """States what was hit."""
    return (
        f"{row['model']}: {mix_name(str(row['eviction']), str(row['prefetch']))} hits "
        f"{100 * number(row, 'hit_rate'):.1f} % with {number(row, 'capacity_pct'):.3g} % of the experts cached"
    )


def answer(row: Row) -> list[Said]:
    size = f"{number(row, 'capacity_bytes') / GIB:.2f} GiB, {number(row, 'capacity_slots'):,.0f} experts"
    lacked = f"Of {number(row, 'demand'):,.0f} demanded experts {number(row, 'misses'):,.0f} were not in a cache"
    said = [Said(f"{lacked} of {size}", "simulated")]
    if row["tokens_per_s"] is not None:
        kind = row["hardware"]
        said.append(Said(f"It decodes {number(row, 'tokens_per_s'):.3g} tokens a second on {kind}", "simulated"))
    if row["stall_s"] is not None and number(row, "tokens"):
        waits_ms = 1000 * number(row, "stall_s") / number(row, "tokens")
        said.append(Said(f"A token waits {waits_ms:.3g} ms for experts, on average", "simulated"))
    return said


def _shown(row: Row) -> str:
    """Says which passes the charts have."""
    first, shown, passes = (int(number(row, name)) for name in ("first_shown", "shown", "passes"))
    part = f"all {passes:,} passes" if shown == passes else f"{shown:,} of {passes:,} passes, from pass {first:,} on"
    cut = "" if shown == passes else " More would make the page too large."
    return (
        f"The charts have {part}: a prompt is a pass, a decoded token another.{cut} What an expert is in a pass: kept "
        "(in the cache when the pass ends, and not asked for), copied early (the same, and it came in this pass), or, "
        "where it was asked for, a hit, a hit on what was copied early, a miss, or not copied at all (dropped, "
        "replaced or run on the host). Blank: it was not in the cache."
    )


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
