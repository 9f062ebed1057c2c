"""Pictures of a sweep and of a trace's routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.sweep.series import (
    LOWER_BOUNDS,
    curves,
    hardware_of,
    mean_hit_rate,
    one_cycle,
    one_setting,
    per_1000,
)
from specmd_jax.report.rows import Floats, number, values
from specmd_jax.report.style import Look, looks
from specmd_jax.units import MIB

_CYCLE: dict[str, Any] = {"color": "#444444", "linewidth": 1.0, "linestyle": (0, (2, 2)), "zorder": 2}
SPARSE = 25  # with fewer capacities, each is shown by a dot


def hit_rate(rows: Sequence[Row]) -> Figure:
    """Hit rate against capacity, a line per policy, with the room that Belady's bounds leave above the best of them.

    Dark band: between `belady` (forced admission) and `belady_bypass`. Light band: from the best policy that does not
    see the future up to `belady`. Either is left out if its policies are not in `rows`. Raises `SpecmdError` if `rows`
    mix settings.
    """
    setting, lines = one_setting(rows), curves(rows)
    figure = Figure(figsize=(11.5, 6.6), layout="constrained")
    axes = figure.add_subplot()
    order = sorted(lines, key=lambda name: -mean_hit_rate(lines[name]))
    style = looks(sorted(lines))

    handles: list[Any] = []
    for index, name in enumerate(order):
        cells = lines[name]
        handles += _line(axes, cells, 100 * values(cells, "hit_rate"), name, style[name], index)
    handles += _bands(axes, lines)
    handles += _capacity_axes(axes, rows, ticks=11)
    axes.set_ylim(0, 102)
    axes.set_ylabel("hit rate (% of demanded experts)")
    _legend(figure, handles, "policies, best mean\nhit rate first")
    _title(figure, "Hit rate against cache size", setting.title)
    return figure


def collisions(rows: Sequence[Row]) -> Figure:
    """Collisions (left) and all misses (right) per 1000 demanded experts against capacity, on one logarithmic scale.

    The scale is linear below 0.1 so that zero has a place. Raises `SpecmdError` if `rows` mix settings.
    """
    setting, lines = one_setting(rows), curves(rows)
    figure = Figure(figsize=(14.0, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    order = sorted(lines, key=lambda name: -mean_hit_rate(lines[name]))
    style = looks(sorted(lines))
    handles: list[Any] = []
    for index, name in enumerate(order):
        cells = lines[name]
        _line(left, cells, per_1000(cells, "collisions"), name, style[name], index)
        handles += _line(right, cells, per_1000(cells, "misses"), name, style[name], index)
    cycle: list[Any] = []
    for axes, what in ((left, "collisions: evicted and missed again in one pass"), (right, "all misses")):
        cycle = _capacity_axes(axes, rows, ticks=6)
        axes.set_title(what, fontsize=10, pad=8)
    handles += cycle
    left.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    left.set_ylim(-0.012, 1500)
    left.set_yticks([0, 0.1, 1, 10, 100, 1000], ["0", "0.1", "1", "10", "100", "1000"])
    left.yaxis.set_minor_locator(SymmetricalLogLocator(base=10, linthresh=0.1, subs=list(range(2, 10))))
    left.set_ylabel("per 1000 demanded experts")
    right.tick_params(labelleft=True)
    _legend(figure, handles, "policies, best mean\nhit rate first")
    _title(figure, "Collisions beside all misses", setting.title)
    return figure


def speed(rows: Sequence[Row]) -> Figure:
    """Tokens per second against capacity, a panel per kind of hardware. Raises `SpecmdError` if `rows` have none."""
    setting, kinds = one_setting(rows), hardware_of(rows)
    if not kinds:
        raise SpecmdError("the table has no hardware: give --hardware to the sweep for times")
    means = {name: mean_hit_rate(cells) for name, cells in curves(rows).items()}
    order = sorted(means, key=lambda name: -means[name])
    style = looks(sorted(order))
    across = min(2, len(kinds))
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(4.0 + 5.4 * across, 1.2 + 5.2 * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    handles: list[Any] = []
    for axes, kind in zip(panels, kinds, strict=False):
        lines = curves(rows, kind)
        handles = []
        for index, name in enumerate(name for name in order if name in lines):
            cells = lines[name]
            handles += _line(axes, cells, values(cells, "tokens_per_s"), name, style[name], index)
        handles += _capacity_axes(axes, rows, ticks=6)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens a second")
        axes.set_title(kind, fontsize=10, pad=8)
    for axes in panels[len(kinds) :]:
        axes.remove()
    _legend(figure, handles, "policies, best mean\nhit rate first")
    _title(figure, "Speed against cache size", setting.title)
    return figure


def _line(axes: Axes, cells: Sequence[Row], height: Floats, name: str, look: Look, index: int) -> list[Any]:
    """Draws one policy. Markers are sparse and start at another place on each line, so that they do not pile up."""
    count = len(cells)
    dots = count < SPARSE
    step = max(1, count // 9)
    return axes.plot(
        values(cells, "capacity_pct"),
        height,
        color=look.color,
        linestyle=look.linestyle,
        linewidth=look.linewidth,
        zorder=look.zorder,
        marker=look.marker or ("." if dots else ""),
        markersize=4.5,
        markevery=1 if dots else ((index * 3) % step, step),
        label=name,
    )


def _bands(axes: Axes, lines: dict[str, list[Row]]) -> list[Any]:
    """Shades what the bounds leave, at the capacities that all curves share."""
    if "belady" not in lines:
        return []
    online = [name for name in lines if name not in LOWER_BOUNDS]
    shared = sorted(set.intersection(*({row["capacity_bytes"] for row in cells} for cells in lines.values())))  # pyright: ignore[reportArgumentType]

    def at_shared(name: str, column: str) -> Floats:
        return values([row for row in lines[name] if row["capacity_bytes"] in set(shared)], column)

    pct, forced = at_shared("belady", "capacity_pct"), 100 * at_shared("belady", "hit_rate")
    found: list[Any] = []
    if "belady_bypass" in lines:
        bypass = 100 * at_shared("belady_bypass", "hit_rate")
        label = "belady to belady_bypass:\nout of reach above"
        found.append(axes.fill_between(pct, forced, bypass, color="#555555", alpha=0.35, lw=0, zorder=1.5, label=label))
    if online:
        best = 100 * np.max([at_shared(name, "hit_rate") for name in online], axis=0)
        label = "best policy to belady:\nwhat foresight would add"
        room = axes.fill_between(pct, best, forced, where=forced > best, color="#F0E442", alpha=0.35, lw=0, label=label)
        found.append(room)
    return found


def _capacity_axes(axes: Axes, rows: Sequence[Row], ticks: int) -> list[Any]:
    """Capacity in % and MiB below, in token cycles above; a line, which is returned, where one token cycle fits."""
    cycle = one_cycle(rows)
    most = max(rows, key=lambda row: number(row, "capacity_pct"))
    mib_per_pct = number(most, "capacity_bytes") / number(most, "capacity_pct") / MIB
    end = number(most, "capacity_pct")
    axes.set_xlim(0, end * 1.005)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda pct, _: f"{pct:g} %\n{pct * mib_per_pct:,.0f} MiB"))
    axes.tick_params(labelsize=8.5)
    axes.set_xlabel("cache size (share of all experts, MiB)")
    functions = (lambda pct: np.asarray(pct) / cycle, lambda cycles: np.asarray(cycles) * cycle)
    above = axes.secondary_xaxis("top", functions=functions)
    above.set_xlabel("cache size in token cycles (C/T)", fontsize=9)
    above.tick_params(labelsize=8.5)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    if cycle <= end:
        return [axes.axvline(cycle, **_CYCLE, label="one token cycle (C/T = 1)")]
    return []


def _legend(figure: Figure, handles: Sequence[Any], title: str) -> None:
    """Beside the panels, never over the lines."""
    figure.legend(
        handles=handles,
        title=title,
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
        title_fontsize=8.5,
        handlelength=3.4,
        labelspacing=0.55,
        alignment="left",
    )


def _title(figure: Figure, what: str, setting: str) -> None:
    figure.suptitle(f"{what}\n{setting}", fontsize=11, x=0.01, ha="left")
