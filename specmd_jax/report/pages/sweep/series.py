"""Rows of a sweep -> what tables and figures show: settings, and one curve per policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row, Scalar
from specmd_jax.report.rows import Floats, number, values

LOWER_BOUNDS = ("belady", "belady_bypass")
"""Oracles: they see the future and bound what a policy can reach (`belady` always admits, `belady_bypass` need not)."""


class Setting(NamedTuple):
    """Everything but policy, capacity and hardware: rows of one setting belong in one picture."""

    model: str
    scope: str
    contract: str
    phase: str
    batch: int
    miss: str
    tokens: int
    drafts: int
    acceptance: float | None
    evidence: str

    @property
    def title(self) -> str:
        """One line: what was replayed and how."""
        batch = f", batch {self.batch}" if self.batch != 1 else ""
        phase = f", {self.phase} only" if self.phase != "all" else ""
        miss = f", misses {self.miss}" if self.miss != "fetch" else ""
        return (
            f"{self.model}, {self.tokens:,} tokens, scope {self.scope}, contract {self.contract}{batch}{phase}{miss}"
            f"{self._drafts}, {self.evidence}"
        )

    @property
    def _drafts(self) -> str:
        if not self.drafts:
            return ""
        how = "as recorded" if self.acceptance is None else f"at {self.acceptance:g}"
        return f", {self.drafts} draft{'s' * (self.drafts > 1)} accepted {how}"

    @property
    def slug(self) -> str:
        """A piece of a file name."""
        parts = [
            self.model,
            self.scope,
            self.contract,
            self.phase,
            f"batch{self.batch}",
            self.miss,
            f"{self.tokens}tokens",
        ]
        if self.drafts:
            parts.append(f"drafts{self.drafts}at{'recorded' if self.acceptance is None else f'{self.acceptance:g}'}")
        return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts)


_BEFORE: Row = {"drafts": 0, "acceptance": None}  # what a table has that was written before tokens were drafted


def settings(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """Gives rows by setting, in the order they come in."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(Setting(*((_BEFORE | row)[name] for name in Setting._fields)), []).append(row)  # pyright: ignore[reportArgumentType]
    return found


def one_setting(rows: Sequence[Row]) -> Setting:
    """Gives the setting of `rows`; `SpecmdError` if there are none or they mix several."""
    found = settings(rows)
    if len(found) != 1:
        raise SpecmdError(f"expected rows of one setting, got {len(found)}: {'; '.join(s.title for s in found)}")
    return next(iter(found))


def hardware_of(rows: Iterable[Row]) -> list[str]:
    """Gives the names of the hardware that the rows have times for, in order of appearance."""
    return list(dict.fromkeys(str(row["hardware"]) for row in rows if row["hardware"] is not None))


def curves(rows: Iterable[Row], hardware: Scalar = None) -> dict[str, list[Row]]:
    """Gives the rows of each policy by rising capacity, one per capacity.

    With several kinds of hardware the rows of `hardware` are taken, or those of the first kind a policy has: without
    prefetching, what is resident does not depend on it.
    """
    found: dict[str, dict[Scalar, Row]] = {}
    for row in rows:
        if hardware is None or row["hardware"] == hardware:
            found.setdefault(str(row["eviction"]), {}).setdefault(row["capacity_bytes"], row)
    return {
        name: sorted(cells.values(), key=lambda row: number(row, "capacity_bytes")) for name, cells in found.items()
    }


def per_1000(rows: Sequence[Row], name: str) -> Floats:
    """Gives a count [n] per 1000 demanded experts."""
    demand = values(rows, "demand")
    return 1000 * np.divide(values(rows, name), demand, out=np.zeros_like(demand), where=demand > 0)


def mean_hit_rate(rows: Sequence[Row]) -> float:
    """Hit rate averaged over the span of capacities: what policies are ordered by where one number must do."""
    pct, rate = values(rows, "capacity_pct"), values(rows, "hit_rate")
    return float(np.trapezoid(rate, pct) / (pct[-1] - pct[0])) if len(rows) > 1 and pct[-1] > pct[0] else float(rate[0])


def one_cycle(rows: Iterable[Row]) -> float:
    """Capacity in % of all experts that holds one token cycle (C/T = 1)."""
    for row in rows:
        if number(row, "cycles") > 0:
            return number(row, "capacity_pct") / number(row, "cycles")
    raise SpecmdError("no row with a capacity above zero")


def near(rows: Sequence[Row], capacities_pct: Sequence[float]) -> list[float]:
    """Capacities (bytes) in `rows` nearest to each of `capacities_pct` and to one token cycle, rising, without repeats.

    A wish is left out if the table has nothing within 1 % of all experts of it.
    """
    pct = {number(row, "capacity_bytes"): number(row, "capacity_pct") for row in rows}
    found: set[float] = set()
    for wish in [*capacities_pct, one_cycle(rows)]:
        best = min(pct, key=lambda size: (abs(pct[size] - wish), size))
        if abs(pct[best] - wish) <= 1.0:
            found.add(best)
    return sorted(found) or sorted(pct)[:: max(1, len(pct) // 5)][:5]
