"""What `experiments.evaluate_learned` prints and draws, from its table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.figures import save
from specmd_jax.report.reader import FIGURES, read_rows
from specmd_jax.report.style import looks
from specmd_jax.report.terminal import aligned

WORST_SHOWN = -50.0
PREDICTOR_COLORS = {  # Okabe and Ito's
    "learned": "#E69F00",
    "online": "#0072B2",
    "transition": "#009E73",
    "previous": "#D55E00",
    "popular": "#CC79A7",
}
KEY = ("study", "measure", "policy", "scope", "capacity", "count", "layer", "ahead", "link")
COLUMNS: dict[str, Column] = {
    "study": Column("str", "requests, gap, rivals, recall, horizon or stall"),
    "measure": Column("str", "what value is; a share is 0 to 1"),
    "policy": Column("str", "eviction, prefetcher, both, a control or a bound"),
    "scope": Column("str", "global: one pool of experts; layer: one pool per layer"),
    "capacity": Column("str", "cache size as it was asked for"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "count": Column("int", "experts predicted a layer; of shared runs, their tokens"),
    "layer": Column("int", "predicted layer, empty: all of them; of shared runs, how many layers must agree"),
    "ahead": Column("int", "layers between the prediction and the use"),
    "link": Column("str", "layer times of one expert's copy, or the hardware preset of the link"),
    "value": Column("float", "simulated"),
    "low": Column("float", "2.5 % of the bootstrap over requests"),
    "high": Column("float", "97.5 % of it"),
}
TABLE = Table("evaluate_learned", COLUMNS, KEY)


def draw(out: Path) -> str:
    """Draws the figures of a table into its folder, and returns its text."""
    rows = read_rows(out)
    save(_gap_figure(rows), out, "gap")
    save(_recall_figure(rows), out, "recall")
    blocks = (_requests(rows), _gap(rows), _rivals(rows), _controls(rows), _recall(rows), _horizon(rows), _stall(rows))
    return "\n\n".join("\n".join(block) for block in blocks) + f"\n\n{out}: rows.csv, manifest.json, {FIGURES}/"


def _of(rows: Sequence[Row], study: str, measure: str) -> list[Row]:
    return [row for row in rows if (row["study"], row["measure"]) == (study, measure)]


def _shown(row: Row | None, interval: bool = True) -> str:
    """Gives a share in %, with its interval."""
    if row is None or row["value"] is None:
        return "-"
    text = f"{100 * float(row['value']):.1f}"
    if not interval or row["low"] is None or row["high"] is None:
        return text
    return f"{text} ({100 * float(row['low']):.1f}..{100 * float(row['high']):.1f})"


def _grid(rows: Sequence[Row], column: str, first: str, interval: bool = True) -> list[str]:
    """Gives a line per policy, a column per value of `column`."""
    heads = list(dict.fromkeys(row[column] for row in rows))
    names = list(dict.fromkeys(str(row["policy"]) for row in rows))
    cells = {(row["policy"], row[column]): row for row in rows}
    body = [[name, *(_shown(cells.get((name, head)), interval) for head in heads)] for name in names]
    return aligned([first, *map(str, heads)], body, rule=False)


def _value(rows: Sequence[Row], measure: str) -> float:
    found = [row["value"] for row in rows if row["measure"] == measure]
    return float(found[0]) if found and found[0] is not None else 0.0


def _requests(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row["study"] == "requests"]
    lines = [
        f"judged on {_value(mine, 'requests'):.0f} requests, {_value(mine, 'tokens'):.0f} tokens; "
        f"{_value(mine, 'requests learned from'):.0f} other requests of the trace were learned from"
    ]
    for row in _of(rows, "requests", "shared runs"):
        lines.append(
            f"runs of {row['count']} tokens that agree with a learned one in {row['layer']} layers: {_shown(row)} %"
        )
    return lines


def _gap(rows: Sequence[Row]) -> list[str]:
    lines = ["Gap closed, LRU to Belady with forced admission, % (simulated; demand only, event contract)"]
    for scope in dict.fromkeys(row["scope"] for row in _of(rows, "gap", "gap closed")):
        mine = [row for row in _of(rows, "gap", "gap closed") if row["scope"] == scope]
        cycles = {row["capacity"]: row["cycles"] for row in mine}
        sizes = ", ".join(f"{size} = {float(found or 0):.2f} C/T" for size, found in cycles.items())
        best = {
            row["policy"]: max(float(r["value"] or 0) for r in mine if r["policy"] == row["policy"]) for row in mine
        }
        mine.sort(key=lambda row: -best[row["policy"]])
        lines += ["", f"scope {scope}; {sizes}", *_grid(mine, "capacity", "policy")]
        rates = [r for r in _of(rows, "gap", "hit rate") if r["scope"] == scope and r["policy"] in ("lru", "learned", "belady", "belady_bypass")]  # fmt: skip  # noqa: E501
        lines += [*_grid(rates, "capacity", "hit rate, %")]
        over = [r for r in _of(rows, "gap", "gap to bypass closed") if r["scope"] == scope and r["policy"] in ("learned", "online", "belady")]  # fmt: skip  # noqa: E501
        lines += [*_grid(over, "capacity", "of the gap to belady_bypass, %")]
    return lines


def _rivals(rows: Sequence[Row]) -> list[str]:
    found = _of(rows, "rivals", "gap closed")
    if not found:
        return ["libCacheSim's policies: not compared"]
    lines = ["Gap closed beside libCacheSim's policies, % (simulated; demand only, sequential contract)"]
    for scope in dict.fromkeys(row["scope"] for row in found):
        mine = [row for row in found if row["scope"] == scope]
        lines += ["", f"scope {scope}", *_grid(mine, "capacity", "policy")]
    return lines


def _controls(rows: Sequence[Row]) -> list[str]:
    lines = ["Controls, gap closed, %"]
    for measure in ("control", "control, few requests", "control, tokens shuffled"):
        for scope in dict.fromkeys(row["scope"] for row in _of(rows, "gap", measure)):
            mine = [row for row in _of(rows, "gap", measure) if row["scope"] == scope]
            lines += ["", *_grid(mine, "capacity", f"{measure}; scope {scope}")]
    return lines


def _recall(rows: Sequence[Row]) -> list[str]:
    whole = [row for row in _of(rows, "recall", "recall") if row["layer"] is None]
    lines = ["Recall of the next layer's experts by the best predicted, %", "", *_grid(whole, "count", "predicted")]
    lines += _grid(_of(rows, "recall", "control"), "count", "control")
    counts = sorted({int(row["count"] or 0) for row in whole})
    by_layer = [
        row for row in _of(rows, "recall", "recall") if row["layer"] is not None and row["count"] == counts[0]
    ]  # fmt: skip
    return [*lines, "", *_grid(by_layer, "layer", f"by layer, {counts[0]} predicted", interval=False)]


def _horizon(rows: Sequence[Row]) -> list[str]:
    mine = _of(rows, "horizon", "recall")
    first = min((int(row["count"] or 0) for row in mine), default=0)
    few = [row for row in mine if row["count"] == first]
    return [f"Recall by layers ahead, {first} predicted, %", *_grid(few, "ahead", "layers ahead")]


def _stall(rows: Sequence[Row]) -> list[str]:
    lines = ["Stall between lru without prefetch and the certified lower bound"]
    mine = [row for row in rows if row["study"] == "stall" and row["link"]]
    for link, scope in dict.fromkeys((row["link"], row["scope"]) for row in mine):
        here = [row for row in mine if (row["link"], row["scope"]) == (link, scope)]
        first = here[0]
        lines += [
            "",
            f"link {link} (layer times a copy, or a preset), {first['capacity']}, scope {scope}; a layer time "
            f"is {1e6 * _value(here, 'layer time, s'):.1f} us; lower and feasible bound are "
            f"{_shown(next(r for r in here if r['measure'] == 'bounds apart'))} % apart",
        ]
        for row in here:
            if row["measure"] == "FLOPs a visit":
                own = [r for r in here if r["policy"] == row["policy"]]
                plain, launched = (1e6 * _value(own, f"s a visit, charged{more}") for more in ("", " with launches"))
                lines.append(
                    f"{row['policy']}: {float(row['value'] or 0) / 1e3:.0f} kFLOP a visit, {plain:.2f} us charged, "
                    f"{launched:.2f} us with a launch"
                )
        closed = {row["policy"]: row for row in here if row["measure"] == "stall closed"}
        stalls = [row for row in here if row["measure"] == "stall, s a token"]
        body = [
            (str(row["policy"]), f"{1e3 * float(row['value'] or 0):.3f}", _shown(closed.get(row["policy"])))
            for row in stalls
        ]
        lines += aligned(("policy", "stall, ms a token", "closed, %"), body, rule=False)
    return lines


def _gap_figure(rows: Sequence[Row]) -> Figure:
    """Draws the gap closed by policy, a row of panels per scope, a panel per capacity; losses end at `WORST_SHOWN`."""
    cells = _of(rows, "gap", "gap closed")
    places = list(dict.fromkeys((row["scope"], row["capacity"]) for row in cells))
    columns = min(3, max(1, len(places)))
    lines = -(-max(1, len(places)) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes in panels[len(places) :]:
        axes.set_axis_off()
    style = looks(sorted({str(row["policy"]) for row in cells}))
    for axes, (scope, capacity) in zip(panels, places, strict=False):
        bars = [
            row for row in cells if (row["scope"], row["capacity"]) == (scope, capacity) and row["value"] is not None
        ]
        bars.sort(key=lambda row: float(row["value"] or 0))
        for y, row in enumerate(bars):
            value = max(WORST_SHOWN, 100 * float(row["value"] or 0))
            axes.barh(y, value, color=style[str(row["policy"])].color)
            low, high = (100 * float(row[name] or 0) for name in ("low", "high"))
            if value == WORST_SHOWN:
                axes.text(value, y, " <", va="center", color="white", fontsize=8)
            else:
                axes.plot([low, high], [y, y], color="#222222", linewidth=1.2)
        axes.set_yticks(range(len(bars)), [str(row["policy"]) for row in bars], fontsize=8)
        axes.set_title(f"scope {scope}, {capacity} (simulated)", fontsize=10)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_xlabel("gap closed, LRU to Belady (%)")
    return figure


def _recall_figure(rows: Sequence[Row]) -> Figure:
    """Draws recall by layer at the least count (left) and by layers ahead (right)."""
    figure = Figure(figsize=(12.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_layer = [row for row in _of(rows, "recall", "recall") if row["layer"] is not None]
    ahead = _of(rows, "horizon", "recall")
    for axes, cells, column in ((left, by_layer, "layer"), (right, ahead, "ahead")):
        first = min((int(row["count"] or 0) for row in cells), default=0)
        names = sorted({str(row["policy"]) for row in cells})
        for name in names:
            line = [row for row in cells if row["policy"] == name and row["count"] == first]
            x = [int(row[column] or 0) for row in line]
            y = [100 * float(row["value"] or 0) for row in line]
            axes.plot(x, y, marker="o", markersize=3, label=name, color=PREDICTOR_COLORS.get(name))
        axes.set_ylim(0, 100)
        axes.set_ylabel(f"recall with {first} predicted (%)")
    left.set_xlabel("layer")
    right.set_xlabel("layers ahead (the last: next token)")
    left.legend(fontsize=8)
    return figure
