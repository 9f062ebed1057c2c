"""The page of `experiments.study`, drawn from its table and cells: who is best where, what it gains, what it cost."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from specmd_jax.errors import SpecmdError
from specmd_jax.report.charts import Chart, Field, heat, lines, tiles
from specmd_jax.report.columns import Column, Row, Scalar, Table
from specmd_jax.report.document import Document, Said, sentence
from specmd_jax.report.figures import save
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import mix_name, number
from specmd_jax.report.style import looks
from specmd_jax.units import GB, GIB

CELLS = "cells"
KEY = ("eviction", "prefetch", "capacity_bytes", "link_bytes_per_s")
COLUMNS: dict[str, Column] = {
    "model": Column("str", "model"),
    "contract": Column("str", "replay contract"),
    "eviction": Column("str", "eviction policy"),
    "prefetch": Column("str", "predictor"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_pct": Column("float", "cache size as a share of all experts, in %"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "link_bytes_per_s": Column("float", "rate of the link"),
    "cells": Column("int", "values of the policy's number that were tried"),
    "number": Column("str", "the number that was varied; empty: none"),
    "value": Column("float", "its best value"),
    "tpot_s": Column("float", "mean time of a decode pass with that value, seconds"),
    "tpot_default_s": Column("float", "the same with the policy's default"),
    "tpot_worst_s": Column("float", "the same with the worst value"),
    "hit_rate": Column("float", "hits over demanded experts with the best value, 0 to 1"),
    "stall_s": Column("float", "time that the device waits for experts"),
    "link_bytes": Column("int", "bytes copied over the link, prefetched ones included"),
    "evidence": Column("str", "simulated"),
}
TABLE = Table("study", COLUMNS, KEY)
TIE_PCT = 1.0
"""Mixes within this much of the best TPOT share a place."""

Mix = tuple[str, str]


class Place(NamedTuple):
    """A capacity and a link, with the row of every mix."""

    capacity_bytes: int
    link_bytes_per_s: float
    rows: dict[Mix, Row]

    @property
    def best(self) -> Mix:
        return min(self.rows, key=lambda mix: number(self.rows[mix], "tpot_s"))

    @property
    def tied(self) -> list[Mix]:
        """Gives the mixes within a tie of the best, the best first."""
        least = number(self.rows[self.best], "tpot_s")
        near = [mix for mix, row in self.rows.items() if number(row, "tpot_s") <= least * (1 + TIE_PCT / 100)]
        return sorted(near, key=lambda mix: number(self.rows[mix], "tpot_s"))

    def gain_pct(self, base: Mix) -> float:
        """Gives what the best takes less than `base`."""
        return 100 * (1 - number(self.rows[self.best], "tpot_s") / number(self.rows[base], "tpot_default_s"))


def places(rows: Sequence[Row]) -> list[Place]:
    found: dict[tuple[int, float], dict[Mix, Row]] = {}
    for row in rows:
        key = int(number(row, "capacity_bytes")), number(row, "link_bytes_per_s")
        found.setdefault(key, {})[str(row["eviction"]), str(row["prefetch"])] = row
    return [Place(*key, found[key]) for key in sorted(found)]


class Cost(NamedTuple):
    """What the cells took, by the clock of the runs that replayed them."""

    cells: int
    visits: int  # of one cell
    took_s: float
    devices: tuple[str, ...]

    @property
    def rate(self) -> float:
        return self.cells * self.visits / self.took_s


def cost_of(out: Path) -> Cost:
    cells, visits, took_s, devices = 0, 0, 0.0, set[str]()
    for path in sorted((out / CELLS).glob("*.npz")):
        try:
            with np.load(path) as file:
                cells += file["tpot_s"].size
                visits, took_s = int(file["visits"]), took_s + float(file["took_s"])
                devices.add(str(file["device"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise SpecmdError(f"{path}: not a file of cells ({error}); delete it and run the study again") from error
    return Cost(cells, visits, took_s, tuple(sorted(devices)))


def findings(every: Sequence[Place]) -> list[str]:
    """Gives sentences that follow from the table, what is best first."""
    mixes = list(every[0].rows)
    wins = {mix: sum(place.best == mix for place in every) for mix in mixes}
    ties = {mix: sum(mix in place.tied for place in every) for mix in mixes}
    order = sorted(mixes, key=lambda mix: (-ties[mix], -wins[mix]))
    base = base_of(mixes)
    said = []
    if base not in order[:1]:
        gains = [place.gain_pct(base) for place in every]
        top = max(every, key=lambda place: place.gain_pct(base))
        said.append(
            f"choosing by place takes {np.median(gains):.1f} % less time a token than {mix_name(*base)} "
            f"(median over places), at most {max(gains):.1f} %: {mix_name(*top.best)} at {place_name(top)}"
        )
    said += [
        f"{mix_name(*mix)}: best at {wins[mix]} of {len(every)} places, within {TIE_PCT:g} % of the best at {ties[mix]}"
        for mix in order
    ]
    for mix in mixes:
        rows = [place.rows[mix] for place in every]
        if rows[0]["number"] is None:
            continue
        gains = [100 * (1 - number(row, "tpot_s") / number(row, "tpot_default_s")) for row in rows]
        spread = [100 * (number(row, "tpot_worst_s") / number(row, "tpot_s") - 1) for row in rows]
        said.append(
            f"{mix_name(*mix)}: the best {rows[0]['number']} takes {np.median(gains):.1f} % less than its default "
            f"(median over places; at most {max(gains):.1f} %), the worst {np.median(spread):.1f} % more than the best"
        )
    return said


def price(cost: Cost) -> str:
    """Says what the cells took."""
    return (
        f"{cost.cells:,} cells of {cost.visits:,} visits in {cost.took_s:,.1f} s on {', '.join(cost.devices)} "
        f"(measured, compiling included): {cost.rate / 1e6:,.1f} M cell-visits/s; a million such cells would take "
        f"{duration(1e6 * cost.visits / cost.rate)} (extrapolated)"
    )


def base_of(mixes: Sequence[Mix]) -> Mix:
    """Gives the mix that others are held against: lru without prefetch, or the first."""
    return ("lru", "none") if ("lru", "none") in mixes else mixes[0]


def place_name(place: Place) -> str:
    return f"{number(first_of(place), 'capacity_pct'):.3g} % of the experts and {place.link_bytes_per_s / GB:.3g} GB/s"


def title(every: Sequence[Place]) -> str:
    """States which mix is best at most places."""
    mixes = list(every[0].rows)
    ties = {mix: sum(mix in place.tied for place in every) for mix in mixes}
    mix = max(mixes, key=lambda mix: ties[mix])
    model = first_of(every[0])["model"]
    return f"{model}: {mix_name(*mix)} is fastest, or ties, at {ties[mix]} of {len(every)} caches and links"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def draw(out: Path) -> str:
    """Writes report.md, report.html and figures/*.png into `out`; the findings as text for a terminal."""
    manifest, every, cost = read_manifest(out), places(read_rows(out)), cost_of(out)
    config = manifest["config"]
    page = Document(title(every), manifest)
    found = findings(every)
    evidence, names = str(first_of(every[0])["evidence"]), [mix_name(*mix) for mix in every[0].rows]
    page.answer([*(Said(sentence(line, names), evidence) for line in found), Said(price(cost), "measured")])
    page.text(
        f"Simulated on recorded routing ({config['tokens'] or 'all'} tokens, event contract, one pool, decode passes "
        f"of one request at a time); {config['hardware']} but for the link's rate. TPOT is the mean time of a decode "
        "pass. A place is a capacity with a link. Values were chosen and judged on the same tokens: what tuning gains "
        "is an upper bound of what it would gain on others."
    )
    views(page, every)
    page.picture(save(picture(every, config), out, "places"), "best mix, and what it gains")
    mixes = list(every[0].rows)
    page.heading("Some places", html=False)
    page.table(
        ("cache", "link GB/s", *(f"{mix_name(*mix)}, ms" for mix in mixes), "best"),
        [
            [
                f"{number(first_of(place), 'capacity_pct'):.1f} % (C/T {number(first_of(place), 'cycles'):.2f})",
                f"{place.link_bytes_per_s / GB:.1f}",
                *(shown(place.rows[mix]) for mix in mixes),
                mix_name(*place.best),
            ]
            for place in some(every)
        ],
        html=False,
    )
    return "\n".join([*found, price(cost), *map(str, page.save(out))])


def views(page: Document, every: Sequence[Place]) -> None:
    """Adds the winners over capacity and link with their margins, and TPOT against capacity for a link."""
    mixes = list(every[0].rows)
    base = base_of(mixes)
    page.data("places", [_place_record(place, base) for place in every])
    page.data("rows", [_record(place, mix) for place in every for mix in mixes])
    page.filters(link="link, GB/s (curves)!", eviction="eviction", prefetch="prefetch")
    names = [mix_name(*mix) for mix in mixes]
    ties = {mix_name(*mix): sum(mix in place.tied for place in every) for mix in mixes}
    order = sorted(names, key=lambda name: -ties[name])
    found = looks(names)
    page.series({name: found[name] for name in order}, order[:5], "mixes, most often best first")
    told = (
        Field(PCT.name, PCT.label, ".3~g"), Field("gib", "GiB", ".2f"), Field("rate", "link, GB/s", ".3~g"),
        Field("best", "best"), Field("second", "next"), Field("margin", "margin, %", ".2f"),
        Field("tpot", "TPOT, ms", ",.2f"), Field("gain", f"less than {mix_name(*base)}, %", ".1f"),
    )  # fmt: skip
    ordinal = Field("size", "cache, % of all experts"), Field("speed", "link, GB/s")
    alone = sum(len(place.tied) == 1 for place in every)
    page.chart(
        Chart(
            f"One mix alone is fastest at {alone} of {len(every)} places; at the others several tie (simulated)",
            "The fastest mix for each cache size and link. Grey tiles are ties within 1 %. "
            + " ".join(f"{place_name(it)}: {' = '.join(mix_name(*mix) for mix in it.tied)}." for it in some(every)),
            tiles(*ordinal, told, table="places", height=_height(every)), ("places",), wide=True,
            note=f"In the colour of its mix where it is more than {TIE_PCT:g} % faster than the next; grey: a tie.",
        )
    )  # fmt: skip
    gains = [place.gain_pct(base) for place in every]
    page.chart(
        Chart(
            f"Against {mix_name(*base)} the best takes {np.median(gains):.1f} % less time in the middle, at most "
            f"{max(gains):.1f} % (simulated)",
            "What the best mix takes less than " + mix_name(*base) + " at each place.",
            heat(*ordinal, Field("gain", "less TPOT, %"), told, table="places", height=_height(every)), ("places",),
        )
    )  # fmt: skip
    page.chart(
        Chart(
            _curve_title(every),
            "Time of a token against cache size for the chosen link.",
            lines(PCT, Field("tpot", "TPOT, ms"), TOLD, dots=True, y_scale={"zero": True},
                  x_scale={"type": "log"} if len({place.capacity_bytes for place in every}) > 3 else None),
            ("rows",), {"table": "rows", "x": "pct", "y": "tpot"},
        )
    )  # fmt: skip
    page.heading("All places")
    page.rows("rows", TOLD, "Each mix with its best value, at each cache size and link")


PCT = Field("pct", "cache size, % of all experts", ".3~g")
TOLD = (
    Field("series", "mix"),
    PCT,
    Field("gib", "GiB", ".2f"),
    Field("cycles", "token cycles", ".2f"),
    Field("rate", "link, GB/s", ".3~g"),
    Field("tpot", "TPOT, ms", ",.3f"),
    Field("hit", "hit rate, %", ".1f"),
    Field("stall", "stall, s", ",.3~g"),
    Field("number", "number"),
    Field("value", "best value", ".3~g"),
    Field("default", "TPOT with its default, ms", ",.3f"),
    Field("worst", "with the worst, ms", ",.3f"),
)


def _height(every: Sequence[Place]) -> int:
    return min(460, 90 + 26 * len({place.link_bytes_per_s for place in every}))


def _curve_title(every: Sequence[Place]) -> str:
    """States what a larger cache buys with the slowest link, which is chosen at first."""
    slow = [place for place in every if place.link_bytes_per_s == every[0].link_bytes_per_s]
    first, last = (1e3 * number(place.rows[place.best], "tpot_s") for place in (slow[0], slow[-1]))
    return (
        f"At {every[0].link_bytes_per_s / GB:.3g} GB/s the best take {first:.3g} ms with "
        f"{number(first_of(slow[0]), 'capacity_pct'):.3g} % of the experts cached, {last:.3g} ms with "
        f"{number(first_of(slow[-1]), 'capacity_pct'):.3g} % (simulated)"
    )


def _place_record(place: Place, base: Mix) -> dict[str, Scalar]:
    order = sorted(place.rows, key=lambda mix: number(place.rows[mix], "tpot_s"))
    row = place.rows[order[0]]
    second = order[1] if len(order) > 1 else order[0]
    return {
        "series": mix_name(*order[0]) if len(place.tied) == 1 else None,
        "size": f"{number(row, 'capacity_pct'):.3g}",
        "speed": f"{place.link_bytes_per_s / GB:.3g}",
        "pct": number(row, "capacity_pct"),
        "gib": place.capacity_bytes / GIB,
        "rate": place.link_bytes_per_s / GB,
        "best": " = ".join(mix_name(*mix) for mix in place.tied),
        "second": mix_name(*second),
        "margin": 100 * (number(place.rows[second], "tpot_s") / number(row, "tpot_s") - 1),
        "tpot": 1e3 * number(row, "tpot_s"),
        "gain": place.gain_pct(base),
    }


def _record(place: Place, mix: Mix) -> dict[str, Scalar]:
    row = place.rows[mix]
    return {
        "series": mix_name(*mix),
        "eviction": mix[0],
        "prefetch": mix[1],
        "link": f"{place.link_bytes_per_s / GB:.3g}",
        "pct": number(row, "capacity_pct"),
        "gib": place.capacity_bytes / GIB,
        "cycles": number(row, "cycles"),
        "rate": place.link_bytes_per_s / GB,
        "tpot": 1e3 * number(row, "tpot_s"),
        "hit": 100 * number(row, "hit_rate"),
        "stall": number(row, "stall_s"),
        "number": row["number"],
        "value": row["value"],
        "default": 1e3 * number(row, "tpot_default_s"),
        "worst": 1e3 * number(row, "tpot_worst_s"),
    }


def some(every: Sequence[Place], capacities: int = 8, links: int = 3) -> list[Place]:
    """Gives places that are spread evenly."""

    def few(values: set[Any], count: int) -> set[Any]:
        ordered = sorted(values)
        return {ordered[round(at)] for at in np.linspace(0, len(ordered) - 1, min(count, len(ordered))).tolist()}

    sizes = few({place.capacity_bytes for place in every}, capacities)
    rates = few({place.link_bytes_per_s for place in every}, links)
    return [place for place in every if place.capacity_bytes in sizes and place.link_bytes_per_s in rates]


def first_of(place: Place) -> Row:
    return next(iter(place.rows.values()))


def shown(row: Row) -> str:
    value = "" if row["number"] is None else f" ({row['number']} {number(row, 'value'):.2f})"
    return f"{1e3 * number(row, 'tpot_s'):.2f}{value}"


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
