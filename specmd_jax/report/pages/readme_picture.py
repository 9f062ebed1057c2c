"""The picture of the README: what a cache of each size gives, for some policies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from specmd_jax.files import whole_file

POLICIES = {
    "belady": ("knows the future", "#7f7f7f", (0, (5, 2))),
    "adaptive": ("adaptive (learns while it runs)", "#e08a00", "-"),
    "lfu_decay": ("lfu_decay (frequency)", "#1a9e77", "-"),
    "lru": ("lru (recency)", "#d1495b", "-"),
}
"""Policy -> what the picture calls it, its colour and its line."""
LOOKS = {"light": "#24292f", "dark": "#e6edf3"}
"""Name of a picture -> its ink; the ground is the page's."""


def draw(
    folder: Path, found: Mapping[str, Sequence[tuple[float, float]]], *, title: str, cycle_pct: float
) -> Iterator[Path]:
    """Writes one SVG per look into `folder`, the same bytes for the same numbers; gives their paths.

    Args:
      found: (cache size in % of all experts, hits in % of the uses) of each policy in `POLICIES`, by rising size.
      cycle_pct: what one token uses, in % of all experts.
    """
    for look, ink in LOOKS.items():
        with mpl.rc_context(_style(ink)):
            figure = Figure(figsize=(6.6, 4.1), layout="constrained")
            axes = figure.add_subplot()
            axes.axvline(cycle_pct, color=ink, linewidth=0.8, alpha=0.5)
            axes.text(cycle_pct + 0.6, 3, "what one token uses", fontsize=11, alpha=0.8)
            for name, (label, colour, dashes) in POLICIES.items():
                at, hits = zip(*found[name], strict=True)
                axes.plot(at, hits, color=colour, linestyle=dashes, linewidth=2.2, label=label)
            axes.set(xlim=(0, 100), ylim=(0, 101))
            axes.set_xlabel("experts that fit in the accelerator's memory, % of all")
            axes.set_ylabel("experts that are there when asked for, %")
            axes.set_title(title, fontsize=12, loc="left")
            axes.legend(loc="lower right", frameon=False, fontsize=11.5)
            axes.grid(alpha=0.18)
            axes.spines[["top", "right"]].set_visible(False)
            path = folder / f"capacity-{look}.svg"
            with whole_file(path) as file:
                figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            yield path


def _style(ink: str) -> Any:
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
