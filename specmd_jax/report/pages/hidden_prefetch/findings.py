"""What `experiments.hidden_prefetch` finds, as sentences that follow from its table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.hidden_prefetch.table import AFTER, BEFORE, BOUND, GATE, IDS, NONE, found, value
from specmd_jax.report.rows import number

SIMULATED, BOTH = "simulated", "simulated, with estimated work"


def named(rows: Sequence[Row]) -> list[str]:
    """Gives all predictors, in order."""
    return list(dict.fromkeys(str(row["predictor"]) for row in rows if row["predictor"] not in (None, NONE)))


def first_count(rows: Sequence[Row]) -> float:
    """Gives the least number of experts that is predicted, in units of K."""
    return min(number(row, "count") for row in rows if row["study"] == "recall")


def recall_of(rows: Sequence[Row], name: str, ahead: int = 1) -> float:
    """Gives recall in %, with the least number predicted."""
    return 100 * value(rows, "recall", "recall", predictor=name, ahead=ahead, count=first_count(rows))


def title(rows: Sequence[Row]) -> str:
    own, ids = recall_of(rows, BEFORE), recall_of(rows, IDS)
    text = f"From activations before attention a linear map names {own:.0f} % of the next layer's experts"
    return text if math.isnan(ids) else f"{text}, a predictor of ids alone {ids:.0f} %"


def answer(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Gives each sentence with what its numbers are."""
    return [*_recall(rows), *_stall(rows), *_cost(rows)]


def _recall(rows: Sequence[Row]) -> list[tuple[str, str]]:
    told = {name: recall_of(rows, name) for name in named(rows)}
    shown = sorted(
        (name for name, at in told.items() if not math.isnan(at) and "rank" not in name), key=lambda name: -told[name]
    )
    listed = ", ".join(f"{name} {told[name]:.1f} %" for name in shown)
    text = (
        f"Recall of the next layer's experts on texts that trained nothing, {first_count(rows):g} K predicted: {listed}"
    )
    said = [(f"{text}.", SIMULATED)]
    small = [name for name in told if "rank" in name]
    if small:
        work = {name: value(rows, "cost", "multiply-adds", predictor=name) for name in (BEFORE, *small)}
        parts = [
            f"{name} has {told[name]:.1f} % for {100 * work[name] / work[BEFORE]:.0f} % of the operations"
            for name in small
        ]
        said.append((f"A smaller map loses recall: {'; '.join(parts)} (the full one {told[BEFORE]:.1f} %).", SIMULATED))
    aheads = sorted(
        {int(number(row, "ahead")) for row in rows if row["study"] == "recall" and row["predictor"] == BEFORE}
    )
    if len(aheads) > 1:
        parts = [f"{recall_of(rows, BEFORE, ahead):.1f} % {_where(ahead)}" for ahead in aheads]
        said.append((
            f"The same kind of map names {', '.join(parts)}. What it says of its own layer is known only one attention "
            "before the gate itself, which a replay from gate to gate cannot use.", SIMULATED,
        ))  # fmt: skip
    return said


def linked(link: str) -> str:
    """Names a link: layer times that a copy takes, or a machine's."""
    try:
        return f"a copy in {float(link):g} layer times"
    except ValueError:
        return f"the link of {link}"


def _where(ahead: int) -> str:
    return {0: "of its own layer", 1: "of the next"}.get(ahead, f"{ahead} layers ahead")


def _stall(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Says what is saved, for each link and cache, with the work charged."""
    said = []
    cells = [row for row in rows if row["measure"] == "stall saved, free" and row["predictor"] == BEFORE]
    for link in dict.fromkeys(row["link"] for row in cells):
        parts = []
        for size in dict.fromkeys(row["capacity"] for row in cells if row["link"] == link):
            at = {"link": link, "capacity": size}
            names = [name for name in (BEFORE, GATE, AFTER, IDS, "online", BOUND) if name in named(rows)]
            listed = ", ".join(f"{name} {saved_of(rows, name, **at):.0f} %" for name in names)
            parts.append(f"at {size} {listed}")
        said.append((f"Stall saved with {linked(str(link))}: {'; '.join(parts)}.", BOTH))
    return said


def saved_of(rows: Sequence[Row], name: str, **at: object) -> float:
    """Gives the stall saved in %, with the predictor's work charged where it has any."""
    for charge in ("charged", "free"):
        share = value(rows, "replay", f"stall saved, {charge}", predictor=name, **at)
        if not math.isnan(share):
            return 100 * share
    return math.nan


def _cost(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Says what the map costs, what it may cost, and what a launch leaves of what it saves."""
    work, read = (value(rows, "cost", what, predictor=BEFORE) for what in ("multiply-adds", "bytes read"))
    own, ids = (1e6 * value(rows, "cost", "s a visit", predictor=name) for name in (BEFORE, IDS))
    text = f"The map takes {work:,.0f} multiply-adds and {read:,.0f} bytes a layer, {own:.3f} us by the machine's rates"
    if not math.isnan(ids):
        low, high = (f"{us:.1f} us a layer (at {size}, {linked(link)})" for us, size, link in _worth(rows))
        text += (
            f"; the predictor of ids {ids:.3f} us. What the map saves over the predictor of ids is worth {low} to "
            f"{high}: if it takes so much longer than the other, nothing is gained"
        )
    launched, free = (
        [100 * number(row, "value") for row in found(rows, "replay", f"stall saved, {charge}", predictor=BEFORE)]
        for charge in ("launched", "free")
    )
    layer_us = 1e6 * value(rows, "replay", "layer time, s")
    if not launched or math.isnan(layer_us):
        return [(f"{text}.", BOTH)]
    launch = (
        f"As a kernel of its own, with a launch beside the {layer_us:.0f} us of a layer, the map saves "
        f"{min(launched):.0f} to {max(launched):.0f} % of the stall, inside of another "
        f"{min(free):.0f} to {max(free):.0f} %."
    )
    return [(f"{text}.", BOTH), (launch, BOTH)]


def _worth(rows: Sequence[Row]) -> tuple[tuple[float, str, str], tuple[float, str, str]]:
    """Gives the least and the most time, in us a layer, that the map saves over the predictor of ids, and where."""
    layers = 1 + max(int(number(row, "layer")) for row in rows if row["layer"] is not None)
    told = []
    for row in found(rows, "replay", "stall, s a token, free", predictor=BEFORE):
        at = {"link": row["link"], "capacity": row["capacity"]}
        more_s = value(rows, "replay", "stall, s a token, free", predictor=IDS, **at) - number(row, "value")
        told.append((1e6 * more_s / layers, str(row["capacity"]), str(row["link"])))
    return min(told, default=(math.nan, "-", "-")), max(told, default=(math.nan, "-", "-"))
