"""What `experiments.evaluate_learned` prints and draws, from its table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from specmd_jax.report.charts import SERIES, Chart, Field, bars, lines
from specmd_jax.report.columns import Column, Row, Scalar, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.figures import save
from specmd_jax.report.reader import FIGURES, read_manifest, read_rows
from specmd_jax.report.style import looks
from specmd_jax.report.terminal import aligned

WORST_SHOWN = -50.0
PREDICTORS = ("learned", "adaptive", "online", "transition", "previous", "popular")
PREDICTOR_COLORS = {name: look.color for name, look in looks(PREDICTORS).items()}
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
    """Writes report.md, report.html and the figures of a table into its folder, and returns its text."""
    rows = read_rows(out)
    page = Document(_title(rows), read_manifest(out))
    page.answer(_answer(rows))
    _views(page, rows)
    page.picture(save(_gap_figure(rows), out, "gap"), "gap closed")
    page.picture(save(_recall_figure(rows), out, "recall"), "recall")
    blocks = (_requests(rows), _gap(rows), _rivals(rows), _controls(rows), _recall(rows), _horizon(rows), _stall(rows))
    page.heading("All numbers")
    for block in blocks:
        page.verbatim("\n".join(block).strip())
    paths = page.save(out)
    text = "\n\n".join("\n".join(block) for block in blocks)
    return "\n".join([f"{text}\n\n{out}: rows.csv, manifest.json, {FIGURES}/", *map(str, paths)])


BEGUN, AFTER = "adaptive, begun with learned", "adaptive, after training's requests"
ONLINE = ("learned", BEGUN, AFTER, "adaptive", "online")


def _best(rows: Sequence[Row], names: Sequence[str]) -> Row | None:
    """Gives the row with the largest value among some policies."""
    mine = [row for row in rows if row["policy"] in names and row["value"] is not None]
    return max(mine, key=lambda row: float(row["value"] or 0), default=None)


def _title(rows: Sequence[Row]) -> str:
    """States what the trained policy is worth on requests that it never saw."""
    best = _best(_of(rows, "gap", "gap closed"), ("learned",))
    if best is None:
        return "Learned policies on requests that they never saw"
    return (
        f"On requests that it never saw, learned closes at most {_shown(best)} % of the gap from LRU to Belady "
        f"({best['capacity']}, scope {best['scope']}; simulated)"
    )


def _answer(rows: Sequence[Row]) -> list[Said]:
    """Gives who gains what, beside the best that needs no training and the control."""
    said = []
    gaps = _of(rows, "gap", "gap closed")
    for scope, capacity in dict.fromkeys((row["scope"], row["capacity"]) for row in gaps):
        here = {str(row["policy"]): row for row in gaps if (row["scope"], row["capacity"]) == (scope, capacity)}
        plain = _best(list(here.values()), [name for name in here if name not in (*ONLINE, *BOUNDS)])
        names = [name for name in ONLINE if name in here] + ([str(plain["policy"])] if plain is not None else [])
        told = ", ".join(f"{name} closes {_shown(here[name])} %" for name in names)
        said.append(Said(f"Cache of {capacity}, scope {scope}: {told} of the gap from LRU to Belady.", "simulated"))
    whole = [row for row in _of(rows, "recall", "recall") if row["layer"] is None]
    for count in sorted({int(row["count"] or 0) for row in whole})[:1]:
        cells = [row for row in whole if row["count"] == count]
        told = ", ".join(f"{row['policy']} {_shown(row)} %" for row in cells)
        control = ", ".join(
            f"{row['policy']} {_shown(row)} %" for row in _of(rows, "recall", "control") if row["count"] == count
        )
        said.append(Said(f"Of the next layer's experts, the best {count} predicted name: {told}.", "simulated"))
        if control:
            said.append(Said(f"The controls of the same: {control}.", "simulated"))
    return [*said, Said(_requests(rows)[0][0].upper() + _requests(rows)[0][1:] + ".")]


BOUNDS = ("belady", "belady_bypass")


def _views(page: Document, rows: Sequence[Row]) -> None:
    """Adds the gap closed, and the recall of predictors beside their controls."""
    names = list(dict.fromkeys(str(row["policy"]) for row in rows if row["study"] in ("gap", "recall", "horizon")))
    style = looks(sorted(names))
    gaps = [
        _record(row) | {"where": f"{row['scope']}, {row['capacity']}"}
        for row in _of(rows, "gap", "gap closed")
        if row["policy"] not in BOUNDS and row["value"] is not None
    ]
    page.series({name: style[name] for name in names}, list(names)[:6] + list(PREDICTOR_COLORS), "policies")
    page.filters(where="scope and cache!", count="experts predicted!")
    told = (
        Field(SERIES, "policy"), Field("where", "scope, cache"), Field("value", "%", ".1f"),
        Field("low", "from, %", ".1f"), Field("high", "to, %", ".1f"),
    )  # fmt: skip
    if gaps:
        page.data("gaps", gaps)
        order = {"field": "value", "order": "descending"}
        page.chart(
            Chart(
                _title(rows), "Gap closed from LRU to Belady by each policy, with 95 % intervals over requests.",
                bars(Field(SERIES, "policy"), Field("value", "gap closed, %"), told, table="gaps", low="low",
                     high="high", order=order, x_scale={"domain": [WORST_SHOWN, 100], "clamp": True}),
                ("gaps",), note=f"Losses end at {WORST_SHOWN:g} %. Weights have not seen these requests.",
            )
        )  # fmt: skip
    recall = [
        _record(row) | {"what": kind, "count": row["count"]}
        for kind in ("recall", "control")
        for row in _of(rows, "recall", kind)
        if row["layer"] is None and row["value"] is not None
    ]
    if recall:
        page.data("recall", recall)
        best = max(
            (it for it in recall if it["what"] == "recall"), key=lambda it: float(it["value"] or 0), default=None
        )
        page.chart(
            Chart(
                f"{best[SERIES]} names {best['value']:.0f} % of the next layer's experts with {best['count']} "
                "predicted (simulated)" if best else "Recall of controls (simulated)",
                "Recall of each predictor beside its controls.",
                bars(Field(SERIES, "predictor"), Field("value", "recall, %"), told, table="recall",
                     group=Field("what", ""), x_scale={"domain": [0, 100]}, low="low", high="high"),
                ("recall",), note="A control that is as good as its predictor means that it learned nothing from them.",
            )
        )  # fmt: skip
    layers = [
        _record(row) | {"layer": row["layer"], "count": row["count"]}
        for row in _of(rows, "recall", "recall")
        if row["layer"] is not None
    ]
    ahead = [_record(row) | {"ahead": row["ahead"], "count": row["count"]} for row in _of(rows, "horizon", "recall")]
    for table, cells, name, words in (
        ("by_layer", layers, "layer", "layer"),
        ("by_ahead", ahead, "ahead", "layers ahead (the last: the next token)"),
    ):
        if len({it[name] for it in cells}) < 2:
            continue
        page.data(table, cells)
        values = [float(it["value"] or 0) for it in cells]
        page.chart(
            Chart(
                f"Recall by {words} lies between {min(values):.0f} and {max(values):.0f} % (simulated)",
                f"Recall by {words}, a line for each predictor.",
                lines(Field(name, words), Field("value", "recall, %"), told, table=table, dots=True,
                      y_scale={"domain": [0, 100]}, x_axis={"tickMinStep": 1, "grid": False}),
                (table,), {"table": table, "x": name, "y": "value"},
            )
        )  # fmt: skip


def _record(row: Row) -> dict[str, Scalar]:
    return {SERIES: str(row["policy"])} | {
        name: None if row[name] is None else 100 * float(row[name] or 0) for name in ("value", "low", "high")
    }


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
    told = [
        f"judged on {_value(mine, 'requests'):.0f} requests, {_value(mine, 'tokens'):.0f} tokens; "
        f"{_value(mine, 'requests learned from'):.0f} other requests of the trace were learned from"
    ]
    for row in _of(rows, "requests", "shared runs"):
        told.append(
            f"runs of {row['count']} tokens that agree with a learned one in {row['layer']} layers: {_shown(row)} %"
        )
    return told


def _gap(rows: Sequence[Row]) -> list[str]:
    told = ["Gap closed, LRU to Belady with forced admission, % (simulated; demand only, event contract)"]
    for scope in dict.fromkeys(row["scope"] for row in _of(rows, "gap", "gap closed")):
        mine = [row for row in _of(rows, "gap", "gap closed") if row["scope"] == scope]
        cycles = {row["capacity"]: row["cycles"] for row in mine}
        sizes = ", ".join(f"{size} = {float(found or 0):.2f} C/T" for size, found in cycles.items())
        best = {
            row["policy"]: max(float(r["value"] or 0) for r in mine if r["policy"] == row["policy"]) for row in mine
        }
        mine.sort(key=lambda row: -best[row["policy"]])
        told += ["", f"scope {scope}; {sizes}", *_grid(mine, "capacity", "policy")]
        rates = [r for r in _of(rows, "gap", "hit rate") if r["scope"] == scope and r["policy"] in ("lru", "learned", "belady", "belady_bypass")]  # fmt: skip  # noqa: E501
        told += [*_grid(rates, "capacity", "hit rate, %")]
        over = [r for r in _of(rows, "gap", "gap to bypass closed") if r["scope"] == scope and r["policy"] in (*ONLINE, "belady")]  # fmt: skip  # noqa: E501
        told += [*_grid(over, "capacity", "of the gap to belady_bypass, %")]
    return told


def _rivals(rows: Sequence[Row]) -> list[str]:
    found = _of(rows, "rivals", "gap closed")
    if not found:
        return ["libCacheSim's policies: not compared"]
    told = ["Gap closed beside libCacheSim's policies, % (simulated; demand only, sequential contract)"]
    for scope in dict.fromkeys(row["scope"] for row in found):
        mine = [row for row in found if row["scope"] == scope]
        told += ["", f"scope {scope}", *_grid(mine, "capacity", "policy")]
    return told


def _controls(rows: Sequence[Row]) -> list[str]:
    told = ["Controls, gap closed, %"]
    for measure in ("control", "control, few requests", "control, tokens shuffled"):
        for scope in dict.fromkeys(row["scope"] for row in _of(rows, "gap", measure)):
            mine = [row for row in _of(rows, "gap", measure) if row["scope"] == scope]
            told += ["", *_grid(mine, "capacity", f"{measure}; scope {scope}")]
    return told


def _recall(rows: Sequence[Row]) -> list[str]:
    whole = [row for row in _of(rows, "recall", "recall") if row["layer"] is None]
    told = ["Recall of the next layer's experts by the best predicted, %", "", *_grid(whole, "count", "predicted")]
    told += _grid(_of(rows, "recall", "control"), "count", "control")
    counts = sorted({int(row["count"] or 0) for row in whole})
    by_layer = [
        row for row in _of(rows, "recall", "recall") if row["layer"] is not None and row["count"] == counts[0]
    ]  # fmt: skip
    return [*told, "", *_grid(by_layer, "layer", f"by layer, {counts[0]} predicted", interval=False)]


def _horizon(rows: Sequence[Row]) -> list[str]:
    mine = _of(rows, "horizon", "recall")
    first = min((int(row["count"] or 0) for row in mine), default=0)
    few = [row for row in mine if row["count"] == first]
    return [f"Recall by layers ahead, {first} predicted, %", *_grid(few, "ahead", "layers ahead")]


def _stall(rows: Sequence[Row]) -> list[str]:
    told = ["Stall between lru without prefetch and the certified lower bound"]
    mine = [row for row in rows if row["study"] == "stall" and row["link"]]
    for link, scope in dict.fromkeys((row["link"], row["scope"]) for row in mine):
        here = [row for row in mine if (row["link"], row["scope"]) == (link, scope)]
        first = here[0]
        told += [
            "",
            f"link {link} (layer times a copy, or a preset), {first['capacity']}, scope {scope}; a layer time "
            f"is {1e6 * _value(here, 'layer time, s'):.1f} us; lower and feasible bound are "
            f"{_shown(next(r for r in here if r['measure'] == 'bounds apart'))} % apart",
        ]
        for row in here:
            if row["measure"] == "FLOPs a visit":
                own = [r for r in here if r["policy"] == row["policy"]]
                plain, launched = (1e6 * _value(own, f"s a visit, charged{more}") for more in ("", " with launches"))
                told.append(
                    f"{row['policy']}: {float(row['value'] or 0) / 1e3:.0f} kFLOP a visit, {plain:.2f} us charged, "
                    f"{launched:.2f} us with a launch"
                )
        closed = {row["policy"]: row for row in here if row["measure"] == "stall closed"}
        stalls = [row for row in here if row["measure"] == "stall, s a token"]
        body = [
            (str(row["policy"]), f"{1e3 * float(row['value'] or 0):.3f}", _shown(closed.get(row["policy"])))
            for row in stalls
        ]
        told += aligned(("policy", "stall, ms a token", "closed, %"), body, rule=False)
    return told


def _gap_figure(rows: Sequence[Row]) -> Figure:
    """Draws the gap closed by policy, a row of panels per scope, a panel per capacity; losses end at `WORST_SHOWN`."""
    cells = _of(rows, "gap", "gap closed")
    places = list(dict.fromkeys((row["scope"], row["capacity"]) for row in cells))
    columns = min(3, max(1, len(places)))
    told = -(-max(1, len(places)) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.8 * told), layout="constrained")
    panels = figure.subplots(told, columns, squeeze=False, sharex=True).ravel()
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
