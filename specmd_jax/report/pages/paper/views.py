"""The answer and the charts of `experiments.paper`'s page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specmd_jax.report.charts import SERIES, Chart, Field, bars, dots, heat, lines
from specmd_jax.report.columns import Row, Scalar
from specmd_jax.report.document import Document, Said
from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper.claims import CLAIMS
from specmd_jax.report.pages.paper.points import EVICTIONS, PREDICTORS, Point
from specmd_jax.report.pages.paper.results import MIDDLE, Results
from specmd_jax.report.rows import number
from specmd_jax.report.style import Look, categories, looks
from specmd_jax.report.verdicts import CONTRADICTED, DIRECTION, REPRODUCED, UNTESTABLE, Judged

ORDER = (REPRODUCED, DIRECTION, CONTRADICTED, UNTESTABLE)
CONTROLS = ("perfect", "shuffled")

Verdicts = dict[str, list[tuple[str, Judged]]]  # evidence -> (claim, verdict)


def judged(results: Results, groups: Mapping[str, Sequence[str]]) -> Verdicts:
    """Gives the verdict of each claim on each kind of routing."""
    return {kind: [(claim.text, claim.judge(results, traces)) for claim in CLAIMS] for kind, traces in groups.items()}


def title(found: Verdicts) -> str:
    """States how many claims hold, on the routing that tests most of them."""
    kind = max(found, key=lambda kind: sum(verdict.verdict != UNTESTABLE for _, verdict in found[kind]))
    count = {name: sum(verdict.verdict == name for _, verdict in found[kind]) for name in ORDER}
    tested = len(found[kind]) - count[UNTESTABLE]
    return (
        f"SpecMD's claims: {count[REPRODUCED]} of {tested} that can be tested are reproduced, {count[DIRECTION]} in "
        f"direction, {count[CONTRADICTED]} contradicted ({kind})"
    )


def answer(found: Verdicts) -> list[Said]:
    """Gives the claims by verdict."""
    said = []
    for kind, verdicts in found.items():
        for name in ORDER[:3]:
            claims = [text for text, verdict in verdicts if verdict.verdict == name]
            if claims:
                said.append(Said(f"{name.capitalize()}, {len(claims)}: {'; '.join(claims)}.", kind))
    return said


def fill(page: Document, results: Results, rows: Sequence[Row], found: Verdicts) -> None:
    """Adds the charts that the rows support."""
    names = [name for name in EVICTIONS if any(row["eviction"] == name for row in rows)]
    style: dict[str, Look] = looks(names) | categories(_predictors(results))
    page.series(style, list(style), "evictions, then predictors")
    page.filters(trace="routing of", bits="bits", capacity="cache, %", layer_at="cache, % (by layer)!")
    _verdicts(page, found)
    _collisions(page, results)
    _layers(page, results)
    _prefetch(page, results)
    _rankings(page, results)


def _verdicts(page: Document, found: Verdicts) -> None:
    page.data(
        "verdicts",
        [
            {"verdict": name, "kind": kind, "claims": sum(verdict.verdict == name for _, verdict in verdicts)}
            for kind, verdicts in found.items()
            for name in ORDER
        ],
    )
    told = (Field("verdict", "verdict"), Field("claims", "claims", "d"), Field("kind", "routing"))
    spec = bars(told[0], told[1], told, table="verdicts", group=Field("kind", ""), order=list(ORDER))
    page.chart(Chart(title(found), "Claims by verdict, for each kind of routing.", spec, ("verdicts",)))


def _collisions(page: Document, results: Results) -> None:
    """Collisions beside misses."""
    records: list[dict[str, Scalar]] = []
    for trace in results.evidence:
        for bits in results.bits:
            for pct in paper.CAPACITIES_PCT:
                for name in EVICTIONS:
                    row = results.get(trace, Point(name, bits=(float(bits),)), pct)
                    if row is not None:
                        records.append({
                            SERIES: name, "trace": trace, "bits": bits, "capacity": f"{pct:g}",
                            "cycles": number(row, "cycles"), "hit": 100 * number(row, "hit_rate"),
                            "misses": 1000 * number(row, "misses") / number(row, "demand"),
                            "collisions": 1000 * number(row, "collisions") / number(row, "demand"),
                        })  # fmt: skip
    if not records:
        return
    page.data("rows", records)
    x = Field("misses", "misses per 1000 demanded experts", ",.4~g")
    y = Field("collisions", "collisions per 1000 demanded experts", ",.4~g")
    told = (
        Field(SERIES, "eviction"), Field("trace", "routing of"), Field("bits", "bits"), Field("capacity", "cache, %"),
        Field("cycles", "token cycles", ".2f"), x, y, Field("hit", "hit rate, %", ".1f"),
    )  # fmt: skip
    share = [float(it["collisions"]) / float(it["misses"]) for it in records if it["misses"] and it["capacity"] == "5"]  # type: ignore[arg-type]
    middle = f": at 5 % they are {100 * float(np.median(share)):.0f} % of the misses in the middle" if share else ""
    page.chart(
        Chart(
            f"Collisions are a part of the misses{middle} (simulated)",
            "Collisions against all misses, a dot for each policy, routing, precision and cache size.",
            dots(x, y, told, height=360), ("rows",), note="Few collisions are worth little if misses rise.",
        )
    )  # fmt: skip


def _layers(page: Document, results: Results) -> None:
    """Collisions and misses by layer."""
    records: list[dict[str, Scalar]] = []
    for trace in results.evidence:
        for pct in paper.CAPACITIES_PCT:
            for name in EVICTIONS:
                for row in results.layers(trace, Point(name), pct):
                    records.append({
                        SERIES: name, "layer_at": f"{trace}, {pct:g} %", "layer": int(number(row, "layer")),
                        "misses": number(row, "misses"), "collisions": number(row, "collisions"),
                    })  # fmt: skip
    if not records:
        return
    page.data("layers", records)
    first = [record for record in records if record["layer_at"] == records[0]["layer_at"]]
    x = Field("layer", "MoE layer", "d")
    told = (Field(SERIES, "eviction"), x, Field("misses", "misses", ",d"), Field("collisions", "collisions", ",d"))
    for name in ("collisions", "misses"):
        most = max(first, key=lambda record: float(record[name] or 0))
        page.chart(
            Chart(
                f"{name.capitalize()} by layer: most in layer {most['layer']} with {most[SERIES]}, {most[name]:,.0f} "
                f"({most['layer_at']}; simulated)",
                f"{name.capitalize()} in each layer, a line for each eviction policy.",
                lines(x, Field(name, name), told, table="layers", dots=True, y_scale={"zero": True},
                      x_axis={"tickMinStep": 1, "grid": False}),
                ("layers",), {"table": "layers", "x": "layer", "y": name},
            )
        )  # fmt: skip


def _predictors(results: Results) -> list[str]:
    return [
        name
        for name, point in PREDICTORS.items()
        if name != "none" and any(results.get(trace, point, MIDDLE) is not None for trace in results.evidence)
    ]


def _prefetch(page: Document, results: Results) -> None:
    """Recall of predictors beside what bounds and controls them."""
    records: list[dict[str, Scalar]] = []
    for trace in results.evidence:
        for pct in paper.CAPACITIES_PCT:
            plain = results.get(trace, Point(), pct)
            for name, point in PREDICTORS.items():
                row = results.get(trace, point, pct)
                same = row is not None and (point.prefetch == "gate_ahead") == (row["prefetch"] == "gate_ahead")
                if name == "none" or row is None or not same or plain is None:
                    continue
                records.append({
                    SERIES: name, "trace": trace, "capacity": f"{pct:g}",
                    "recall": 100 * number(row, "prefetch_recall"),
                    "precision": 100 * number(row, "prefetch_precision"),
                    "stall": 100 * (number(row, "stall_s") / number(plain, "stall_s") - 1)
                    if number(plain, "stall_s") else None,
                    "kind": "bound or control" if name in CONTROLS else "predictor",
                })  # fmt: skip
    if not records:
        return
    page.data("prefetch", records)
    recall, stall = Field("recall", "recall, %", ".1f"), Field("stall", "stall against no prefetch, %", "+.1f")
    told = (
        Field(SERIES, "predictor"), Field("kind", "what it is"), Field("trace", "routing of"),
        Field("capacity", "cache, %"), Field("precision", "precision, %", ".1f"), recall, stall,
    )  # fmt: skip
    fair = [record for record in records if record["kind"] == "predictor" and record["stall"] is not None]
    less = sum(float(record["stall"] or 0) < -1 for record in fair)
    page.chart(
        Chart(
            f"Prefetching stalls less than none in {less} of {len(fair)} cases (simulated)",
            "Recall of each predictor against its stall; perfect sees the future, shuffled is a control.",
            dots(recall, stall, told, table="prefetch", height=360), ("prefetch",),
            note="perfect sees the future (a bound); shuffled deals it to wrong tokens (a control). LRU, 4 bit.",
        )
    )  # fmt: skip


def _rankings(page: Document, results: Results) -> None:
    """Misses against LRU by regime."""
    records: list[dict[str, Scalar]] = []
    wins: dict[str, int] = {}
    for trace in results.evidence:
        for bits in results.bits:
            for pct in paper.CAPACITIES_PCT:
                base = results.get(trace, Point(bits=(float(bits),)), pct)
                if base is None or not number(base, "misses"):
                    continue
                for name in (name for name in EVICTIONS if name not in ("lru", "belady")):
                    row = results.get(trace, Point(name, bits=(float(bits),)), pct)
                    if row is None:
                        continue
                    change = 100 * (number(row, "misses") / number(base, "misses") - 1)
                    wins[name] = wins.get(name, 0) + (change < -1)
                    records.append({
                        SERIES: name, "trace": trace, "bits": bits, "capacity": f"{pct:g}", "change": change,
                        "shown": f"{change:+.0f}", "where": f"{trace}, {bits} bit, {pct:g} %",
                    })  # fmt: skip
    if not records:
        return
    page.data("ranks", records)
    places = len({record["where"] for record in records})
    best = max(wins, key=lambda name: wins[name])
    told = (Field(SERIES, "eviction"), Field("where", "where"), Field("change", "misses against lru, %", "+.1f"))
    scale: dict[str, Any] = {"scheme": "purpleorange", "reverse": True, "domainMid": 0}
    page.chart(
        Chart(
            f"{best} misses over 1 % less than lru in {wins[best]} of {places} regimes (simulated)",
            "Misses of each policy against LRU's by routing, precision and cache size, in %.",
            heat(told[1], told[0], told[2], told, table="ranks", scale=scale, height=240), ("ranks",), wide=True,
        )
    )  # fmt: skip
