"""Feasible schedules: rules that know the future, and a search that changes what a schedule keeps and copies ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.bounds import kernels
from specmd_jax.bounds.kernels import Line, Pools, Wishes
from specmd_jax.bounds.lines import line_of, pools_of, seconds_of
from specmd_jax.engines.prepared import Prepared
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.types import NEVER

TRIES = 6_000
"""Schedules that `Schedules.search` tries."""


class Variant(NamedTuple):
    """A rule: whenever the link is free, copy the missing expert that is needed next, and evict what is needed last."""

    look: float  # passes that it looks ahead
    margin: float = 0.0  # passes by which what a copy ahead pushes out must be needed later than what is copied
    bypass: bool = True  # the demand may leave at its own visit


class Schedule(NamedTuple):
    """What a rule makes of a trace, and what it was to keep and to copy ahead."""

    stall_s: float
    copies: int
    variant: Variant
    wishes: Wishes


GREEDY = (
    *(Variant(look, bypass=bypass) for bypass in (False, True) for look in (1, 4)),
    *(Variant(look, margin) for look in (0.25, 0.5, 1, 4) for margin in (0, 1, 2, 4, 8) if margin or look < 1),
)
PLANNED = tuple(Variant(look, margin) for look in (0.25, 0.5, 1, 2, 4) for margin in (0, 1, 2, 4, 8))
SHARES = (0.1, 0.5, 0.9)
"""Of a plan's fractions, from which on an expert is kept."""


class Schedules:
    """Schedules of one trace, cache and machine."""

    def __init__(self, replays: Prepared, budget: Budget, hardware: Hardware) -> None:
        self.line: Line = line_of(replays, budget, hardware)
        self.pools: Pools = pools_of(replays, budget, hardware)
        self.experts = replays.schedule.experts
        self.visits_a_pass = int(np.ceil(replays.schedule.visits / max(1, replays.schedule.starts_pass.sum())))
        self._upcoming = replays.first_use.astype(np.int64).reshape(-1)
        self._adds = float(seconds_of(replays, hardware)["adds"])

    def simulate(
        self,
        variant: Variant,
        wishes: Wishes,
        waits: npt.NDArray[np.float64] | None = None,
        script: npt.NDArray[np.int64] | None = None,
    ) -> tuple[float, int, int]:
        """Gives seconds of stall, copies and rows of the script; fills `waits` and `script`."""
        found = kernels.feasible(
            self.line,
            self.pools,
            self.experts,
            max(1, round(variant.look * self.visits_a_pass)),
            round(variant.margin * self.visits_a_pass),
            variant.bypass,
            self._adds,
            wishes,
            self._upcoming.copy(),
            np.zeros(self._upcoming.size, np.bool_),
            np.zeros(self.pools.budget.size, np.int64),
            np.zeros((3, self._upcoming.size), np.int64),
            np.zeros(0) if waits is None else waits,
            np.zeros((0, 2), np.int64) if script is None else script,
        )
        return float(found[0]), int(found[1]), int(found[2])

    def greedy(self, enough: Callable[[float], bool]) -> Schedule:
        """Gives the best that no plan is needed for, or the first that has `enough` (or little) stall."""
        wishes = Wishes(self.line.next_use < NEVER, np.ones(self.line.flat.size, np.bool_))
        return self._best(GREEDY, wishes, None, enough)

    def planned(self, kept: npt.NDArray[np.float64], before: Schedule, enough: Callable[[float], bool]) -> Schedule:
        """Gives the best of the schedule before and of those that keep what a plan keeps: shares [A]."""
        for share in SHARES:
            before = self._best(PLANNED, Wishes(kept >= share, before.wishes.early), before, enough)
        return before

    def _best(
        self, variants: tuple[Variant, ...], wishes: Wishes, best: Schedule | None, enough: Callable[[float], bool]
    ) -> Schedule:
        """Equal ones: the first."""
        for variant in variants:
            if best is not None and enough(best.stall_s):
                break
            stall_s, copies, _ = self.simulate(variant, wishes)
            if best is None or stall_s < best.stall_s:
                best = Schedule(stall_s, copies, variant, wishes)
        assert best is not None
        return best

    def search(self, best: Schedule, enough: Callable[[float], bool], tries: int = TRIES) -> Schedule:
        """Changes the wishes about a few demands near a visit that waits, and goes on from what stalls no more.

        The draws are those of numpy's PCG64(0): the same trace gives the same schedule.
        """
        draw, count = np.random.default_rng(0), self.line.flat.size
        waits, tried = np.zeros(self.line.layer.size), np.zeros(self.line.layer.size)
        self.simulate(best.variant, best.wishes, waits)
        for _ in range(tries):
            if enough(best.stall_s):
                break
            visit = int(np.searchsorted(np.cumsum(waits), draw.random() * waits.sum(), side="right"))
            low = max(0, visit - round(draw.choice((0.1, 1, 2)) * self.visits_a_pass))
            near = self.line.start[low], self.line.start[min(visit + 1, waits.size)]
            some = draw.integers(*near, int(draw.choice((1, 1, 2, 4)))) if near[0] < near[1] else np.zeros(0, np.int64)
            stay, early = best.wishes.stay.copy(), best.wishes.early.copy()
            changed = early if draw.random() < 0.3 else stay
            changed[np.minimum(some, count - 1)] ^= True
            stall_s, copies, _ = self.simulate(best.variant, Wishes(stay, early), tried)
            if stall_s <= best.stall_s:
                best, waits, tried = Schedule(stall_s, copies, best.variant, Wishes(stay, early)), tried, waits
                tried[:] = 0.0
        return best

    def moves(self, schedule: Schedule) -> npt.NDArray[np.int64]:
        """Gives what a schedule does: rows (visit, flat id of a copy ahead, or -1 - that of one that leaves), in order.

        One that leaves and is copied in the same visit stays without a copy.
        """
        script = np.zeros((2 * schedule.copies + 2 * self.line.flat.size, 2), np.int64)
        return script[: self.simulate(schedule.variant, schedule.wishes, None, script)[2]]
