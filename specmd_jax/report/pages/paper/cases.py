"""The cases that rows of `experiments.paper` make of a claim: what the paper says of a value, and the value found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper.points import MISS_RULES, MIXES, PREDICTORS, SYSTEMS, Point
from specmd_jax.report.pages.paper.results import (
    GATE,
    MIDDLE,
    SMALL,
    Results,
    best,
    drop_in,
    mix_rows,
    paper_drop_in,
    run_bits,
    settings,
)
from specmd_jax.report.rows import number
from specmd_jax.report.verdicts import Case, cut_pct, held, kendall, ratio

Cases = Callable[[Results, Sequence[str]], list[Case]]
"""(results, names of traces) -> the cases that those traces make."""

SCORED = PREDICTORS["gate, percentile 80"]


def compared(
    eviction: str,
    column: str,
    compare: Callable[[float, float], float],
    found: paper.Range,
    none: float | None,
    pct: float,
    with_: str = "least_stale",
) -> Cases:
    """Gives cases that compare a column of `eviction` with that of Least-Stale, in every setting."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        both = zip(settings(Point(eviction)), settings(Point(with_)), strict=True)
        return [
            Case(f"{trace}, {label}", compare(number(a, column), number(b, column)), found.low, found.high, none)
            for (label, one), (_, other) in both
            for trace, a, b in results.pairs(one, other, pct, traces)
        ]

    return cases


def most(cases: Cases) -> Cases:
    """ "Up to": the single largest case."""

    def largest(results: Results, traces: Sequence[str]) -> list[Case]:
        found = [case for case in cases(results, traces) if not math.isnan(case.value)]
        return [max(found, key=lambda case: case.value)] if found else []

    return largest


def level(eviction: str, column: str, found: paper.Range, *, miss: bool = False) -> Cases:
    """Gives cases of one column in % at 5 %; `miss`: of what it lacks to 100."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        rows = [
            (f"{trace}, {label}", results.get(trace, point, MIDDLE))
            for label, point in settings(Point(eviction))
            for trace in traces
        ]
        values = [(label, 100 * number(row, column)) for label, row in rows if row is not None]
        return [Case(label, 100 - value if miss else value, *found, None) for label, value in values]

    return cases


def read_as(point: Point, found: paper.Range) -> Cases:
    """Gives the misses of one mix at 5 %, in % of demand."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        rows = [(trace, results.get(trace, point, MIDDLE)) for trace in traces]
        return [
            Case(trace, 100 - 100 * number(row, "hit_rate"), *found, None) for trace, row in rows if row is not None
        ]

    return cases


def dropped_in(systems: Sequence[str]) -> Cases:
    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        return [
            Case(
                f"{system}, {trace}",
                drop_in(system, trace, results),
                paper_drop_in(system, trace),
                paper_drop_in(system, trace),
                0.0,
            )
            for system in systems
            for trace in traces
        ]

    return cases


def mean_drop_in(results: Results, traces: Sequence[str]) -> list[Case]:
    found = [drop_in(system, trace, results) for system in SYSTEMS for trace in traces]
    found = [value for value in found if not math.isnan(value)]
    target = paper.MEAN_TTFT_CUT_PCT
    return [Case("mean", sum(found) / len(found), target, target, 0.0)] if found else []


def scored_against_topk(column: str, sign: int) -> Cases:
    """Whether score-based prefetch is higher (sign 1) or lower (-1) than top-k, except on Mixtral."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        found = []
        for pct in (SMALL, MIDDLE):
            for one, other in ((GATE, SCORED), (replace(GATE, bits=(8.0,)), replace(SCORED, bits=(8.0,)))):
                for trace, a, b in results.pairs(one, other, pct, traces):
                    if not trace.startswith("Mixtral"):
                        label = f"{trace}, {pct:g} %, {a['bits']} bit"
                        found.append(held(label, sign * (number(b, column) - number(a, column)) > 0))
        return found

    return cases


def small_differs(results: Results, traces: Sequence[str]) -> list[Case]:
    cases = []
    for trace in traces:
        for label, base in settings(Point()):
            small, *larger = (best(results, trace, base, pct) for pct in paper.CAPACITIES_PCT)
            others = [set(names) for names in larger if names is not None]
            if small is not None and others:
                cases.append(held(f"{trace}, {label}", all(not set(small) & names for names in others)))
    return cases


def on_frontier(results: Results, traces: Sequence[str]) -> list[Case]:
    """Whether no other rule of the paper is as fast and precise with as little gate mass lost, and better in one."""

    def measure(row: Row) -> tuple[float, float, float]:
        return number(row, "tpot_s"), -run_bits(row), number(row, "lost_mass")

    cases = []
    for trace in traces:
        for pct in (SMALL, MIDDLE):
            rows = {
                rule: results.get(trace, Point(miss=rule, bits=(4.0, 8.0)), pct) for rule in MISS_RULES if rule != "cpu"
            }
            found = {rule: measure(row) for rule, row in rows.items() if row is not None}
            if len(found) == len(rows):
                mine = found["fetch_priority"]
                beaten = any(all(a <= b for a, b in zip(it, mine, strict=True)) and it != mine for it in found.values())
                cases.append(held(f"{trace}, {pct:g} %", not beaten))
    return cases


def cache_aware(column: str) -> Cases:
    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        found = paper.CACHE_AWARE_SPEED_UP_PCT
        return [
            Case(trace, 100 * (ratio(number(a, column), number(b, column)) - 1), *found, 0.0)
            for trace, a, b in results.pairs(Point(), SYSTEMS["MixtureCache"], MIDDLE, traces)
            if a[column] is not None
        ]

    return cases


def mix_order(column: str, position: int) -> Cases:
    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        found = []
        for trace in traces:
            rows = mix_rows(results, trace)
            if rows and trace in paper.MODELS:
                theirs = [paper.MIX_TTFT_MS_AND_TOKENS_PER_S[name][trace][position] for name in MIXES]
                ours = [number(rows[name], column) for name in MIXES]
                found.append(Case(trace, kendall(theirs, ours), 1.0, 1.0, 0.0))
        return found

    return cases


def mix_change(results: Results, traces: Sequence[str]) -> list[Case]:
    found = []
    for trace in traces:
        rows = mix_rows(results, trace)
        for name in MIXES if rows and trace in paper.MODELS else ():
            if name != "#1":
                table = paper.MIX_TTFT_MS_AND_TOKENS_PER_S
                theirs = -cut_pct(table["#1"][trace][0], table[name][trace][0])
                ours = -cut_pct(number(rows["#1"], "ttft_s"), number(rows[name], "ttft_s"))
                found.append(Case(f"{name}, {trace}", ours, theirs, theirs, 0.0))
    return found


def nothing(results: Results, traces: Sequence[str]) -> list[Case]:
    """No case: a simulator cannot test it."""
    del results, traces
    return []
