"""The picture of the README, replayed: what a cache of each size gives on a bundled trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from specmd_jax import bundled, sweep
from specmd_jax.report.pages import readme_picture

TRACE, TOKENS = "gpt-oss-20b", 8_000
SIZES_PCT = (4, 6, 8, 10, 11, 12, 12.5, 13, 15, 18, 22, 25, 30, 35, 40, 45, 50, 60, 70, 80, 90, 100)


def draw(folder: Path) -> Iterator[Path]:
    """Replays, and writes the pictures into `folder`; gives their paths."""
    trace = bundled(TRACE, tokens=TOKENS)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in readme_picture.POLICIES}
    for row in sweep(trace, eviction=list(found), capacity=[f"{size:g}%" for size in SIZES_PCT]):
        found[row["eviction"]].append((row["capacity_pct"], 100 * row["hit_rate"]))
    title = f"{trace.model}, {TOKENS:,} recorded tokens, replayed"
    curves = {name: sorted(points) for name, points in found.items()}
    yield from readme_picture.draw(folder, curves, title=title, cycle_pct=100 * trace.top_k / trace.experts)
