"""The charts of `experiments.routing`."""

from __future__ import annotations

from collections.abc import Sequence

from specmd_jax.report.charts import SERIES, Chart, Field, Record, Spec, bars, heat, lines
from specmd_jax.report.columns import Row, Scalar
from specmd_jax.report.document import Document
from specmd_jax.report.pages.routing.table import found, traces_of, value
from specmd_jax.report.rows import number

PLAIN, BOUNDS = "lru", ("belady", "belady_bypass")
WORST_SHOWN = -40.0  # a bar that is worse ends here
NEAR_ZERO = 40.0  # an axis of %, whose least is below, begins at 0
COLORS = ("@blue", "@red", "@teal", "@lilac", "@green", "@gold", "@plum")
"""Of the traces, in order: those of `style.categories`, so that bars and lines agree."""
TRACE = Field(SERIES, "trace")


def add(page: Document, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Adds what is counted, a line for each trace, then policies, predictors and domains."""
    first = names[0]
    page.filters(capacity="cache size!", trace="domains of!", layer="layer!")
    near = [100 * value(rows, "reuse within", trace=name, place=0.25) for name in names]
    _line(
        page, "reuse", _records(rows, "reuse within", 100),
        Field("place", "distinct other experts used since, % of the layer's", ".3~g"), "uses, %",
        f"{near[0]:.0f} % of {first}'s uses follow a use within a quarter of the experts{_range(near[1:])}",
        "Share of uses, by how many distinct other experts of the layer were used since the expert's last use. What is "
        "missing to 100 % at the right are first uses.",
    )  # fmt: skip
    next_to = [100 * value(rows, "overlap", trace=name, place=1.0) for name in names]
    _line(
        page, "overlap", _records(rows, "overlap", 1), Field("place", "tokens apart", "d"), "shared experts, %",
        f"Neighbouring tokens of {first} share {next_to[0]:.0f} % of their experts{_range(next_to[1:])}",
        "Share of a token's experts that an earlier token used, too, by how many tokens they are apart.",
        {"type": "log", "base": 2},
    )  # fmt: skip
    few = [100 * value(rows, "evenness of a few tokens", trace=name) for name in names]
    _line(
        page, "time", _records(rows, "evenness in time", 1), Field("place", "token of the request", "d"), "evenness, %",
        f"A few tokens of {first} use experts {few[0]:.0f} % as evenly as uniform choices{_range(few[1:])}",
        "Entropy of use in a window as a share of what uniform choices have, over the course of a request.",
    )  # fmt: skip
    deepest = {name: max(value(rows, "layers", trace=name) - 1, 1) for name in names}
    layers = [
        record | {"place": 100 * float(record["place"] or 0) / deepest[str(record[SERIES])]}
        for record in _records(rows, "evenness", 1, layers=True)
    ]
    _line(
        page, "layers", layers, Field("place", "depth, % of the layers", ".0f"), "evenness, %",
        f"Over all tokens {first}'s layers use experts {_least_and_most(layers, first)} as evenly as uniform choices",
        "Entropy of a layer's use as a share of what uniform choices have, from the first layer to the last.",
    )  # fmt: skip
    _policies(page, rows, first)
    _predictors(page, rows, first)
    _domains(page, rows)


def _line(
    page: Document,
    table: str,
    records: Sequence[Record],
    x: Field,
    what: str,
    title: str,
    words: str,
    x_scale: Spec | None = None,
) -> None:
    """Adds a line for each trace; ``what`` names the height, in %."""
    if not records:
        return
    page.data(table, records)
    y = Field("value", what, ".1f")
    zero = {"zero": min(float(it["value"] or 0) for it in records) < NEAR_ZERO}
    page.chart(
        Chart(
            f"{title} (measured)", words,
            lines(x, y, (TRACE, x, y), table=table, dots=True, x_scale=x_scale, y_scale=zero),
            (table,), {"table": table, "x": "place", "y": "value"},
        )
    )  # fmt: skip


def _policies(page: Document, rows: Sequence[Row], first: str) -> None:
    records = [
        _percent(row) | {"policy": row["policy"], "capacity": row["capacity"], TRACE.name: row["trace"]}
        for row in found(rows, "gap closed")
        if row["policy"] not in (PLAIN, *BOUNDS)
    ]
    if not records:
        return
    page.data("gap", records)
    mine = [it for it in records if it[SERIES] == first]
    best = max(mine or records, key=lambda it: float(it["value"] or 0))
    told = (Field("policy", "policy"), TRACE, Field("capacity", "cache"), Field("value", "%", ".1f"))
    page.chart(
        Chart(
            f"{best['policy']} closes {best['value']:.0f} % of {best[SERIES]}'s gap at {best['capacity']} (simulated)",
            "Gap from LRU to Belady that each eviction policy closes, a bar for each trace.",
            bars(Field("policy", "policy"), Field("value", "gap closed, %"), told, table="gap", group=TRACE, step=9,
                 colors=COLORS, x_scale={"domain": [WORST_SHOWN, 100], "clamp": True}),
            ("gap",), note=f"Losses end at {WORST_SHOWN:g} %. Where everything fits there is no gap and no bar.",
        )
    )  # fmt: skip


def _predictors(page: Document, rows: Sequence[Row], first: str) -> None:
    records = [
        _percent(row) | {"policy": row["policy"], TRACE.name: row["trace"]} for row in found(rows, "recall", place=1.0)
    ]
    if not records:
        return
    page.data("recall", records)
    best = max((it for it in records if it[SERIES] == first), key=lambda it: float(it["value"] or 0))
    told = (Field("policy", "predictor"), TRACE, Field("value", "%", ".1f"))
    page.chart(
        Chart(
            f"{best['policy']} names {best['value']:.0f} % of the next layer's experts in {first} (simulated)",
            "Recall with as many experts predicted as a token uses, one layer ahead, a bar for each trace.",
            bars(Field("policy", "predictor"), Field("value", "recall, %"), told, table="recall", group=TRACE, step=9,
                 colors=COLORS, x_scale={"domain": [0, 100]}),
            ("recall",), note="learned was trained on other requests of gpt-oss-20b.",
        )
    )  # fmt: skip


def _domains(page: Document, rows: Sequence[Row]) -> None:
    """Adds a tile for each expert and domain, sorted by the domain that an expert is used for most."""
    cells = [row for row in rows if row["measure"] == "domain share"]
    if not cells:
        return
    most: dict[tuple[object, ...], tuple[str, float]] = {}
    for row in cells:
        of = (row["trace"], row["layer"], row["expert"])
        if of not in most or number(row, "value") > most[of][1]:
            most[of] = str(row["domain"]), number(row, "value")
    names = {name: domains_of(cells, name) for name in traces_of(cells)}

    def order(row: Row) -> tuple[object, ...]:
        domain, share = most[row["trace"], row["layer"], row["expert"]]
        every = names[str(row["trace"])]
        return row["layer"], every.index(domain), -share, row["expert"], every.index(str(row["domain"]))

    records = [
        {"trace": name, "layer": row["layer"], "expert": row["expert"], "domain": row["domain"],
         "value": 100 * number(row, "value")}
        for name in names for row in sorted((row for row in cells if row["trace"] == name), key=order)
    ]  # fmt: skip
    page.data("domains", records)
    first = [share for (trace, *_), (_, share) in most.items() if trace == records[0]["trace"]]
    told = (Field("expert", "expert"), Field("domain", "domain"), Field("value", "share, %", ".0f"))
    page.chart(
        Chart(
            f"An expert of {records[0]['trace']} has {100 * sum(first) / len(first):.0f} % of its use from one domain, "
            "on average (measured)",
            "Share of each expert's use that comes from each domain, all domains of the same size; experts of a layer "
            "in the order of the domain that uses them most.",
            heat(Field("expert", "expert"), Field("domain", "domain"), Field("value", "share of the expert's use, %"),
                 told, table="domains", scale={"domain": [0, 100]}),
            ("domains",), wide=True,
        )
    )  # fmt: skip


def domains_of(rows: Sequence[Row], trace: str) -> list[str]:
    """Names the domains of a trace, in order; none if it has none."""
    its = (row for row in rows if row["measure"] == "domain share" and row["trace"] == trace)
    return list(dict.fromkeys(str(row["domain"]) for row in its))


def _records(rows: Sequence[Row], measure: str, scale: float, *, layers: bool = False) -> list[dict[str, Scalar]]:
    """Gives the rows of a measure in %; places are multiplied by ``scale``."""
    chosen = [
        row for row in rows if row["measure"] == measure and (row["layer"] is not None) == layers
    ]  # fmt: skip
    return [
        {SERIES: row["trace"], "place": scale * number(row, "layer" if layers else "place"),
         "value": 100 * number(row, "value")}
        for row in chosen
    ]  # fmt: skip


def _percent(row: Row) -> dict[str, Scalar]:
    return {"value": 100 * number(row, "value")}


def _range(others: Sequence[float]) -> str:
    """Says between what the others lie."""
    there = [value for value in others if value == value]
    if not there:
        return ""
    low, high = min(there), max(there)
    return f", the others' {low:.0f} %" if round(low) == round(high) else f", the others' {low:.0f} to {high:.0f} %"


def _least_and_most(records: Sequence[Record], name: str) -> str:
    values = [float(it["value"] or 0) for it in records if it[SERIES] == name]
    return f"{min(values):.0f} to {max(values):.0f} %" if values else "-"
