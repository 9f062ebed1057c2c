"""The page of `experiments.sweep` and its table for a terminal, drawn from its result folder alone."""

from __future__ import annotations

from pathlib import Path

from specmd_jax.report.columns import Row
from specmd_jax.report.document import FAINT, STRONG, Document
from specmd_jax.report.figures import save
from specmd_jax.report.pages.sweep import pictures
from specmd_jax.report.pages.sweep.counts import read_counts
from specmd_jax.report.pages.sweep.series import LOWER_BOUNDS, Setting, hardware_of, near, settings
from specmd_jax.report.pages.sweep.summary import (
    CAPACITIES_PCT,
    HEAD,
    best_online,
    size_line,
    small_cache_warning,
    start_lines,
    summary,
    table,
)
from specmd_jax.report.pages.sweep.table import COUNTS
from specmd_jax.report.reader import ROWS, read_manifest, read_rows
from specmd_jax.report.rows import number


def draw(out: Path) -> str:
    """Writes report.md, report.html and figures/*.png into `out`; gives its tables as text for a terminal."""
    groups = settings(read_rows(out))
    page = Document("Expert cache sweep", read_manifest(out))
    paths: list[Path] = []
    for setting, rows in groups.items():
        drawn = _pictures(out, rows, f"-{setting.slug}" if len(groups) > 1 else "")
        if not paths:
            drawn += _routing(out, setting)
        _section(page, setting, rows, drawn)
        paths += drawn
    paths += [*page.save(out, "report"), out / ROWS]
    return "\n\n".join([*map(summary, groups.values()), "\n".join(map(str, paths))])


def _pictures(out: Path, rows: list[Row], suffix: str) -> list[Path]:
    """Draws the pictures of one setting."""
    drawn = {"hit_rate": pictures.hit_rate(rows), "collisions": pictures.collisions(rows)}
    if hardware_of(rows):
        drawn["speed"] = pictures.speed(rows)
    return [save(figure, out, f"{name}{suffix}") for name, figure in drawn.items()]


def _routing(out: Path, setting: Setting) -> list[Path]:
    """Draws how often each expert is routed to, by id and sorted, if the folder says so."""
    if not (out / COUNTS).is_file():
        return []
    counts, title = read_counts(out / COUNTS), f"{setting.model}, {setting.tokens:,} tokens, as recorded in the trace"
    ways = {"routing": False, "routing_sorted": True}
    return [save(pictures.routing(counts, title, ordered), out, name) for name, ordered in ways.items()]


def _section(page: Document, setting: Setting, rows: list[Row], drawn: list[Path]) -> None:
    page.heading(setting.title)
    for line in start_lines(rows):
        page.text(line)
    for path in drawn:
        page.picture(path, path.stem.replace("_", " "))
    for capacity in near(rows, CAPACITIES_PCT):
        cells = [row for row in rows if number(row, "capacity_bytes") == capacity]
        page.heading(size_line(cells[0]), 3)
        if warning := small_cache_warning(cells[0]):
            page.warning(warning)
        body, best = table(cells), best_online(cells)
        names = [line[0].removesuffix(" *") for line in body]
        marks = {i: FAINT for i, name in enumerate(names) if name in LOWER_BOUNDS}
        if best is not None:
            marks[names.index(str(best["eviction"]))] = STRONG
        page.table([*HEAD, *(f"tok/s {kind}" for kind in hardware_of(rows))], body, marks)
    page.text("* sees the future: a bound, not a policy to run. The best policy that does not is in bold.")
