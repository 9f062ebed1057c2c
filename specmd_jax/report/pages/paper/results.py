"""The rows of `experiments.paper`, found by trace, mix and capacity, and what is read off several of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper.points import EVICTIONS, MIXES, PREDICTORS, RECORDED, SYSTEMS, Point
from specmd_jax.report.rows import number
from specmd_jax.report.verdicts import cut_pct

ONLINE = tuple(name for name in EVICTIONS if name != "belady")
SMALL, MIDDLE = paper.CAPACITIES_PCT[:2]
GATE = PREDICTORS["gate, top-k"]


class Results:
    """The rows of whole models, found by trace, point and capacity; beside them what models read (`quality`, rows of
    `experiments.quality`)."""

    def __init__(self, rows: Iterable[Row], quality: Iterable[Row] = ()) -> None:
        self.quality: list[Row] = list(quality)
        self.evidence: dict[str, str] = {}
        self.bits: list[str] = []
        self._rows: dict[tuple[object, ...], Row] = {}
        self._layers: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            key = self._key(str(row["trace"]), row, number(row, "capacity_pct"))
            if row["layer"] is not None:
                self._layers.setdefault(key, []).append(row)
                continue
            self._rows[key] = row
            self.evidence.setdefault(str(row["trace"]), str(row["evidence"]))
            if row["bits"] in ("4", "8") and row["bits"] not in self.bits:
                self.bits.append(str(row["bits"]))

    @staticmethod
    def _key(trace: str, names: Row, pct: float) -> tuple[object, ...]:
        return (trace, *(names[name] for name in Point().columns()), pct)

    def get(self, trace: str, point: Point, pct: float) -> Row | None:
        """Gives the row of a point, or of what stands in for it on recorded routing, which has no scores."""
        if self.evidence.get(trace) == RECORDED:
            point = point.on(ahead=False, logits=False)
        return self._rows.get(self._key(trace, point.columns(), pct))

    def layers(self, trace: str, point: Point, pct: float) -> list[Row]:
        """Gives the rows of the layers of a point, in order."""
        return self._layers.get(self._key(trace, point.columns(), pct), [])

    def pairs(self, one: Point, other: Point, pct: float, traces: Sequence[str]) -> Iterator[tuple[str, Row, Row]]:
        """Gives (trace, row of `one`, row of `other`) where both are there and not the same."""
        for trace in traces:
            a, b = self.get(trace, one, pct), self.get(trace, other, pct)
            if a is not None and b is not None and a is not b:
                yield trace, a, b


def settings(point: Point) -> Iterator[tuple[str, Point]]:
    """Gives the point under both precision readings, without prefetching and with the paper's."""
    for bits in ((4.0,), (8.0,)):
        for prefetch, base in (("no prefetch", Point()), ("prefetch", GATE)):
            yield f"{bits[0]:g} bit, {prefetch}", replace(base, eviction=point.eviction, bits=bits)


def drop_in(system: str, trace: str, results: Results) -> float:
    """Gives the TTFT that Least-Stale saves in a system, in % (where a trace has no prompt: TPOT); NaN without rows."""
    point = SYSTEMS[system]
    for _, before, after in results.pairs(point, replace(point, eviction="least_stale"), MIDDLE, [trace]):
        column = "ttft_s" if before["ttft_s"] is not None else "tpot_s"
        return cut_pct(number(before, column), number(after, column))
    return math.nan


def paper_drop_in(system: str, trace: str) -> float:
    """Gives the paper's saving on the model, or the mean over its models for a trace of another one."""
    cuts = {model: cut_pct(*times) for model, times in paper.TTFT_MS[system].items()}
    return cuts.get(trace, sum(cuts.values()) / len(cuts))


def best(results: Results, trace: str, base: Point, pct: float, column: str = "misses") -> tuple[str, ...] | None:
    """The best online evictions at a capacity, fewest first; None where they do not differ or are not all there."""
    rows = {name: results.get(trace, replace(base, eviction=name), pct) for name in ONLINE}
    found = {name: number(row, column) for name, row in rows.items() if row is not None}
    if len(found) < 2 or len(set(found.values())) == 1:
        return None
    least = min(found.values())
    return tuple(name for name, value in found.items() if value == least)


def run_bits(row: Row) -> float:
    """Gives the mean precision of all experts that ran: on the device, or on the host at the highest stored one."""
    host = number(row, "on_host")
    device = number(row, "demand") - number(row, "dropped") - host
    highest = float(str(row["bits"]).split(":")[0])
    return (number(row, "mean_bits") * device + highest * host) / max(1.0, device + host)


def mix_rows(results: Results, trace: str) -> dict[str, Row]:
    """Gives the rows of the mixes at 5 %; empty unless all are there as the paper has them."""
    rows = {name: results.get(trace, point, MIDDLE) for name, point in MIXES.items()}
    found = {name: row for name, row in rows.items() if row is not None}
    return found if len({id(row) for row in found.values()}) == len(MIXES) else {}
