"""What `experiments.learn_policy` prints and draws, from its table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specmd_jax.report.charts import Chart, Field, bars
from specmd_jax.report.columns import DRAWN, Column, Row, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.figures import save
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import categories
from specmd_jax.report.terminal import aligned

KEY = ("capacity", "policy", "method", "tuned")
COLUMNS: dict[str, Column] = {
    "model": Column("str", "model that the trace was captured from"),
    "scope": Column("str", "layer: one pool per layer"),
    "contract": Column("str", "event"),
    "capacity": Column("str", "cache size as it was asked for; a search moves it between layers"),
    "capacity_bytes": Column("int", "cache size in bytes, all layers together"),
    "slots_per_layer": Column("float", "cache size in experts per layer, on average"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "policy": Column("str", "eviction policy"),
    "method": Column(
        "str", "fixed, adaptive, oracle; of weighted: default, gradient, evolution or random, which found its numbers"
    ),
    "tuned": Column("str", "what was searched: none, weights, budgets or both"),
    "requests": Column("int", "test requests, each from an empty cache"),
    "demand": Column("int", "demanded experts of the test requests, summed over visits"),
    "misses": Column("int", "demanded experts that were not resident: the exact engine"),
    "miss_rate": Column("float", "misses / demand"),
    "miss_rate_low": Column("float", "2.5 % of the bootstrap over requests"),
    "miss_rate_high": Column("float", "97.5 % of it"),
    "gap_closed": Column("float", "share of the misses between lru and belady, equal budgets, that are saved"),
    "gap_closed_low": Column("float", "2.5 % of the bootstrap over requests"),
    "gap_closed_high": Column("float", "97.5 % of it"),
    "validation_miss_rate": Column("float", "misses / demand of the validation requests"),
    "soft_miss_rate": Column("float", "expected by the soft cache at its last temperature, budgets not rounded"),
    "against_best_fixed": Column(
        "float",
        "share of the misses that are saved of the best fixed policy's, or of the policy's whose scores are weighed",
    ),
    "against_low": Column("float", "2.5 % of the bootstrap over requests"),
    "against_high": Column("float", "97.5 % of it"),
    "gradient_saves": Column("float", "share of the misses that the numbers found by gradient save, same thing tuned"),
    "gradient_saves_low": Column("float", "2.5 % of the bootstrap over requests"),
    "gradient_saves_high": Column("float", "97.5 % of it"),
    "replays": Column("int", "price of the search in replays of a request; a gradient counts as 3"),
    "search_s": Column("float", "seconds of the search, compiling and validation left out"),
    "history": Column("str", "validation miss rate after each round of the search"),
    "best_fixed": Column(
        "bool", "the fixed policy with the fewest misses on validation requests, or the one whose scores are weighed"
    ),
    "evidence": Column("str", "simulated"),
}
TABLE = Table("learn_policy", COLUMNS, KEY, beside=(*DRAWN, "found.json"))
NAMES = {
    "fixed": "fixed policies, equal budgets",
    "adaptive": "learns while it runs",
    "default": "weighted, as it comes",
    "gradient": "by gradient",
    "evolution": "by evolution",
    "random": "by random search",
}
COLORS = {method: look.color for method, look in categories(NAMES).items()}


def draw(out: Path) -> str:
    """Writes report.md, report.html and the figure of a table into its folder, and returns its text."""
    rows = read_rows(out)
    page = Document(_title(rows), read_manifest(out))
    page.answer([Said(_told(group), str(group[0]["evidence"])) for group in _capacities(rows)])
    _views(page, rows)
    path = save(_figure(rows), out, "learn_policy")
    page.picture(path, "gap closed by what was searched")
    blocks = [_table(group) for group in _capacities(rows)]
    for group in _capacities(rows):
        page.heading(f"{group[0]['capacity']} in total, C/T {number(group[0], 'cycles'):.2f}")
        page.table(HEAD, [_cells(row) for row in sorted(group, key=_miss_rate)])
    paths = page.save(out)
    kept = f"{out}: rows.csv, manifest.json, found.json, {path.parent.name}/{path.name}"
    return "\n\n".join([*blocks, "\n".join([kept, *map(str, paths)])])


def _title(rows: Sequence[Row]) -> str:
    """States what numbers found by gradient save against the best fixed policy."""
    found = [row for row in rows if row["method"] == "gradient" and row["against_best_fixed"] is not None]
    if not found:
        return f"{rows[0]['model']}: eviction weights and layer budgets, found on other requests"
    best = max(found, key=lambda row: number(row, "against_best_fixed"))
    saved = _span(best, "against_best_fixed", "against")
    return (
        f"{best['model']}: {best['tuned']} found by gradient save {saved} % of the misses of {_rival(rows)} at "
        f"{best['capacity']} (simulated)"
    )


def _rival(rows: Sequence[Row]) -> str:
    """Says whom the searches are held against: the best fixed policy, or the one whose scores they weigh."""
    known = [str(row["policy"]) for row in rows if row["best_fixed"]]
    under = [row["policy"] for row in rows if row["method"] == "default"]
    return known[0] if known and under == [f"tuned({known[0]})"] * len(under) else "the best fixed policy"


def _told(rows: Sequence[Row]) -> str:
    """Says who misses least at a capacity, fixed policies and searches apart."""
    fair = [row for row in rows if row["method"] != "oracle"]
    kinds = (("fixed, adaptive", [row for row in fair if row["soft_miss_rate"] is None]),
             ("found by a search", [row for row in fair if row["soft_miss_rate"] is not None]))  # fmt: skip
    told = [
        f"of what is {kind} {_label(best)} misses least, {100 * _miss_rate(best):.2f} %, and closes "
        f"{_span(best, 'gap_closed', 'gap_closed')} % of the gap from lru to belady"
        for kind, mine in kinds
        if mine
        for best in [min(mine, key=_miss_rate)]
    ]
    return f"{rows[0]['capacity']} (C/T {number(rows[0], 'cycles'):.2f}): {'; '.join(told)}."


def _views(page: Document, rows: Sequence[Row]) -> None:
    """Adds the gap closed with intervals, by what found the numbers."""
    shown = [row for row in rows if row["method"] != "oracle" and number(row, "gap_closed") > -0.5]
    page.data(
        "rows",
        [
            {
                "label": _label(row),
                "capacity": str(row["capacity"]),
                "how": NAMES[str(row["method"])],
                "tuned": str(row["tuned"]),
                **{name: 100 * number(row, f"gap_closed{end}") for name, end in
                   (("gap", ""), ("low", "_low"), ("high", "_high"))},
                "misses": 100 * _miss_rate(row),
                "replays": row["replays"],
            }
            for row in sorted(shown, key=lambda row: -number(row, "gap_closed"))
        ],
    )  # fmt: skip
    page.filters(capacity="cache!", how="found", tuned="tuned")
    told = (
        Field("label", "policy"), Field("how", "found"), Field("misses", "misses, %", ".2f"),
        Field("gap", "gap closed, %", ".1f"), Field("low", "from", ".1f"), Field("high", "to", ".1f"),
        Field("replays", "replays", ",d"),
    )  # fmt: skip
    spec = bars(told[0], told[3], told, low="low", high="high", order={"field": "gap", "order": "descending"})
    style = categories(NAMES.values())
    spec["layer"][0]["encoding"]["color"] = {
        "field": "how", "type": "nominal", "title": None, "legend": {"orient": "bottom", "columns": 2},
        "scale": {"domain": list(style), "range": "@hues"},
    }  # fmt: skip
    hidden = sum(row["method"] != "oracle" for row in rows) - len(shown)
    note = f"{hidden} policies below -50 % are not shown. " if hidden else ""
    page.chart(
        Chart(
            _title(rows), _told(_capacities(rows)[0]), spec, wide=True,
            note=f"{note}Lines: 95 % intervals over test requests; a search saw others.",
        )
    )  # fmt: skip


def _capacities(rows: Sequence[Row]) -> list[list[Row]]:
    return [[row for row in rows if row["capacity"] == name] for name in dict.fromkeys(r["capacity"] for r in rows)]


def _label(row: Row) -> str:
    if row["method"] in ("fixed", "adaptive", "oracle"):
        return str(row["policy"]) + (" *" if row["best_fixed"] else "")
    if row["method"] == "default":
        return f"{row['policy']}, default"
    return f"{row['policy']}, {row['tuned']} by {row['method']}"


HEAD = (
    "policy",
    "miss %",
    "gap closed % (95 %)",
    "saved of * % (95 %)",
    "gradient saves % (95 %)",
    "soft %",
    "replays",
    "s",
)


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = (
        f"{first['model']}, {first['capacity']} in total, C/T {number(first, 'cycles'):.2f}, {first['requests']} test "
        f"requests, event contract (simulated; * {_rival(rows)}{' on validation' if 'best' in _rival(rows) else ''})"
    )
    return "\n".join([title, *aligned(HEAD, [_cells(row) for row in sorted(rows, key=_miss_rate)])])


def _miss_rate(row: Row) -> float:
    return number(row, "miss_rate")


def _cells(row: Row) -> tuple[str, ...]:
    """Under `HEAD`."""
    searched = row["soft_miss_rate"] is not None
    return (
        _label(row),
        f"{100 * _miss_rate(row):.2f}",
        _span(row, "gap_closed", "gap_closed"),
        "" if row["against_best_fixed"] is None else _span(row, "against_best_fixed", "against"),
        "" if row["gradient_saves"] is None else _span(row, "gradient_saves", "gradient_saves"),
        f"{100 * number(row, 'soft_miss_rate'):.2f}" if searched else "",
        str(row["replays"]) if searched else "",
        f"{number(row, 'search_s'):.0f}" if searched else "",
    )


def _span(row: Row, name: str, ends: str) -> str:
    low, high = (100 * number(row, f"{ends}_{end}") for end in ("low", "high"))
    return f"{100 * number(row, name):.1f} ({low:.1f}..{high:.1f})"


def _figure(rows: Sequence[Row]) -> Figure:
    """Above, the share of the gap on test requests; below, what validation said during the searches."""
    groups = _capacities(rows)
    figure = Figure(figsize=(6.6 * max(1, len(groups)) + 1, 9.6), layout="constrained")
    grid = figure.subplots(2, len(groups), squeeze=False, height_ratios=(2.4, 1), sharex="row")
    for at, group in enumerate(groups):
        _gaps(grid[0][at], group)
        _histories(grid[1][at], group)
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{groups[0][0]['model']}: eviction weights and layer budgets, found on other requests (simulated)")
    return figure


def _gaps(axes: Axes, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if row["method"] != "oracle" and number(row, "gap_closed") > -0.5]
    shown.sort(key=lambda row: number(row, "gap_closed"))
    for height, row in enumerate(shown):
        value, low, high = (100 * number(row, name) for name in ("gap_closed", "gap_closed_low", "gap_closed_high"))
        method = str(row["method"])
        axes.plot([low, high], [height, height], color=COLORS[method], linewidth=2.2, alpha=0.45)
        axes.plot(value, height, "o", color=COLORS[method], markersize=6)
    for method, name in NAMES.items():
        if any(row["method"] == method for row in shown):
            axes.plot([], [], "o", color=COLORS[method], label=name)
    axes.axvline(0, color="#444444", linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(shown)), [_label(row) for row in shown], fontsize=9)
    axes.set_xlabel("share of the misses between LRU (0) and Belady (100) that are saved, %")
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    hidden = len(rows) - len(shown) - 1
    below = f"; {hidden} policies below -50 % not shown" if hidden > 0 else ""
    axes.set_title(f"{rows[0]['capacity']}, C/T {number(rows[0], 'cycles'):.2f}{below}", fontsize=11)


def _histories(axes: Axes, rows: Sequence[Row]) -> None:
    dashes = {"weights": (0, (1, 1.5)), "budgets": (0, (5, 2)), "both": "-"}
    for row in rows:
        if row["history"] is None:
            continue
        rates = [100 * float(rate) for rate in str(row["history"]).split()]
        price = number(row, "replays")
        places = [price * (i + 1) / len(rates) for i in range(len(rates))]
        axes.plot(places, rates, color=COLORS[str(row["method"])], linestyle=dashes[str(row["tuned"])], linewidth=1.6)
    best = next((row for row in rows if row["best_fixed"]), None)
    if best is not None:
        height = 100 * number(best, "validation_miss_rate")
        axes.axhline(height, color=COLORS["fixed"], linewidth=1.0, label=f"{best['policy']}, equal budgets")
    for tuned, dash in dashes.items():
        if any(row["tuned"] == tuned for row in rows):
            axes.plot([], [], color="#444444", linestyle=dash, label=tuned)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    axes.set_xlabel("price of the search, replays of a request")
    axes.set_ylabel("validation misses, %")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
