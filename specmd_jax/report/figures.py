"""Figures as PNG files. Matplotlib without a display."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure

from specmd_jax.files import whole_file
from specmd_jax.report.reader import FIGURES

DPI = 144


def save(figure: Figure, out: str | os.PathLike[str], name: str) -> Path:
    """Writes ``figures/<name>.png`` in the folder `out`, the same bytes for the same figure; gives its path."""
    target = Path(out) / FIGURES / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return target
