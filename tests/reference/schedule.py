"""A visit as its gate shows it (CONTRACT.md section 1), read from a schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Schedule


@dataclass
class Visit:
    """One visit as its gate shows it; the last fields are filled in once the visit is classified."""

    index: int
    layer: int
    pass_id: int
    clock: int
    tokens: int
    ends_layer: bool
    demand: list[int]  # expert ids by rank
    count: dict[int, int]  # tokens of each demanded expert
    mass: dict[int, np.float32]
    next_use: dict[int, int]
    logits: npt.NDArray[np.float32] | None  # [E] of the only token of a one-token pass
    every_logits: npt.NDArray[np.float32] | None  # [T, E] of the tokens that are routed here
    experts: int  # E
    hits: set[int] = field(default_factory=set)
    loaded: set[int] = field(default_factory=set)  # misses that are copied
    runs_at: dict[int, int] = field(default_factory=dict)  # level of hits and fetched misses

    @property
    def after_demand(self) -> int:
        """Touch of what arrives at this visit by prefetch."""
        return self.clock + len(self.demand)

    @property
    def by_mass(self) -> list[int]:
        return sorted(self.demand, key=lambda e: (-self.mass[e], e))

    def flat(self, expert: int) -> int:
        return self.layer * self.experts + expert


def read_visit(schedule: Schedule, v: int) -> Visit:
    ids = [int(e) for e in np.flatnonzero(schedule.count[v] > 0)]
    one_token = int(schedule.tokens[v]) == 1
    return Visit(
        index=v,
        layer=int(schedule.layer[v]),
        pass_id=int(schedule.pass_id[v]),
        clock=int(schedule.clock[v]),
        tokens=int(schedule.tokens[v]),
        ends_layer=bool(schedule.ends_layer[v]),
        demand=sorted(ids, key=lambda e: int(schedule.rank[v, e])),
        count={e: int(schedule.count[v, e]) for e in ids},
        mass={e: np.float32(schedule.mass[v, e]) for e in ids},
        next_use={e: int(schedule.next_use[v, e]) for e in ids},
        logits=schedule.logits[v, 0] if one_token and schedule.logits is not None else None,
        every_logits=None if schedule.logits is None else _rows(schedule.logits[v]),
        experts=schedule.experts,
    )


def _rows(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Leaves out the rows without a token."""
    return logits[~np.isnan(logits).any(axis=1)]
