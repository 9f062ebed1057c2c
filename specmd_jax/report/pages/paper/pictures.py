"""The pictures of `experiments.paper`'s page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper.points import MISS_RULES, MIXES, PREDICTORS, SYSTEMS, Point
from specmd_jax.report.pages.paper.results import MIDDLE, ONLINE, Results, run_bits
from specmd_jax.report.rows import number
from specmd_jax.report.style import looks

SHOWN = ("lru", "score", "least_stale", "least_stale_literal", "lfu", "fld")


def _panels(count: int, across: int, size: tuple[float, float], title: str) -> tuple[Figure, list]:
    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(max(10.5, size[0] * across), size[1] * down + 0.9), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for extra in axes[count:]:
        extra.remove()
    figure.suptitle(title, fontsize=12)
    return figure, axes[:count]


def collisions(results: Results, traces: Sequence[str], evidence: str) -> Figure:
    """Misses of each policy and the collisions among them at each capacity; a panel for each trace and reading."""
    cells = [(trace, bits) for trace in traces for bits in results.bits]
    figure, axes = _panels(
        len(cells), 2 * len(results.bits), (4.4, 3.1), f"Collisions (dark) within all misses, no prefetch; {evidence}"
    )
    style = looks(SHOWN)
    for ax, (trace, bits) in zip(axes, cells, strict=True):
        for i, name in enumerate(SHOWN):
            rows = [results.get(trace, Point(name, bits=(float(bits),)), pct) for pct in paper.CAPACITIES_PCT]
            demand = [number(r, "demand") if r is not None else math.nan for r in rows]
            where = np.arange(len(rows)) + (i - (len(SHOWN) - 1) / 2) * 0.13
            for column, alpha in (("misses", 0.35), ("collisions", 1.0)):
                heights = [
                    100 * number(r, column) / d if r is not None else 0 for r, d in zip(rows, demand, strict=True)
                ]
                ax.bar(
                    where,
                    heights,
                    0.115,
                    color=style[name].color,
                    alpha=alpha,
                    hatch="//" if "literal" in name else None,
                    edgecolor="white",
                    linewidth=0.3,
                    label=name if column == "collisions" else None,
                )
        ax.set_xticks(range(len(paper.CAPACITIES_PCT)), [f"{pct:g} %" for pct in paper.CAPACITIES_PCT])
        ax.set_title(f"{trace}, {bits} bit", fontsize=9.5)
        ax.set_ylim(0, 102)
        _plain(ax)
    axes[0].set_ylabel("% of demanded experts")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(SHOWN), frameon=False, fontsize=9)
    return figure


def layers(results: Results, traces: Sequence[str], evidence: str) -> Figure:
    names = ("lru", "score", "least_stale", "least_stale_literal")
    title = f"Collisions by layer at 5 %, {results.bits[0]} bit, no prefetch; {evidence}"
    figure, axes = _panels(len(traces), 4, (4.4, 3.1), title)
    style = looks(names)
    for ax, trace in zip(axes, traces, strict=True):
        for name in names:
            rows = results.layers(trace, Point(name, bits=(float(results.bits[0]),)), MIDDLE)
            heights = [100 * number(r, "collisions") / max(1, number(r, "demand")) for r in rows]
            ax.plot(
                range(len(rows)),
                heights,
                label=name,
                color=style[name].color,
                linestyle=style[name].linestyle,
                linewidth=1.6,
            )
        ax.set_title(trace, fontsize=9.5)
        ax.set_xlabel("layer")
        ax.set_ylim(bottom=0)
        _plain(ax)
    axes[0].set_ylabel("collisions, % of demand")
    handles, shown = axes[0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def prefetch(results: Results) -> Figure:
    """Draws stall against no prefetch, by predictor and capacity."""
    traces = list(results.evidence)
    figure, axes = _panels(
        len(traces), 4, (4.4, 3.2), "Stall of each predictor, relative to no prefetch (LRU, 4 bit); lower is better"
    )
    colors = ("#777777", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#000000", "#CC79A7")
    for ax, trace in zip(axes, traces, strict=True):
        shown = [
            (name, color, [results.get(trace, point, pct) for pct in paper.CAPACITIES_PCT])
            for (name, point), color in zip(PREDICTORS.items(), colors, strict=True)
        ]
        shown = [
            (n, c, r)
            for n, c, r in shown
            if r[0] is not None and not (n.startswith("gate") and r[0]["prefetch"] != "gate_ahead")
        ]
        base = [number(row, "stall_s") if row else math.nan for row in shown[0][2]]
        for i, (name, color, rows) in enumerate(shown[1:]):
            heights = [
                number(r, "stall_s") / b if r is not None and b > 0 else 0 for r, b in zip(rows, base, strict=True)
            ]
            ax.bar(np.arange(len(rows)) + (i - (len(shown) - 2) / 2) * 0.15, heights, 0.13, color=color, label=name)
        ax.axhline(1, color="#444444", linewidth=1)
        ax.set_xticks(range(len(paper.CAPACITIES_PCT)), [f"{pct:g} %" for pct in paper.CAPACITIES_PCT])
        ax.set_title(trace, fontsize=9.5)
        _plain(ax)
    axes[0].set_ylabel("stall / stall without prefetch")
    labelled = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        labelled.values(),
        labelled.keys(),
        loc="outside lower center",
        ncols=min(4, max(1, len(labelled))),
        frameon=False,
        fontsize=9,
    )
    return figure


def miss_rules(results: Results) -> Figure:
    traces = [t for t in results.evidence if results.get(t, Point(miss="cpu", bits=(4.0, 8.0)), MIDDLE) is not None]
    title = "Miss rules at 5 % (LRU, no prefetch, 8:4 bit): speed and precision; outer ring: gate mass lost"
    figure, axes = _panels(len(traces), 4, (4.4, 3.4), title)
    colors = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
    for ax, trace in zip(axes, traces, strict=True):
        for place, (rule, color) in enumerate(zip(MISS_RULES, colors, strict=True)):
            row = results.get(trace, Point(miss=rule, bits=(4.0, 8.0)), MIDDLE)
            assert row is not None  # all rules are replayed together
            x, y = 1e3 * number(row, "tpot_s"), run_bits(row)
            ax.scatter(x, y, s=150 - 20 * place, color=color, label=rule, zorder=3)  # equal points show as rings
            ax.scatter(x, y, s=150 + 4000 * number(row, "lost_mass"), facecolors="none", edgecolors=color, zorder=2)
        ax.set_title(trace, fontsize=9.5)
        ax.set_xlabel("TPOT, ms")
        ax.set_ylim(3.5, 8.5)
        ax.set_xlim(left=0)
        _plain(ax)
    axes[0].set_ylabel("mean bits run (proxy)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def mixes(found: dict[str, dict[str, Row]]) -> Figure:
    figure, axes = _panels(
        len(found), 4, (4.4, 3.2), "TTFT of each mix at 5 %, relative to #1: the paper's (grey) and ours (blue)"
    )
    for ax, (trace, rows) in zip(axes, found.items(), strict=True):
        table = paper.MIX_TTFT_MS_AND_TOKENS_PER_S
        theirs = [table[name][trace][0] / table["#1"][trace][0] for name in MIXES]
        ours = [number(rows[name], "ttft_s") / number(rows["#1"], "ttft_s") for name in MIXES]
        where = np.arange(len(MIXES))
        ax.bar(where - 0.2, theirs, 0.38, color="#AAAAAA", label="paper")
        ax.bar(where + 0.2, ours, 0.38, color="#0072B2", label="simulated on synthetic routing")
        ax.axhline(1, color="#444444", linewidth=1)
        ax.set_xticks(where, list(MIXES), fontsize=9)
        ax.set_title(trace, fontsize=9.5)
        _plain(ax)
    axes[0].set_ylabel("TTFT / TTFT of #1")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def drop_in(cells: dict[tuple[str, str], tuple[float, float]]) -> Figure:
    traces = list(dict.fromkeys(trace for trace, _ in cells))
    figure, axes = _panels(
        len(traces), 4, (4.4, 3.2), "Time saved by Least-Stale at 5 %: the paper's (grey) and ours (blue)"
    )
    for ax, trace in zip(axes, traces, strict=True):
        systems = [system for system in SYSTEMS if (trace, system) in cells]
        where = np.arange(len(systems))
        ax.bar(
            where - 0.2,
            [cells[trace, s][0] for s in systems],
            0.38,
            color="#AAAAAA",
            label="paper (its mean, for recorded traces)",
        )
        ax.bar(where + 0.2, [cells[trace, s][1] for s in systems], 0.38, color="#0072B2", label="simulated")
        ax.axhline(0, color="#444444", linewidth=1)
        ax.set_xticks(where, systems, fontsize=8.5)
        ax.set_title(trace, fontsize=9.5)
        _plain(ax)
    axes[0].set_ylabel("TTFT (or TPOT) saved, %")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def rankings(results: Results) -> Figure:
    """Heat map: misses of each policy against LRU, by trace and capacity."""
    names = [name for name in ONLINE if name != "lru"]
    columns = [(t, b, pct) for t in results.evidence for b in results.bits for pct in paper.CAPACITIES_PCT]
    table = np.full((len(names), len(columns)), np.nan)
    for j, (trace, bits, pct) in enumerate(columns):
        base = results.get(trace, Point(bits=(float(bits),)), pct)
        for i, name in enumerate(names):
            row = results.get(trace, Point(name, bits=(float(bits),)), pct)
            if row is not None and base is not None and number(base, "misses") > 0:
                table[i, j] = 100 * (number(row, "misses") / number(base, "misses") - 1)
    figure = Figure(figsize=(max(7.0, 2.2 + 0.42 * len(columns)), 1.9 + 0.62 * len(names)), layout="constrained")
    ax = figure.add_subplot()
    limit = max(5.0, float(np.nanquantile(np.abs(table), 0.9))) if np.isfinite(table).any() else 5.0
    image = ax.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            ax.text(
                j,
                i,
                f"{value:+.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(value) > 0.65 * limit else "#222222",
            )
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_xticks(range(len(columns)), [f"{pct:g}%" for _, _, pct in columns], fontsize=7)
    width = len(paper.CAPACITIES_PCT)
    for k in range(0, len(columns), width):
        ax.axvline(k - 0.5, color="white", linewidth=2)
        trace, bits, _ = columns[k]
        ax.text(
            k + (width - 1) / 2,
            -0.6,
            f"{trace.removeprefix('bigmoe-')}\n{bits} bit",
            ha="center",
            va="bottom",
            fontsize=6.5,
        )
    figure.colorbar(image, ax=ax, label="misses against LRU, %", pad=0.01)
    figure.suptitle("Misses against LRU by regime (blue: fewer), no prefetch", fontsize=12)
    return figure


def _plain(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#EEEEEE", zorder=0)
    ax.set_axisbelow(True)
