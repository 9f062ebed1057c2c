"""The page of `experiments.hidden_prefetch`, drawn from its table: is it worth it to predict from activations?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.charts import SERIES, Chart, Field, bars, lines
from specmd_jax.report.columns import Row, Scalar
from specmd_jax.report.document import Document, Said
from specmd_jax.report.pages.hidden_prefetch.findings import answer, named, saved_of, title
from specmd_jax.report.pages.hidden_prefetch.table import BOUND, NONE, found, value
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import categories
from specmd_jax.report.terminal import aligned

PREDICTOR = Field(SERIES, "predictor")


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; what is found as text for a terminal."""
    manifest, rows = read_manifest(out), read_rows(out)
    page, said = Document(title(rows), manifest), answer(rows)
    page.answer(Said(text, evidence) for text, evidence in said)
    page.text(_what(rows, manifest["config"]))
    names = named(rows)
    shown = [name for name in names if "rank" not in name]
    page.series(categories(names), shown, "predictors")
    page.filters(
        count="experts predicted, in units of K!", capacity="cache size!", link="link (layer times of a copy)!"
    )
    head, body = recalls(rows)
    page.heading("Recall, %")
    page.table(head, body)
    costs_head, costs = spent(rows)
    page.heading("Work at a visit")
    page.table(costs_head, costs)
    saved_head, saved = stalls(rows)
    page.heading("Hits, and stall saved")
    page.text(
        "The link is in layer times that a copy takes, or a machine's. Stall is saved against none; the first number "
        "has a predictor's work in it, the second a launch, too."
    )
    page.table(saved_head, saved)
    _charts(page, rows)
    tables = [*aligned(head, body), "", *aligned(costs_head, costs), "", *aligned(saved_head, saved)]
    return "\n".join([*(text for text, _ in said), "", *tables, *map(str, page.save(out))])


def _what(rows: Sequence[Row], config: dict[str, object]) -> str:
    texts = {part: value(rows, "texts", f"{part} tokens") for part in ("train", "validation", "test")}
    own = "texts of the training corpus and of the package" if config["data"] else "held-out texts of the package"
    return (
        f"specmd-reference read its texts; maps and the predictor of ids learned from {texts['train']:,.0f} tokens "
        f"({own}), chose their epoch by {texts['validation']:,.0f} and are judged on {texts['test']:,.0f} others. A "
        "map is linear: it sees the residual stream in front of a layer's attention, or what that layer's router sees "
        "behind it, and gives the next router's logits. Its predictions replace the next gate's scores of the trace, "
        "so that gate_ahead replays them; it predicts no first layer. learned is the predictor of ids that comes with "
        "the package, trained on gpt-oss-20b, learned from ids the same trained here. Replays: "
        f"{config['eviction']}, scope {config['scope']}, event contract, {config['overfetch']:g} K experts asked for "
        f"one layer ahead, the cache empty before each text, machine {config['hardware']} with the link that is named. "
        "A predictor's work is charged by the machine's rates from its operations and bytes (estimated), and once more "
        f"with {config['launch_us']:g} us for a kernel of its own (an assumption). What looks tables up is not charged."
    )


