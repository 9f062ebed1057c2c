"""The page of `experiments.validate`, drawn from its table: what others measured beside what is predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specmd_jax.report import figures
from specmd_jax.report.charts import Chart, Field, dots
from specmd_jax.report.columns import Column, Row, Table
from specmd_jax.report.document import Document, Said, sentence
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import categories
from specmd_jax.report.terminal import aligned

COLUMNS: dict[str, Column] = {
    "id": Column("str", "the cell"),
    "engine": Column("str", "engine that was measured"),
    "model": Column("str", "model"),
    "precision": Column("str", "precision of the experts"),
    "device": Column("str", "device as published"),
    "link_gb_per_s": Column("float", "host or storage to device, GB/s"),
    "capacity": Column("str", "share of the experts, or slots, that are cached"),
    "policy": Column("str", "what is cached, and how misses are served"),
    "batch": Column("int", "requests decoded together"),
    "context": Column("str", "tokens, or the data set"),
    "tokens_per_s": Column("float", "measured tokens per second, as published"),
    "hit_rate": Column("float", "measured hits / demand, as published"),
    "copies_per_token": Column("float", "measured copies per token, as published"),
    "miss": Column("str", "where a miss is served: fetch (copied), cpu, split"),
    "misses_from": Column("str", "hit rate or copies: published; resident: none; share: a set chosen without regard "
                          "to use; lru: LRU on synthetic routing; empty: not expressed"),
    "misses_per_token": Column("float", "misses of a token that the prediction uses"),
    "hardware": Column("str", "machine of the prediction"),
    "shipped_tokens_per_s": Column("float", "predicted, nothing fitted"),
    "shipped_error": Column("float", "predicted / measured - 1"),
    "held_out_tokens_per_s": Column("float", "predicted, constants fitted on its engine's other models and capacities"),
    "held_out_error": Column("float", "predicted / measured - 1"),
    "layer_s": Column("float", "fixed time of a layer, fitted on all cells of the engine, seconds"),
    "rate_share": Column("float", "share of the link's (or host's) rate, fitted on all cells of the engine"),
    "source": Column("str", "where it is published"),
    "assumed": Column("str", "what had to be assumed"),
    "reason": Column("str", "why the cell cannot be expressed"),
    "evidence": Column("str", "measured and predicted"),
}  # fmt: skip
TABLE = Table("validate", COLUMNS, ("id",))
HEAD = (
    "engine", "cells", "expressible", "shipped median", "in 10 %", "in 20 %",
    "fitted cells", "held-out median", "in 10 % ", "in 20 % ", "layer, us", "share of rate",
)  # fmt: skip
HOW = {"shipped": "As shipped", "held_out": "Two constants, held out"}
_MARKERS = "osD^v<>PX*hpd8"


def summary(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    """Gives the line of some rows under `HEAD`."""
    told = [row for row in rows if row["shipped_error"] is not None]
    held = [row for row in told if row["held_out_error"] is not None]
    line = [name, str(len(rows)), str(len(told)), *_spread(told, "shipped"), str(len(held)), *_spread(held, "held_out")]
    engines = {row["engine"] for row in rows}
    if held and len(engines) == 1:
        share = number(held[0], "rate_share")
        return (*line, f"{1e6 * number(held[0], 'layer_s'):.0f}", f"{share:.2f}" if math.isfinite(share) else "free")
    return (*line, "-", "-")


def errors(rows: Sequence[Row], how: str) -> list[float]:
    """Gives the sizes of the errors of the rows that have a prediction."""
    return [abs(number(row, f"{how}_error")) for row in rows if row[f"{how}_error"] is not None]


def _spread(rows: Sequence[Row], how: str) -> tuple[str, str, str]:
    """Gives the median error and the cells within 10 and 20 %."""
    found = errors(rows, how)
    if not found:
        return "-", "-", "-"
    within = [f"{sum(error <= limit for error in found)}" for limit in (0.1, 0.2)]
    return f"{100 * float(np.median(found)):.1f} %", within[0], within[1]


def sentences(rows: Sequence[Row]) -> list[str]:
    """Gives what follows from the table."""
    lines = []
    for how, words in (
        ("shipped", "as shipped"),
        ("held_out", "with two constants fitted on the engine's other models and capacities"),
    ):
        found = errors(rows, how)
        if found:
            lines.append(f"{words}: {_stated(found)}")
    held = [row for row in rows if row["held_out_error"] is not None]
    told = [row for row in rows if row["shipped_error"] is not None]
    if 0 < len(held) < len(told):
        rest = errors([row for row in told if row["held_out_error"] is None], "shipped")
        lines.append(f"both, each cell held out where it is fitted: {_stated([*errors(held, 'held_out'), *rest])}")
    engines = [[row for row in held if row["engine"] == name] for name in dict.fromkeys(row["engine"] for row in held)]
    if len(engines) > 1:
        medians = [float(np.median(errors(mine, "held_out"))) for mine in engines]
        most = max(engines, key=len)
        lines.append(
            f"every engine counted once, the median of held-out medians is {100 * float(np.median(medians)):.1f} % "
            f"over {len(engines)} engines; {len(most)} of the {len(held)} cells are of {most[0]['engine']}"
        )
    untold = sum(row["reason"] is not None for row in rows)
    lines.append(f"{untold} of {len(rows)} cells cannot be expressed")
    return lines


def _stated(found: Sequence[float]) -> str:
    """Gives errors in words."""
    inside = [100 * sum(error <= limit for error in found) / len(found) for limit in (0.1, 0.2)]
    return (
        f"median error {100 * float(np.median(found)):.1f} % over {len(found)} cells, "
        f"{inside[0]:.0f} % of them within 10 %, {inside[1]:.0f} % within 20 %"
    )


def draw(out: Path) -> str:
    """Writes the figure, report.md and report.html into `out`; the table of engines as text for a terminal."""
    manifest, rows = read_manifest(out), read_rows(out)
    engines = list(dict.fromkeys(str(row["engine"]) for row in rows))
    body = [summary([row for row in rows if row["engine"] == name], name) for name in engines]
    body.append(summary(rows, "all"))
    page = Document(title(rows), manifest)
    lines = sentences(rows)
    page.answer([Said(sentence(line), str(rows[0]["evidence"])) for line in lines])
    page.text(
        "Tokens per second that others measured with their engines, and what the timing model says for one decoded "
        "token: predicted in closed form from the model's bytes, the machine's rates and the misses that were "
        "published. Where none were, LRU on synthetic routing gives them. Attention over the context is left out. As "
        "shipped, nothing is fitted. Held out: the engine adds (nothing overlaps), and two constants of the engine, "
        "a layer's fixed time and the share of its link or host that it reaches, are fitted on its cells of another "
        "model or capacity; engines with fewer than three expressible cells, and those that split misses, are not "
        "fitted. Cells of one engine often share a machine and an author, so held out does not mean unrelated. A "
        "share above 1 is no rate of a link: the assumed link is too slow, or copies are overlapped. Where a "
        "preset was chosen from the same source, the column of assumptions says so; holding cells out does not undo "
        "that."
    )
    _views(page, rows)
    page.heading("Engines")
    page.table([name.strip() for name in HEAD], body)
    page.picture(figures.save(_figure(rows), out, "validate"), "Measured against predicted tokens per second")
    page.heading("Cells")
    page.table(
        ("cell", "model", "capacity", "misses from", "misses", "measured", "shipped", "held out", "assumed", "source"),
        [_cell(row) for row in rows if row["reason"] is None],
    )
    untold = [row for row in rows if row["reason"] is not None]
    if untold:
        page.heading("Cells that cannot be expressed")
        page.table(
            ("cell", "engine", "model", "measured", "reason", "source"),
            [
                [str(row["id"]), str(row["engine"]), str(row["model"]), f"{number(row, 'tokens_per_s'):.4g}",
                 str(row["reason"]), str(row["source"])]
                for row in untold
            ],
        )  # fmt: skip
    return "\n".join([*aligned(HEAD, body), *lines, *map(str, page.save(out))])


def title(rows: Sequence[Row]) -> str:
    """States how far off predictions are."""
    told, held = errors(rows, "shipped"), errors(rows, "held_out")
    if not told:
        return f"None of {len(rows)} published measurements can be expressed"
    off, cells = f"{100 * float(np.median(told)):.1f} % off", f"{len(told)} published measurements"
    more = ""
    if held:
        more = f", {100 * float(np.median(held)):.1f} % with two constants of the engine fitted on its other cells"
    return f"Predicted tokens per second are {off} in the median of {cells}{more}"


MEASURED = Field("measured", "measured tokens a second (published)", ",.4~g")
TOLD = (
    Field("id", "cell"),
    Field("engine", "engine"),
    Field("model", "model"),
    Field("capacity", "cached"),
    MEASURED,
    Field("shipped", "predicted as shipped", ",.4~g"),
    Field("shipped_error", "error, %", "+.1f"),
    Field("held_out", "held out", ",.4~g"),
    Field("held_out_error", "error, %", "+.1f"),
    Field("misses_from", "misses from"),
    Field("assumed", "assumed"),
)


def _views(page: Document, rows: Sequence[Row]) -> None:
    """Adds predicted against measured, as shipped and held out, and the errors of each engine."""
    told = [row for row in rows if row["shipped_error"] is not None]
    if not told:
        return
    page.data(
        "rows",
        [
            {name: str(row[name] or "-") for name in ("id", "engine", "model", "capacity", "misses_from", "assumed")}
            | {"hardware": str(row["hardware"]), "misses": str(row["miss"]), "measured": number(row, "tokens_per_s")}
            | {how: number(row, f"{how}_tokens_per_s") for how in HOW}
            | {f"{how}_error": 100 * number(row, f"{how}_error") for how in HOW}
            for row in told
        ],
    )
    ends = [number(row, "tokens_per_s") for row in told] + [number(row, "shipped_tokens_per_s") for row in told]
    span = np.geomspace(0.7 * min(ends), 1.4 * max(ends), 30).tolist()
    page.data(
        "ideal",
        [
            {"at": at, "low": (1 - band) * at, "high": (1 + band) * at, "text": f"{100 * band:.0f} %"}
            for band in (0.2, 0.1)
            for at in span
        ],
    )
    page.filters(engine="engine", model="model", hardware="hardware", misses="a miss is")
    log = {"type": "log", "domain": [span[0], span[-1]]}
    for how, words in HOW.items():
        found = errors(rows, how)
        if not found:
            continue
        near = sum(error <= 0.2 for error in found)
        spec = dots(
            MEASURED, Field(how, "predicted tokens a second"), TOLD, color=Field("engine", "engine"),
            x_scale=log, y_scale=log, ideal="ideal", height=400,
        )  # fmt: skip
        page.chart(
            Chart(
                f"{words}: {near} of {len(found)} predictions lie within 20 % (estimated, beside measured)",
                "Predicted against measured tokens a second, a dot for each published cell; bands of 10 and 20 %.",
                spec, ("rows", "ideal"),
            )
        )  # fmt: skip
    page.rows("rows", TOLD, "Every cell that can be expressed")


def _cell(row: Row) -> list[str]:
    """Gives a line of the table of cells."""
    predicted = [
        "-"
        if row[f"{how}_error"] is None
        else f"{number(row, f'{how}_tokens_per_s'):.4g} ({100 * number(row, f'{how}_error'):+.0f} %)"
        for how in HOW
    ]
    head = [str(row[name]) for name in ("id", "model", "capacity", "misses_from")]
    measured = [f"{number(row, 'misses_per_token'):.1f}", f"{number(row, 'tokens_per_s'):.4g}"]
    return [*head, *measured, *predicted, str(row["assumed"] or ""), str(row["source"])]


def _figure(rows: Sequence[Row]) -> Figure:
    """Draws measured against predicted, as shipped (left) and held out (right), with bands of 10 and 20 %."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 2, sharex=True, sharey=True))
    names = list(dict.fromkeys(str(row["engine"]) for row in rows if row["shipped_error"] is not None))
    ends = [number(row, name) for row in rows for name in ("tokens_per_s", *(f"{how}_tokens_per_s" for how in HOW))
            if row["shipped_error"] is not None and row[name] is not None] or [1.0]  # fmt: skip
    looked = categories(names)
    line = np.array([0.7 * min(ends), 1.4 * max(ends)])
    for axes, (how, title) in zip(panels, HOW.items(), strict=True):
        for band, shade in ((0.2, 0.12), (0.1, 0.2)):
            axes.fill_between(line, (1 - band) * line, (1 + band) * line, color="#0072B2", alpha=shade, linewidth=0)
        axes.plot(line, line, color="#888888", linewidth=0.8)
        for place, name in enumerate(names):
            mine = [row for row in rows if row["engine"] == name and row[f"{how}_error"] is not None]
            axes.plot(
                [number(row, "tokens_per_s") for row in mine],
                [number(row, f"{how}_tokens_per_s") for row in mine],
                _MARKERS[place % len(_MARKERS)], color=looked[name].color, markersize=5, alpha=0.85, label=name,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=line, ylim=line, title=title, xlabel="measured tokens/s (published)")
    panels[0].set_ylabel("predicted tokens/s (bands: 10 and 20 %)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
