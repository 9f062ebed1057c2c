"""Statements about Least-Stale, and the cases that rows of `experiments.least_stale` make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specmd_jax.report.columns import Row
from specmd_jax.report.rows import number
from specmd_jax.report.verdicts import Case, held

TIE_PCT = 1.0
"""Within this much of LRU a policy ties with it."""


class Curves:
    """Rows by (trace, tokens, prefetch) and policy, by rising capacity."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.studies: dict[tuple[str, int, str], dict[str, list[Row]]] = {}
        for row in sorted(rows, key=lambda row: number(row, "capacity_bytes")):
            study = (str(row["trace"]), int(number(row, "tokens")), str(row["prefetch"]))
            self.studies.setdefault(study, {}).setdefault(str(row["eviction"]), []).append(row)

    @property
    def main(self) -> list[tuple[str, int, str]]:
        """The longest study of each trace without prefetch."""
        most = max(tokens for _, tokens, _ in self.studies)
        return [s for s in self.studies if s[1:] == (most, "none")]

    @property
    def prefetched(self) -> list[tuple[str, int, str]]:
        return [s for s in self.studies if s[2] != "none"]


def cost(row: Row) -> float:
    """Gives what a policy is judged by: its stall where there is prefetch (late copies count), else its misses."""
    return number(row, "misses") if row["stall_s"] is None else number(row, "stall_s")


def against_lru(lines: dict[str, list[Row]], policy: str) -> list[tuple[float, float]]:
    """Gives (C/T, change of the cost against LRU in %) at each capacity."""
    pairs = zip(lines["lru"], lines[policy], strict=True)
    return [
        (number(a, "cycles"), 0.0 if cost(a) == cost(b) else 100 * (cost(b) / cost(a) - 1) if cost(a) else math.inf)
        for a, b in pairs
    ]


def outcome(change_pct: float) -> str:
    return "wins" if change_pct <= -TIE_PCT else "loses" if change_pct >= TIE_PCT else "ties"


def spans(points: Sequence[tuple[float, float]]) -> str:
    """ "wins at C/T 0.25 to 0.85 (to -33 %), ties at 1" of what `against_lru` gives."""
    runs: list[tuple[str, list[tuple[float, float]]]] = []
    for point in points:
        what = outcome(point[1])
        if not runs or runs[-1][0] != what:
            runs.append((what, []))
        runs[-1][1].append(point)
    said = []
    for what, run in runs:
        first, last = run[0][0], run[-1][0]
        where = f"{first:.2f}" if first == last else f"{first:.2f} to {last:.2f}"
        largest = max((change for _, change in run), key=abs)
        said.append(f"{what} at C/T {where}" + ("" if what == "ties" else f" (up to {largest:+.0f} %)"))
    return ", ".join(said)


def findings(found: Curves) -> list[tuple[str, list[Case]]]:
    """Gives statements about Least-Stale and the cases (trace and capacity) that test each."""
    demand = {study: found.studies[study] for study in found.main}
    ahead = {study: found.studies[study] for study in found.prefetched}

    def each(studies: dict, policy: str, test, where=lambda cycles: True) -> list[Case]:
        return [
            held(f"{study[0]}, C/T {cycles:.2f}", test(change))
            for study, lines in studies.items()
            for cycles, change in against_lru(lines, policy)
            if where(cycles)
        ]

    def collisions(policy: str) -> list[Case]:
        return [
            held(f"{study[0]}, C/T {number(row, 'cycles'):.2f}", row["collisions"] == 0)
            for study, lines in demand.items()
            for row in lines[policy]
            if number(row, "cycles") >= 1
        ]

    def equal_to_lru() -> list[Case]:
        return [
            held(f"{study[0]}, C/T {number(a, 'cycles'):.2f}", a["misses"] == b["misses"])
            for study, lines in demand.items()
            for a, b in zip(lines["lru"], lines["least_stale_recency"], strict=True)
        ]

    def gains_more() -> list[Case]:
        cases = []
        for study, lines in ahead.items():
            without = found.studies[study[0], study[1], "none"]
            pairs = zip(against_lru(lines, "least_stale"), against_lru(without, "least_stale"), strict=True)
            cases += [held(f"{study[0]}, C/T {c:.2f}", change <= base) for (c, change), (_, base) in pairs]
        return cases

    return [
        (
            "Without prefetch, the cyclic reading beats LRU below one token cycle",
            each(demand, "least_stale", lambda x: outcome(x) == "wins", lambda c: c < 0.999),
        ),
        (
            "Without prefetch, the left-first reading does so too",
            each(demand, "least_stale_left_first", lambda x: outcome(x) == "wins", lambda c: c < 0.999),
        ),
        (
            "Without prefetch, the literal reading does so too",
            each(demand, "least_stale_literal", lambda x: outcome(x) == "wins", lambda c: c < 0.999),
        ),
        ("Without prefetch, the recency reading misses exactly what LRU misses", equal_to_lru()),
        (
            "Without prefetch, the cyclic reading never loses to LRU",
            each(demand, "least_stale", lambda x: outcome(x) != "loses"),
        ),
        ("The cyclic reading has no collisions from one token cycle on", collisions("least_stale")),
        ("The literal reading has no collisions from one token cycle on", collisions("least_stale_literal")),
        (
            "Without prefetch, the literal reading nevertheless loses to LRU from two token cycles on",
            each(demand, "least_stale_literal", lambda x: outcome(x) == "loses", lambda c: c >= 1.999),
        ),
        (
            "Without prefetch, the left-first reading loses to LRU from two token cycles on",
            each(demand, "least_stale_left_first", lambda x: outcome(x) == "loses", lambda c: c >= 1.999),
        ),
        (
            "With prefetch, the cyclic reading stalls less than LRU up to two token cycles",
            each(ahead, "least_stale", lambda x: outcome(x) == "wins", lambda c: c <= 2.001),
        ),
        (
            "With prefetch, the cyclic reading never loses to LRU",
            each(ahead, "least_stale", lambda x: outcome(x) != "loses"),
        ),
        ("The cyclic reading gains at least as much on LRU with prefetch (stall) as without (misses)", gains_more()),
    ]
