"""The picture of the README: what a cache of each size gives, for some policies, on a bundled trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from specmd_jax import bundled, sweep
from specmd_jax.files import whole_file

TRACE, TOKENS = "gpt-oss-20b", 8_000
SIZES_PCT = (4, 6, 8, 10, 11, 12, 12.5, 13, 15, 18, 22, 25, 30, 35, 40, 45, 50, 60, 70, 80, 90, 100)
POLICIES = {
    "belady": ("knows the future", "#7f7f7f", (0, (5, 2))),
    "online": ("online (learns while it runs)", "#e08a00", "-"),
    "lfu_decay": ("lfu_decay (frequency)", "#1a9e77", "-"),
    "lru": ("lru (recency)", "#d1495b", "-"),
}
"""Policy -> what the picture calls it, its colour and its line."""
LOOKS = {"light": "#24292f", "dark": "#e6edf3"}
"""Name of a picture -> its ink; the ground is the page's."""
CYCLE = "what one token uses"


def curves() -> dict[str, list[tuple[float, float]]]:
    """Gives (cache size in % of all experts, hits in % of the uses) of each policy."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
    sizes = [f"{size:g}%" for size in SIZES_PCT]
    for row in sweep(bundled(TRACE, tokens=TOKENS), eviction=list(POLICIES), capacity=sizes):
        found[row["eviction"]].append((row["capacity_pct"], 100 * row["hit_rate"]))
    return {name: sorted(points) for name, points in found.items()}


def draw(folder: Path) -> Iterator[Path]:
    """Writes one SVG per look into `folder`, the same bytes for the same numbers; gives their paths."""
    found, trace = curves(), bundled(TRACE, tokens=1)
    for look, ink in LOOKS.items():
        with mpl.rc_context(_style(ink)):
            figure = Figure(figsize=(6.6, 4.1), layout="constrained")
            axes = figure.add_subplot()
            cycle = 100 * trace.top_k / trace.experts
            axes.axvline(cycle, color=ink, linewidth=0.8, alpha=0.5)
            axes.text(cycle + 0.6, 3, CYCLE, fontsize=11, alpha=0.8)
            for name, (label, colour, dashes) in POLICIES.items():
                at, hits = zip(*found[name], strict=True)
                axes.plot(at, hits, color=colour, linestyle=dashes, linewidth=2.2, label=label)
            axes.set(xlim=(0, 100), ylim=(0, 101))
            axes.set_xlabel("experts that fit in the accelerator's memory, % of all")
            axes.set_ylabel("experts that are there when asked for, %")
            axes.set_title(f"{trace.meta['model']}, {TOKENS:,} recorded tokens, replayed", fontsize=12, loc="left")
            axes.legend(loc="lower right", frameon=False, fontsize=11.5)
            axes.grid(alpha=0.18)
            axes.spines[["top", "right"]].set_visible(False)
            path = folder / f"capacity-{look}.svg"
            with whole_file(path) as file:
                figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            yield path


def _style(ink: str) -> dict[Any, Any]:
    """Gives the colours of a look; text stays text, in the reader's own font."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        "svg.fonttype": "none",
        "svg.hashsalt": "specmd-jax",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 12,
    }
