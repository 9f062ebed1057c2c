"""The charts of a study's page: who is fastest where and by how much, and what a larger cache buys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specmd_jax.report.charts import Chart, Field, heat, lines, tiles
from specmd_jax.report.columns import Scalar
from specmd_jax.report.document import Document
from specmd_jax.report.pages.study.findings import place_name, some
from specmd_jax.report.pages.study.table import TIE_PCT, Mix, Place, base_of, first_of
from specmd_jax.report.rows import mix_name, number
from specmd_jax.report.style import looks
from specmd_jax.units import GB, GIB

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
