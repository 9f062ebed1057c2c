"""What more memory buys: the cells that nothing beats, as rows and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from specmd_jax.report.columns import Row
from specmd_jax.report.rows import mix_name, number, values
from specmd_jax.report.style import looks
from specmd_jax.units import GIB, MIB

_DASHES = {"none": "-", "previous": (0, (5, 1.5)), "transition": (0, (1, 1.2)), "gate_ahead": (0, (5, 1.5, 1, 1.5))}


def front(rows: Sequence[Row], cost: str, size: str = "memory_bytes") -> list[Row]:
    """Gives the rows that no other row beats in both `size` and `cost` (less is better), by rising size."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (number(row, size), number(row, cost))):
        if not kept or number(row, cost) < number(kept[-1], cost):
            kept.append(row)
    return kept


def pareto(rows: Sequence[Row], memory_bytes: int, title: str, target_s: float | None = None) -> Figure:
    """TPOT and traffic against accelerator memory: a line per mix, dots for the front."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    panels = figure.subplots(1, 2)
    mixes = list(dict.fromkeys((str(row["eviction"]), str(row["prefetch"])) for row in rows))
    style = looks(sorted({eviction for eviction, _ in mixes}))
    panel_of = (
        ("bytes_per_token", 1 / MIB, "copied over the link (MiB a token)"),
        ("tpot_s", 1e3, "time of a decode pass, TPOT (ms)"),  # last: its handles, with the target, are the legend's
    )
    handles: list[Any] = []
    for axes, (column, scale, label) in zip(reversed(panels), panel_of, strict=True):
        handles = []
        for eviction, prefetch in mixes:
            line = sorted(
                (r for r in rows if (r["eviction"], r["prefetch"]) == (eviction, prefetch)),
                key=lambda r: number(r, "memory_bytes"),
            )
            handles += axes.plot(
                values(line, "memory_bytes") / GIB,
                values(line, column) * scale,
                label=mix_name(eviction, prefetch),
                linewidth=1.3,
                alpha=0.85,
                color=style[eviction].color,
                linestyle=_DASHES.get(prefetch, "-"),
            )
        best = front(rows, column)
        handles += axes.plot(
            values(best, "memory_bytes") / GIB,
            values(best, column) * scale,
            color="black",
            marker="o",
            markersize=4.5,
            linewidth=0,
            label="front: nothing is better with less",
            zorder=5,
        )
        handles.append(
            axes.axvline(
                memory_bytes / GIB, color="#444444", linewidth=1, linestyle=(0, (2, 2)), label="memory asked for"
            )
        )
        if column == "tpot_s" and target_s is not None:
            handles.append(axes.axhline(target_s * scale, color="#444444", linewidth=1, label="target TPOT"))
        axes.set_xlabel("accelerator memory in all (GiB)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, handlelength=3.4)
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    return figure
