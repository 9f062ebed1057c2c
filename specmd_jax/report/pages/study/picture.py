"""The picture of a study in its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from specmd_jax.report.pages.study.table import TIE_PCT, Place, base_of, first_of
from specmd_jax.report.rows import mix_name, number
from specmd_jax.report.style import looks


def picture(every: Sequence[Place], config: dict[str, Any]) -> Figure:
    """Left: the best mix at each place. Right: what it takes less than lru without prefetch, or than the first mix."""
    mixes = list(every[0].rows)
    base = base_of(mixes)
    capacities = sorted({place.capacity_bytes for place in every})
    links = sorted({place.link_bytes_per_s for place in every})
    best, gain = (np.zeros((len(links), len(capacities))) for _ in range(2))
    percent = np.zeros(len(capacities))
    for place in every:
        at = links.index(place.link_bytes_per_s), capacities.index(place.capacity_bytes)
        gain[at] = place.gain_pct(base)
        best[at] = mixes.index(place.best) if gain[at] > TIE_PCT else len(mixes)
        percent[at[1]] = number(first_of(place), "capacity_pct")
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    x, y = _edges(percent), _edges(np.array(links) / 1e9)
    style = looks(mix_name(*mix) for mix in mixes)
    colors = [*(style[mix_name(*mix)].color for mix in mixes), "#F4F4F4"]
    norm = BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    left.pcolormesh(x, y, best, cmap=ListedColormap(colors), norm=norm)
    left.set_title("best mix, each with its best value", fontsize=10)
    named = [*(mix_name(*mix) for mix in mixes), f"{mix_name(*base)} is within {TIE_PCT:g} %"]
    handles = [Patch(color=colors[i], label=name) for i, name in enumerate(named) if (best == i).any()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9, frameon=False)
    drawn = right.pcolormesh(x, y, gain, cmap="viridis", vmin=0)
    figure.colorbar(drawn, ax=right, label=f"TPOT less than {mix_name(*base)}'s, %")
    right.set_title(f"what it gains on {mix_name(*base)}", fontsize=10)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("cache, % of all experts")
        ticks = [t for t in (5, 10, 20, 40, 80) if x[0] <= t <= x[-1]]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    ticks = [t for t in (2, 4, 8, 16, 32, 64) if y[0] <= t <= y[-1]]
    left.set_yticks(ticks, [str(t) for t in ticks])
    left.set_ylabel("link, GB/s")
    figure.suptitle(
        f"{config['trace']}, {config['tokens'] or 'all'} tokens, {config['hardware']} but for the link (simulated)",
        fontsize=11,
    )  # fmt: skip
    return figure


def _edges(centres: Any) -> Any:
    """Borders between values evenly spaced in proportion."""
    logs = np.log(centres)
    middle = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]]))
