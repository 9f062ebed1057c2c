"""Good prices for `prices`, and which experts to keep for `kernels.feasible`: linear programs over stretches of passes.

Each demand of a stretch is a choice between being kept since the last use, copied ahead at one of some visits, and
copied on demand, in fractions. What a pool holds at a gate is bounded, and so are the seconds of the link, as in
`stall`. The dual values are the prices, the fractions kept are a plan. Nothing depends on how exact they are: the bound
is worked out from the prices for the whole trace, and the plan is replayed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from specmd_jax.bounds.kernels import Line, Pools
from specmd_jax.bounds.prices import Facts, Prices

AHEAD = (1, 2, 3, 5, 9, 17, 33, 65, 129)
"""Gates of its pool that a copy ahead is held over. One that is held over fewer than the next number may start at any
visit at which that could be, and pays for this number."""

Terms = list[tuple[int, float]]  # columns and their factors


class Plan(NamedTuple):
    """What the linear programs find."""

    prices: Prices
    kept: npt.NDArray[np.float64]  # [A] share of each demanded expert that stays until its next use


class _Rows:
    """A sparse matrix that is written row by row, and what its rows are at most."""

    def __init__(self) -> None:
        self.terms: list[Terms] = []
        self.bound: list[float] = []

    def add(self, terms: Terms, bound: float) -> int:
        self.terms.append(terms)
        self.bound.append(bound)
        return len(self.bound) - 1

    def matrix(self, width: int) -> csr_matrix:
        starts = np.cumsum([0, *map(len, self.terms)])
        columns = np.array([column for row in self.terms for column, _ in row], np.int64)
        values = np.array([value for row in self.terms for _, value in row], np.float64)
        return csr_matrix((values, columns, starts), shape=(len(self.terms), width))


def plan(line: Line, pools: Pools, known: Facts, stretches: list[tuple[int, int]], context: int) -> Plan:
    """Solves a program for each stretch (first visit, behind the last), seen with `context` visits on either side."""
    visits = line.layer.size
    prices = Prices(*(np.zeros(visits) for _ in Prices._fields))
    kept = np.zeros(line.flat.size)
    resets = np.flatnonzero(line.reset)
    for begin, end in stretches:
        low = max([begin - context, 0, *resets[resets <= begin]])
        high = min([end + context, visits, *resets[resets >= end]])
        found, stays = _program(line, pools, known, int(low), int(high))
        for whole, part in zip(prices, found, strict=True):
            whole[begin:end] = part[begin - low : end - low]
        a, b = line.start[begin], line.start[end]
        kept[a:b] = stays[a - line.start[low] : b - line.start[low]]
    return Plan(prices, kept)


class _Choices:
    """The columns of a program: some of each visit, then one of each way to serve a demand; visits count from `low`.

    Times are in copies of the largest expert, room in its units.
    """

    def __init__(self, line: Line, pools: Pools, known: Facts, low: int, high: int) -> None:
        self.line, self.pools, self.known, self.low, self.high = line, pools, known, low, high
        self.count = count = high - low
        self.copy_s, self.units = float(pools.copy_s.max()), float(pools.units.max())
        # stall; what is left of the copy in flight; what the pool holds; copies ahead that start in the visit, that
        # have started before it and are not due, that may have started by its end and have not
        self.stall, self.left, self.holds, self.starts, self.early, self.open, self.width = (
            i * count + (i > 1) for i in range(7)
        )
        self.own: list[list[int]] = [[] for _ in range(count)]  # visits of the same pool
        self.place = [0] * count  # of the visit among them
        gates: dict[int, list[int]] = {}
        for v in range(count):
            self.own[v] = gates.setdefault(int(line.layer[low + v]) if pools.budget.size > 1 else 0, [])
            self.place[v] = len(self.own[v])
            self.own[v].append(v)
        self.enters: list[Terms] = [[] for _ in range(count)]  # what is held over this gate and not over the one before
        self.leaves: list[Terms] = [[] for _ in range(count)]  # what is not held behind this gate
        self.spared: list[Terms] = [[] for _ in range(count)]  # copies that are not started on demand
        self.due: list[Terms] = [[] for _ in range(count)]  # copies ahead that must have started before this visit
        self.opens: list[Terms] = [
            [] for _ in range(count)
        ]  # copies ahead that may start in this visit at the earliest
        self.asked_s = np.zeros(count)
        self.keeps: list[tuple[int, int]] = []  # column, entry that stays
        self.ways: list[list[int]] = []  # columns of each demand
        self._serve()

    def _serve(self) -> None:
        """Adds the ways to serve each demand."""
        empty = self.low == 0 or bool(self.line.reset[self.low])  # else the pools may begin with anything
        used: dict[int, tuple[int, int]] = {}
        for v in range(self.count):
            own, i = self.own[v], self.place[v]
            for a in range(self.line.start[self.low + v], self.line.start[self.low + v + 1]):
                f = int(self.line.flat[a])
                copy_s, units = float(self.pools.copy_s[f]) / self.copy_s, float(self.pools.units[f]) / self.units
                u, entry = used.get(f, (-1, -1))
                used[f] = (v, a)
                self.asked_s[v] += copy_s
                first: list[int] = []  # gates that the columns of this demand are held from
                if u >= 0 or not empty:
                    first.append(own[self.place[u] + 1] if u >= 0 else own[0])
                    if entry >= 0:
                        self.keeps.append((self.width, entry))
                for over, more in zip(AHEAD, (*AHEAD[1:], self.count + 1), strict=True):
                    if v == 0 or i - over + 1 < 0 or own[i - over + 1] <= u:
                        break
                    earliest = own[i - more + 1] if i - more + 1 >= 0 else 0
                    self.due[v].append((self.width + len(first), copy_s))
                    self.opens[max(earliest, u, 0)].append((self.width + len(first), copy_s))
                    first.append(own[i - over + 1])
                for column, gate in enumerate(first, self.width):
                    self.enters[gate].append((column, units))
                    self.leaves[v].append((column, units))
                    self.spared[v].append((column, copy_s))
                if first:
                    self.ways.append(list(range(self.width, self.width + len(first))))
                self.width += len(first)


def _program(line: Line, pools: Pools, known: Facts, low: int, high: int) -> tuple[Prices, npt.NDArray[np.float64]]:
    """Prices [high - low] and kept shares [entries] of the visits low..high-1."""
    c = _Choices(line, pools, known, low, high)
    count, here = c.count, slice(low, high)
    equal, most = _Rows(), _Rows()
    wait, first, link = ([-1] * count for _ in range(3))  # the rows with these prices
    slack_s, work_s = known.slack_s[here] / c.copy_s, line.work_s[here] / c.copy_s
    for columns in c.ways:
        most.add([(column, 1.0) for column in columns], 1.0)
    for v in range(count):
        held, early, may = [(c.holds + v, 1.0)], [(c.early + v, 1.0)], [(c.open + v, 1.0), (c.starts + v, 1.0)]
        if c.place[v]:
            u = c.own[v][c.place[v] - 1]
            held += [(c.holds + u, -1.0), *c.leaves[u]]
        if v:
            early += [(c.early + v - 1, -1.0), (c.starts + v - 1, -1.0)]
            may += [(c.open + v - 1, -1.0)]
        equal.add([*held, *_times(c.enters[v], -1.0)], 0.0)
        equal.add([*early, *c.due[v]], 0.0)
        equal.add([*may, *_times(c.opens[v], -1.0)], 0.0)
        over, stalls = float(known.over[low + v]), (c.stall + v, -1.0)
        if c.spared[v]:
            wait[v] = most.add([stalls, *_times(c.spared[v], -1.0)], slack_s[v] - c.asked_s[v])
            if over:
                first[v] = most.add([stalls, *_times(c.spared[v], -over)], -over * c.asked_s[v])
        elif c.asked_s[v]:
            wait[v] = most.add([stalls], slack_s[v] - c.asked_s[v])
        flow = [(c.left + v, 1.0), (c.left + v + 1, -1.0), (c.starts + v, 1.0), stalls]
        link[v] = most.add([*flow, *_times(c.spared[v], -1.0)], work_s[v] - c.asked_s[v])
    costs, upper = np.zeros(c.width), np.full(c.width, np.inf)
    costs[c.stall : c.stall + count] = line.counted[here]
    upper[c.left : c.left + count + 1] = 1.0
    if low == 0:
        upper[c.left] = 0.0
    upper[c.starts : c.starts + count] = np.where(line.prefetches[here], np.inf, 0.0)
    upper[c.holds : c.holds + count] = known.units[here] / c.units
    found = linprog(
        costs,
        *(most.matrix(c.width), most.bound),
        *(equal.matrix(c.width), equal.bound),
        bounds=np.stack([np.zeros(c.width), upper], axis=1),
        method="highs-ipm",
    )
    if found.x is None:
        raise RuntimeError(f"the linear program of visits {low}..{high - 1} was not solved: {found.message}")
    dual = -np.append(found.ineqlin.marginals, 0.0)  # the last one is that of rows which do not exist
    kept = np.zeros(line.start[high] - line.start[low])
    for column, entry in c.keeps:
        kept[entry - line.start[low]] = found.x[column]
    slot_s = -found.upper.marginals[c.holds : c.holds + count] * c.copy_s / c.units
    return Prices(dual[link], dual[wait], dual[first], slot_s), kept


def _times(terms: Terms, factor: float) -> Terms:
    return [(column, factor * value) for column, value in terms]
