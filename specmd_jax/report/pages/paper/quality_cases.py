"""The cases that held-out text makes of the paper's claims on quality: rows of `experiments.quality`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper.results import MIDDLE, Results
from specmd_jax.report.pages.quality.front import at, beats, family, plain, safe, sizes
from specmd_jax.report.rows import number
from specmd_jax.report.verdicts import Case, held, ratio

MOVED = 0.01
"""Share of the gate mass from which substitution is said to have happened."""
SUBSTITUTE, DROP, PRIORITY, BY_CACHE = "substitute", "drop", "fetch_priority", "cache_aware"


def substituted(holds: Callable[[Row], bool]) -> Callable[[Results, Sequence[str]], list[Case]]:
    """Gives a case for each tolerance and cache size under which stand-ins took `MOVED` of the gate mass or more."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        return [
            held(label, holds(row))
            for label, row in _of(results, traces, SUBSTITUTE)
            if number(row, "moved_share") >= MOVED
        ]

    return cases


def unsafe(row: Row) -> bool:
    return not safe(row)


def dropped(kept: int, holds: Callable[[Row], bool]) -> Callable[[Results, Sequence[str]], list[Case]]:
    """Gives a case for each cache size at which experts beyond a token's ``kept`` best ones were dropped if missing."""

    def cases(results: Results, traces: Sequence[str]) -> list[Case]:
        return [
            held(label, holds(row))
            for label, row in _of(results, traces, DROP)
            if row["number"] == kept and number(row, "dropped_share") > 0
        ]

    return cases


def priority_on_front(results: Results, traces: Sequence[str]) -> list[Case]:
    """Whether no other miss rule or precision is as fast and as near in KL divergence, and better in one."""
    return [
        held(f"{trace}, {pct:g} %", not any(beats(other, row) for other in here if other["routing"] == "standard"))
        for trace, pct, here in _cells(results, traces)
        for row in here
        if family(row) == PRIORITY
    ]


def strength_in_range(results: Results, traces: Sequence[str]) -> list[Case]:
    """Whether the fastest safe strength is one of those that the paper recommends, where any saves time."""
    low, high = paper.CACHE_AWARE_STRENGTHS
    cases = []
    for trace, pct, here in _cells(results, traces):
        tried = [row for row in here if family(row) == BY_CACHE]
        best = min((row for row in tried if safe(row)), key=lambda row: number(row, "tpot_s"), default=None)
        bases = [(plain(here, str(row["precisions"])), row) for row in tried]
        if any(base is not None and number(row, "tpot_s") < number(base, "tpot_s") for base, row in bases):
            cases.append(held(f"{trace}, {pct:g} %", best is not None and low <= number(best, "number") <= high))
    return cases


def cache_aware_speed_up(results: Results, traces: Sequence[str]) -> list[Case]:
    """Gives the speed-up of decoding at 5 % under each strength that the paper recommends."""
    low, high = paper.CACHE_AWARE_STRENGTHS
    cases = []
    for trace, pct, here in _cells(results, traces):
        for row in here:
            base = plain(here, str(row["precisions"]))
            if pct == MIDDLE and family(row) == BY_CACHE and base and low <= number(row, "number") <= high:
                more = 100 * (ratio(number(base, "tpot_s"), number(row, "tpot_s")) - 1)
                cases.append(Case(f"{trace}, {row['rule']}", more, *paper.CACHE_AWARE_SPEED_UP_PCT, 0.0))
    return cases


def _cells(results: Results, traces: Sequence[str]) -> Iterator[tuple[str, float, list[Row]]]:
    """Gives the rows of each model and cache size."""
    for trace in traces:
        rows = [row for row in results.quality if row["model"] == trace]
        for pct in sizes(rows):
            yield trace, pct, at(rows, pct)


def _of(results: Results, traces: Sequence[str], name: str) -> Iterator[tuple[str, Row]]:
    for trace, pct, here in _cells(results, traces):
        for row in here:
            if family(row) == name:
                yield f"{trace}, {row['rule']}, {pct:g} %", row
