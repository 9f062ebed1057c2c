"""A lower bound from prices: what a schedule pays at least, whatever it does, if slots and link time cost something.

The prices may be any that are not negative and charge a second of stall at most a second; `programs` finds good ones.
`stall` says which facts about a schedule the bound stands on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.bounds.kernels import Line, Pools
from specmd_jax.loops import compiled


class Prices(NamedTuple):
    """[V] each; ``link + wait + first`` is at most 1 at counted visits, and 0 at others."""

    link: npt.NDArray[np.float64]  # of a second of the link between this gate and the next
    wait: npt.NDArray[np.float64]  # of a second that demand copies take longer than what may run beside them
    first: npt.NDArray[np.float64]  # of a second by which one demand copy takes longer than what may run beside it
    slot_s: npt.NDArray[np.float64]  # seconds for a unit of the visit's pool that is taken at the visit's gate


class Facts(NamedTuple):
    """What the prices multiply: of each visit, [V]."""

    slack_s: npt.NDArray[np.float64]  # computation of its experts but the cheapest: what runs beside demand copies
    over: npt.NDArray[np.float64]  # share of a lone demand copy that is longer than that, 0 if none
    units: npt.NDArray[np.int64]  # what its pool holds at its gate at most and is used again


def facts(line: Line, pools: Pools) -> Facts:
    """Works out what is the same for all prices."""
    visits = line.layer.size
    demanded = np.diff(line.start)
    cheapest = np.zeros(visits)
    some = demanded > 0
    if line.flat.size:
        cheapest[some] = np.minimum.reduceat(line.compute_s, line.start[:-1][some])
    slack_s = np.maximum(line.work_s - line.dense_s - cheapest, 0.0)
    first = line.flat[np.minimum(line.start[:-1], max(line.flat.size - 1, 0))] if line.flat.size else None
    copy_s = np.zeros(visits) if first is None else np.where(some, pools.copy_s[first], 0.0)
    unit = np.zeros(visits, np.int64) if first is None else np.where(some, pools.units[first], 0)
    over = np.divide(np.maximum(copy_s - slack_s, 0.0), copy_s, out=np.zeros(visits), where=copy_s > 0)
    pool = line.layer if pools.budget.size > 1 else np.zeros_like(line.layer)
    largest = np.zeros(pools.budget.size, np.int64)
    np.maximum.at(largest, pools.of, pools.units)
    smallest = np.full(pools.budget.size, np.iinfo(np.int64).max)
    np.minimum.at(smallest, pools.of, pools.units)
    room = np.where(smallest == largest, pools.budget // largest * largest, pools.budget)  # whole experts
    demand = demanded * unit
    streams = demand > pools.budget[pool]
    units = room[pool].copy()
    latest = np.full(pools.budget.size, -1, np.int64)
    for v in range(visits):
        if line.reset[v]:
            latest[:] = -1
        u = latest[pool[v]]
        latest[pool[v]] = v
        if streams[v] and u >= 0 and not streams[u] and demand[u] + largest[pool[v]] > pools.budget[pool[v]]:
            units[v] += largest[pool[v]]
    return Facts(slack_s, over, units)


def bound_s(line: Line, pools: Pools, known: Facts, prices: Prices) -> float:
    """Gives the seconds of stall over counted visits that no schedule avoids, by these prices.

    Prices below 0 count as 0; where they charge more than a second for one, all of that visit are scaled down.
    """
    link, wait, first, slot_s = (np.maximum(np.nan_to_num(each), 0.0) for each in prices)
    charged = np.maximum(link + wait + first, 1.0)
    counted = line.counted / charged
    link, wait, first = link * counted, wait * counted, first * counted
    last_used = np.full(pools.of.size, -1, np.int64)
    demand_s = demands(line, pools, link, link + wait + known.over * first, slot_s, last_used)
    late = np.maximum(-np.diff(link, append=0.0), 0.0)  # a copy under way at a gate is paid for before it
    given_s = float(slot_s @ known.units + wait @ known.slack_s + link @ line.work_s)
    return float(demand_s) - given_s - float(pools.copy_s.max()) * float(late.sum())


@compiled
def demands(line, pools, link, demand, slot_s, last_used):
    """Gives what all demands cost at least: each is kept, copied ahead, or copied on demand, whichever is cheapest.

    Args: link, demand, slot_s [V]: prices of a second of a copy ahead, of a demand copy, and of a unit at a gate.
    last_used [N] int64: all -1; overwritten.
    """
    layered = pools.budget.size > 1
    total = 0.0
    since = 0  # nothing crosses a reset
    for b in range(line.layer.size):
        if line.reset[b]:
            since = b
        for a in range(line.start[b], line.start[b + 1]):
            f = line.flat[a]
            u = last_used[f]
            kept = u >= since
            copy_s, units = pools.copy_s[f], pools.units[f]
            least = copy_s * demand[b]
            held = units * slot_s[b]
            x, stop = b - 1, max(u, since)
            while x >= stop and held < least:
                if line.prefetches[x] and held + copy_s * link[x] < least:
                    least = held + copy_s * link[x]
                if x > stop and (not layered or line.layer[x] == line.layer[b]):
                    held += units * slot_s[x]
                x -= 1
            if kept and held < least:
                least = held
            total += least
            last_used[f] = b
    return total
