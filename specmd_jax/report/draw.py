"""A result folder -> all its pictures and its page. Imports no jax, so that it works years later and elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text
from specmd_jax.report import figures, html
from specmd_jax.report.series import hardware_of, settings
from specmd_jax.report.table import COUNTS, FIGURES, REPORT, Row, read_counts, read_manifest, read_rows


def draw(out_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw ``figures/*.png`` and ``report.html`` in a result folder from its table; their paths, the page last.

    Raises `SpecmdError` if the folder holds no results, or a table without rows.
    """
    out = Path(out_dir)
    manifest, rows = read_manifest(out), read_rows(out)
    if not rows:
        raise SpecmdError(f"{out}: the table has no rows yet")
    groups = settings(rows)
    sections: list[tuple[list[Row], list[Path]]] = []
    for setting, group in groups.items():
        suffix = f"-{setting.slug}" if len(groups) > 1 else ""
        sections.append((group, _pictures(out / FIGURES, group, suffix)))
    if (out / COUNTS).is_file():
        first = next(iter(groups))
        counts, title = read_counts(out / COUNTS), f"{first.model}, {first.tokens:,} tokens, as recorded in the trace"
        for name, ordered in (("routing", False), ("routing_sorted", True)):
            picture = figures.save(figures.routing(counts, title, ordered), out / FIGURES / f"{name}.png")
            sections[0][1].append(picture)
    replace_text(out / REPORT, html.page(manifest, sections))
    return [*(path for _, pictures in sections for path in pictures), out / REPORT]


def _pictures(folder: Path, rows: list[Row], suffix: str) -> list[Path]:
    """The pictures of one setting."""
    drawn = {"hit_rate": figures.hit_rate(rows), "collisions": figures.collisions(rows)}
    if hardware_of(rows):
        drawn["speed"] = figures.speed(rows)
    return [figures.save(figure, folder / f"{name}{suffix}.png") for name, figure in drawn.items()]
