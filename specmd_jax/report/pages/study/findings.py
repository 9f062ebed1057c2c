"""What follows from a study's table, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from specmd_jax.report.pages.study.table import TIE_PCT, Cost, Place, base_of, first_of
from specmd_jax.report.rows import mix_name, number
from specmd_jax.units import GB


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


def some(every: Sequence[Place], capacities: int = 8, links: int = 3) -> list[Place]:
    """Gives places that are spread evenly."""

    def few(values: set[Any], count: int) -> set[Any]:
        ordered = sorted(values)
        return {ordered[round(at)] for at in np.linspace(0, len(ordered) - 1, min(count, len(ordered))).tolist()}

    sizes = few({place.capacity_bytes for place in every}, capacities)
    rates = few({place.link_bytes_per_s for place in every}, links)
    return [place for place in every if place.capacity_bytes in sizes and place.link_bytes_per_s in rates]
