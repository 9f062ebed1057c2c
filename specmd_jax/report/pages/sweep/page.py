"""The page of `experiments.sweep` and its table for a terminal, drawn from its result folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.columns import Row
from specmd_jax.report.document import FAINT, STRONG, Document
from specmd_jax.report.figures import save
from specmd_jax.report.pages.run.table import looked_into
from specmd_jax.report.pages.sweep import pictures, views
from specmd_jax.report.pages.sweep.answer import TRAINED_NOTE, answer, at_sizes, stall_ms, title, winners
from specmd_jax.report.pages.sweep.counts import read_counts
from specmd_jax.report.pages.sweep.series import LOWER_BOUNDS, Setting, hardware_of, near, settings
from specmd_jax.report.pages.sweep.summary import (
    CAPACITIES_PCT,
    HEAD,
    TRAINED,
    best_online,
    size_line,
    small_cache_warning,
    start_lines,
    summary,
    table,
)
from specmd_jax.report.pages.sweep.table import COUNTS, REUSE
from specmd_jax.report.reader import ROWS, read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import looks


def draw(out: Path) -> str:
    """Writes report.html, report.md and its figures/*.png into `out`; gives its tables as text for a terminal."""
    groups = settings(read_rows(out))
    first = next(iter(groups.values()))
    page = Document(title(first), read_manifest(out))
    page.answer(answer(first))
    _charts(page, out, groups)
    paths: list[Path] = []
    for setting, rows in groups.items():
        drawn = _pictures(out, rows, f"-{setting.slug}" if len(groups) > 1 else "")
        _section(page, setting, rows, drawn)
        paths += drawn
    middle = at_sizes(first)[len(at_sizes(first)) // 2]
    page.text(looked_into(page.manifest["config"].get("trace"), (winners(middle) or middle)[0]))
    paths += [*page.save(out), out / ROWS]
    return "\n\n".join([*map(summary, groups.values()), "\n".join(map(str, paths))])


def _charts(page: Document, out: Path, groups: dict[Setting, list[Row]]) -> None:
    """Adds the choices, the charts and the table that they rule."""
    first = next(iter(groups.values()))
    kept, step = views.thinned(groups)
    names, named = views.order(first)
    more = {name for rows in groups.values() for name in views.order(rows)[0]}
    names += sorted(more - set(names))
    banded = views.bands(groups)
    page.data("rows", views.records(kept))
    page.data("marks", views.marks(kept))
    page.data("bands", banded)
    page.filters(setting="setting!", hardware="hardware!")
    trained = TRAINED_NOTE if any(name in TRAINED for name in names) else ""
    found = looks(sorted(names))
    page.series({name: found[name] for name in names}, named, "policies, best mean hit rate first", trained)
    for chart in views.charts(first, _titles(first), banded=bool(banded)):
        page.chart(chart)
    if (out / COUNTS).is_file():
        records, chart = views.routing(read_counts(out / COUNTS))
        page.data("routing", records)
        page.chart(chart)
    if (out / REUSE).is_file():
        records, chart = views.reuse(read_counts(out / REUSE))
        page.data("reuse", records)
        page.chart(chart)
    page.heading("All cells")
    if step > 1:
        page.text(f"One in {step} cache sizes is here; all of them are in rows.csv.")
    timed = any(hardware_of(rows) for rows in groups.values())
    page.rows("rows", [*views.COUNTED, *(views.TIMED if timed else ())], "Every policy at every cache size")


def _titles(rows: Sequence[Row]) -> dict[str, str]:
    """States what each chart shows, of the setting that is shown at first."""
    places = at_sizes(rows)
    middle = min(places, key=lambda cells: abs(number(cells[0], "capacity_pct") - 25))
    at = f"at {number(middle[0], 'capacity_pct'):.3g} %"
    evidence = str(middle[0]["evidence"]).split(",")[0]
    by_name = {str(row["eviction"]): row for row in middle}
    best, lru = winners(middle), by_name.get("lru")
    lead = str(best[0]["eviction"]) if best else str(middle[0]["eviction"])
    row = by_name[lead]
    said = {
        "hit": f"Hit rate: {lead} hits {100 * number(row, 'hit_rate'):.1f} % {at}",
        "misses": f"Misses: {lead} misses {1000 * (1 - number(row, 'hit_rate')):.0f} of 1000 {at}",
        "collisions": f"Collisions are {100 * number(row, 'collision_rate'):.1f} % of {lead}'s misses {at}",
    }
    if "belady" in by_name:
        room = 100 * (number(by_name["belady"], "hit_rate") - number(row, "hit_rate"))
        said["hit"] += f"; knowing the future would add {room:.1f} points"
    if hardware_of(rows):
        kind = f"on {row['hardware']}"
        said["stall"] = f"Stall: with {lead} a token waits {stall_ms(row):.3g} ms for experts {at} {kind}"
        said["speed"] = f"Speed: {lead} makes {number(row, 'tokens_per_s'):.3g} tokens a second {at} {kind}"
        if lru is not None and lead != "lru":
            said["stall"] += f", with lru {stall_ms(lru):.3g} ms"
            said["speed"] += f", lru {number(lru, 'tokens_per_s'):.3g}"
    return {name: f"{text} ({evidence})" for name, text in said.items()}


def _pictures(out: Path, rows: list[Row], suffix: str) -> list[Path]:
    """Draws the pictures of one setting, for the Markdown."""
    drawn = {"hit_rate": pictures.hit_rate(rows), "collisions": pictures.collisions(rows)}
    if hardware_of(rows):
        drawn["speed"] = pictures.speed(rows)
    return [save(figure, out, f"{name}{suffix}") for name, figure in drawn.items()]


def _section(page: Document, setting: Setting, rows: list[Row], drawn: list[Path]) -> None:
    page.heading(setting.title)
    for line in start_lines(rows):
        page.text(line)
    for path in drawn:
        page.picture(path, path.stem.replace("_", " "))
    head = ("cache", "best (within 1 %: a tie)", "hit %", "lru", "belady")
    page.table(head, [_place(cells) for cells in at_sizes(rows)])
    for capacity in near(rows, CAPACITIES_PCT):
        cells = [row for row in rows if number(row, "capacity_bytes") == capacity]
        page.heading(size_line(cells[0]), 3, html=False)
        if warning := small_cache_warning(cells[0]):
            page.warning(warning, html=False)
        body, best = table(cells), best_online(cells)
        names = [line[0].removesuffix(" *") for line in body]
        marks = {i: FAINT for i, name in enumerate(names) if name in LOWER_BOUNDS}
        if best is not None:
            marks[names.index(str(best["eviction"]))] = STRONG
        page.table([*HEAD, *(f"tok/s {kind}" for kind in hardware_of(rows))], body, marks, html=False)
    page.text("belady and belady_bypass (*) see the future: bounds, not policies to run.")
    if any(row["eviction"] in TRAINED for row in rows):
        page.text(TRAINED_NOTE)


def _place(cells: Sequence[Row]) -> list[str]:
    """Gives a capacity, who is best there, and the hits of others."""
    best, by_name = winners(cells), {row["eviction"]: row for row in cells}

    def hits(row: Row | None) -> str:
        return "-" if row is None else f"{100 * number(row, 'hit_rate'):.1f}"

    names = " = ".join(str(row["eviction"]) for row in best) or "-"
    others = [hits(by_name.get(name)) for name in ("lru", "belady")]
    return [size_line(cells[0]), names, hits(best[0] if best else None), *others]