def recalls(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Gives recall of every predictor, a column for each number of experts predicted."""
    cells = [row for row in rows if row["study"] == "recall" and row["layer"] is None]
    counts = sorted({number(row, "count") for row in cells})
    body = []
    for name, ahead in dict.fromkeys((str(row["predictor"]), number(row, "ahead")) for row in cells):
        texts = [_interval(next(found(rows, "recall", "recall", predictor=name, ahead=ahead, count=c))) for c in counts]
        body.append([name, _layers(ahead), *texts])
    return ["predictor", "predicts", *(f"{count:g} K predicted" for count in counts)], body


def _layers(ahead: float) -> str:
    return {0: "this layer", 1: "the next layer"}.get(int(ahead), f"{ahead:.0f} layers ahead")


def spent(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Gives what the predictors that compute do at a visit."""
    names = list(dict.fromkeys(str(row["predictor"]) for row in rows if row["study"] == "cost"))
    body = [
        [
            name,
            f"{value(rows, 'cost', 'multiply-adds', predictor=name):,.0f}",
            f"{value(rows, 'cost', 'bytes read', predictor=name):,.0f}",
            f"{1e6 * value(rows, 'cost', 's a visit', predictor=name):.3f}",
        ]
        for name in names
    ]
    return ["predictor", "multiply-adds", "bytes read", "us by the machine's rates"], body


def stalls(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Gives what each predictor saves, a line for each link and predictor: hits, stall saved with its work, and, where
    it computes, with a launch as well.
    """
    cells = [row for row in rows if row["measure"] == "stall saved, free"]
    sizes = list(dict.fromkeys(str(row["capacity"]) for row in cells))
    pairs = dict.fromkeys((str(row["link"]), str(row["predictor"])) for row in cells)
    links = list(dict.fromkeys(link for link, _ in pairs))
    body = []
    for link, name in sorted(pairs, key=lambda pair: links.index(pair[0])):
        line = [link, name]
        for size in sizes:
            at = {"link": link, "capacity": size}
            hits = 100 * value(rows, "replay", "hit rate", predictor=name, **at)
            launched = 100 * value(rows, "replay", "stall saved, launched", predictor=name, **at)
            texts = [f"{saved_of(rows, name, **at):.1f}", *([] if math.isnan(launched) else [f"{launched:.1f}"])]
            line += [f"{hits:.1f}", " / ".join(texts)]
        body.append(line)
    heads = [head for size in sizes for head in (f"{size}: hits, %", "stall saved, %")]
    return ["link", "predictor", *heads], body


def _charts(page: Document, rows: Sequence[Row]) -> None:
    whole = [row for row in rows if row["study"] == "recall" and row["layer"] is None and row["ahead"] == 1]
    page.data("recall", [_percent(row) | {"count": row["count"]} for row in whole])
    told = (PREDICTOR, Field("value", "%", ".1f"), Field("low", "from, %", ".1f"), Field("high", "to, %", ".1f"))
    order = {"field": "value", "order": "descending"}
    first = min(number(row, "count") for row in whole)
    best = max((row for row in whole if row["count"] == first), key=lambda row: number(row, "value"))
    page.chart(
        Chart(
            f"With {first:g} K predicted, {best['predictor']} names {100 * number(best, 'value'):.0f} % of the next "
            "layer's experts (simulated)",
            "Recall of each predictor one layer ahead, with 95 % intervals over texts.",
            bars(PREDICTOR, Field("value", "recall, %"), told, table="recall", low="low", high="high", order=order,
                 x_scale={"domain": [0, 100]}),
            ("recall",),
        )
    )  # fmt: skip
    layers = [row for row in rows if row["study"] == "recall" and row["layer"] is not None and row["ahead"] == 1]
    page.data("layers", [_percent(row) | {"count": row["count"], "layer": row["layer"]} for row in layers])
    values = [
        100 * number(row, "value") for row in layers if row["predictor"] == best["predictor"] and row["count"] == first
    ]
    page.chart(
        Chart(
            f"By layer, {best['predictor']} names {min(values):.0f} to {max(values):.0f} % (simulated)",
            "Recall by predicted layer, a line for each predictor.",
            lines(Field("layer", "layer", "d"), Field("value", "recall, %", ".1f"), (PREDICTOR, told[1]),
                  table="layers", dots=True, y_scale={"domain": [0, 100]}, x_axis={"tickMinStep": 1}),
            ("layers",), {"table": "layers", "x": "layer", "y": "value"},
        )
    )  # fmt: skip
    saved: list[dict[str, Scalar]] = []
    for row in found(rows, "replay", "stall saved, free"):
        at = {"link": row["link"], "capacity": row["capacity"]}
        launched = 100 * value(rows, "replay", "stall saved, launched", predictor=row["predictor"], **at)
        told_of = {"with its work": saved_of(rows, str(row["predictor"]), **at), "and a launch": launched}
        shared = {SERIES: row["predictor"], **at}
        saved += [shared | {"charge": said, "value": one} for said, one in told_of.items() if not math.isnan(one)]
    saved = [record for record in saved if record[SERIES] != NONE]
    page.data("saved", saved)
    top = max(saved, key=lambda it: float(it["value"] or 0) if it[SERIES] != BOUND else -1.0)
    page.chart(
        Chart(
            f"{top[SERIES]} saves up to {top['value']:.0f} % of the stall (simulated)",
            "Stall saved against no prefetch, with a predictor's work charged, and with a launch as well.",
            bars(PREDICTOR, Field("value", "stall saved, %"), (*told[:2], Field("charge", "charged")), table="saved",
                 group=Field("charge", "charged"), order=order | {"op": "max"}),
            ("saved",), wide=True, 
            note="perfect knows the next layer's experts. Below zero a predictor costs more than it saves.",
        )
    )  # fmt: skip


def _percent(row: Row) -> dict[str, Scalar]:
    told = {name: None if row[name] is None else 100 * number(row, name) for name in ("value", "low", "high")}
    return {SERIES: str(row["predictor"])} | told


def _interval(row: Row) -> str:
    return f"{100 * number(row, 'value'):.1f} ({100 * number(row, 'low'):.1f}..{100 * number(row, 'high'):.1f})"
