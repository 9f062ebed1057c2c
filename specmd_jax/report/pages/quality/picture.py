"""Quality against speed as a picture: a panel for each cache size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.quality.front import SAFE_PCT, at, family, front, sizes
from specmd_jax.report.pages.quality.table import EVIDENCE
from specmd_jax.report.rows import Floats, number, values
from specmd_jax.report.style import categories


def _ticks(times_ms: Floats) -> list[float]:
    """Gives 1, 2 and 5 times powers of ten within some times."""
    low, high = float(times_ms.min()), float(times_ms.max())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        step * 10.0**power for power in powers for step in (1, 2, 5) if low * 0.99 <= step * 10.0**power <= high * 1.01
    ]


def picture(rows: Sequence[Row]) -> Figure:
    """Change of bits per byte with its standard error against the time of a token; a line joins the front."""
    caps = sizes(rows)
    figure = Figure(figsize=(1.2 + 4.2 * len(caps), 4.6), layout="constrained")
    panels = figure.subplots(1, len(caps), squeeze=False)[0]
    style = categories(family(row) for row in rows)
    for axes, pct in zip(panels, caps, strict=True):
        here = at(rows, pct)
        best = front(here)
        axes.axhspan(-1, SAFE_PCT, color="#888888", alpha=0.12, linewidth=0)
        axes.plot(1e3 * values(best, "tpot_s"), values(best, "change_pct"), color="#444444", linewidth=0.9, zorder=2)
        for name, look in style.items():
            mine = [row for row in here if family(row) == name]
            axes.errorbar(
                1e3 * values(mine, "tpot_s"), values(mine, "change_pct"), values(mine, "change_se_pct"), label=name,
                color=look.color, marker="o", markersize=5, linewidth=0, elinewidth=0.8, zorder=3,
            )  # fmt: skip
        for row in best:
            axes.annotate(
                str(row["rule"]), (1e3 * number(row, "tpot_s"), number(row, "change_pct")), textcoords="offset points",
                xytext=(5, 5), fontsize=7,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=-0.6)
        axes.set_yticks([0, 1, 2, 10, 100], ["0", "1", "2", "10", "100"])
        axes.minorticks_off()
        axes.set_xticks(ticks := _ticks(1e3 * values(here, "tpot_s")), [f"{tick:g}" for tick in ticks])
        axes.set_title(f"{pct:g} % of the bytes at 16 bits", fontsize=9.5)
        axes.set_xlabel("time of a token (ms, simulated)")
        axes.grid(alpha=0.25, linewidth=0.6)
    panels[0].set_ylabel("bits per byte, change in % (measured)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8.5)
    figure.suptitle(f"{rows[0]['model']}: {EVIDENCE}", fontsize=10.5, x=0.01, ha="left")
    return figure
