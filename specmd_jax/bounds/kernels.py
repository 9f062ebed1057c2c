"""The compiled loops of `bounds`. `bounds` says what they compute and why it is right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.loops import compiled

LATER = 2**31  # added to the next use of what need not be kept until then


class Line(NamedTuple):
    """A schedule with its times: visit v demands the entries ``start[v]:start[v + 1]`` of all A, in copy order."""

    start: npt.NDArray[np.int64]  # [V + 1]
    flat: npt.NDArray[np.int64]  # [A] flat ids
    next_use: npt.NDArray[np.int64]  # [A]
    compute_s: npt.NDArray[np.float64]  # [A]
    layer: npt.NDArray[np.int64]  # [V]
    dense_s: npt.NDArray[np.float64]  # [V]
    work_s: npt.NDArray[np.float64]  # [V] compute of the demand and the dense part
    reset: npt.NDArray[np.bool_]  # [V]
    counted: npt.NDArray[np.bool_]  # [V]
    prefetches: npt.NDArray[np.bool_]  # [V] copies ahead may start at this visit


class Pools(NamedTuple):
    """Who shares which budget."""

    of: npt.NDArray[np.int64]  # [N] pool of each flat id
    budget: npt.NDArray[np.int64]  # [pools] units
    units: npt.NDArray[np.int64]  # [N] what each expert takes
    copy_s: npt.NDArray[np.float64]  # [N]


class Wishes(NamedTuple):
    """What a schedule is to do about each demanded expert, where there is a choice."""

    stay: npt.NDArray[np.bool_]  # [A] keep it until its next use; what need not stay leaves first
    early: npt.NDArray[np.bool_]  # [A] it may be copied ahead


@compiled
def _furthest(resident, upcoming, pool, lo, hi, of, free):
    """Gives the resident of a pool (flat ids lo..hi) whose next use is furthest, `free` at least; -1: none."""
    best, where = free, -1
    for f in range(lo, hi):
        if resident[f] and of[f] == pool and upcoming[f] > best:
            best, where = upcoming[f], f
    return where


@compiled
def lower(line, pools, slots, experts, begins, reaches, upcoming, resident, held, later, best):
    """Fills `best` [V + 1]: what the stall of the first v visits is at least.

    Args: slots [pools] experts a pool can hold. begins, reaches [S]: first visits of windows, rising, and their longest
    length. upcoming [N] int64: first visit that demands each expert. resident [N] bool, held [pools], later [N] int64:
    scratch.
    """
    visits, count = line.layer.size, upcoming.size
    layered = slots.size > 1
    passed = 0
    known = 0  # best is final up to here
    for s in range(begins.size):
        begin, stop = begins[s], min(line.layer.size, begins[s] + reaches[s])
        while passed < begin:  # next uses as seen from the window's first visit
            for a in range(line.start[passed], line.start[passed + 1]):
                upcoming[line.flat[a]] = line.next_use[a]
            passed += 1
        while known < begin:
            best[known + 1] = max(best[known + 1], best[known])
            known += 1
        # the best contents to begin with: of each pool, what is needed soonest; nothing at the very beginning
        held[:] = 0
        resident[:] = False
        if begin > 0 and not line.reset[begin]:
            for a in range(line.start[begin], line.start[stop]):
                f = line.flat[a]
                if not resident[f] and held[pools.of[f]] < slots[pools.of[f]]:
                    resident[f] = True
                    held[pools.of[f]] += 1
        for f in range(count):
            later[f] = upcoming[f]
        link_s, work_s, least_s = 0.0, 0.0, np.inf
        for v in range(begin, stop):
            if not line.counted[v]:
                break
            if line.reset[v]:
                held[:] = 0
                resident[:] = False
            pool = line.layer[v] if layered else 0
            for a in range(line.start[v], line.start[v + 1]):
                f = line.flat[a]
                least_s = min(least_s, line.compute_s[a])
                if not resident[f]:
                    resident[f] = True
                    held[pool] += 1
                    link_s += pools.copy_s[f]
                later[f] = line.next_use[a]
            lo, hi = (pool * experts, (pool + 1) * experts) if layered else (0, count)
            while held[pool] > slots[pool]:
                f = _furthest(resident, later, pool, lo, hi, pools.of, -1)
                resident[f] = False
                held[pool] -= 1
            work_s += line.work_s[v]
            if link_s > 0.0:
                stall_s = link_s + least_s - (work_s - line.dense_s[v])
                best[v + 1] = max(best[v + 1], best[begin] + stall_s)
    while known < visits:
        best[known + 1] = max(best[known + 1], best[known])
        known += 1


@compiled
def feasible(
    line, pools, experts, ahead, margin, bypass, adds, wishes, upcoming, resident, held, scratch, waits, script
):
    """Gives the seconds of stall (counted visits), copies and length of the script of one schedule.

    Args: ahead: visits that prefetching looks into the future. margin: a copy ahead may only push out what is needed
    more than so many visits later. bypass: the demand may leave at its own visit. adds: 0 if residents run while others
    arrive, 1 if all wait. upcoming [N] int64: first visit that demands each expert. resident [N] bool, held [pools],
    scratch [3, N] int64: overwritten. waits [V] or [0]: takes the stall of each counted visit. script [.., 2] int64:
    takes, as far as it has room, (visit, flat id of a copy ahead, or -1 - flat id of one that leaves), in order.
    """
    visits, count = line.layer.size, upcoming.size
    layered = pools.budget.size > 1
    key, pinned, left = scratch[0], scratch[1], scratch[2]  # who leaves first; who may not; visit at which one left
    resident[:] = False
    held[:] = 0
    pinned[:] = -1
    left[:] = -1
    link_s, flying = 0.0, -1  # of the gate: when the link is free, whose copy ends then
    stall_s, copies, lines = 0.0, 0, 0
    first = 0  # no visit between the present one and this one misses an expert
    for v in range(visits):
        begin, end = line.start[v], line.start[v + 1]
        if line.reset[v]:
            resident[:] = False
            held[:] = 0
            flying = -1
            first = v + 1
        # demand: hits on time, then the late one, then the copies, each as it arrives
        done_s, ready_s = 0.0, link_s
        last_s, all_s = 0.0, 0.0
        for a in range(begin, end):
            f = line.flat[a]
            all_s += line.compute_s[a]
            if resident[f] and f != flying:
                done_s += line.compute_s[a]
        for a in range(begin, end):
            f = line.flat[a]
            if resident[f] and f == flying:
                done_s = max(done_s, link_s) + line.compute_s[a]
                last_s = link_s
        for a in range(begin, end):
            f = line.flat[a]
            upcoming[f] = line.next_use[a]
            key[f] = upcoming[f] if wishes.stay[a] else upcoming[f] + LATER
            if not resident[f]:
                ready_s += pools.copy_s[f]
                last_s = ready_s
                done_s = max(done_s, ready_s) + line.compute_s[a]
                resident[f] = True
                held[pools.of[f]] += pools.units[f]
                copies += 1
        done_s += adds * (last_s + all_s - done_s)
        gate_s = done_s + line.dense_s[v]
        if line.counted[v]:
            stall_s += gate_s - line.work_s[v]
            if v < waits.size:
                waits[v] = gate_s - line.work_s[v]
        # down to the budget
        pool = line.layer[v] if layered else 0
        demand = 0
        for a in range(begin, end):
            demand += pools.units[line.flat[a]]
        streams = demand > pools.budget[pool]
        if not streams:
            if flying >= 0:
                pinned[flying] = v
            if not bypass:
                for a in range(begin, end):
                    pinned[line.flat[a]] = v
        lo, hi = (pool * experts, (pool + 1) * experts) if layered else (0, count)
        while held[pool] > pools.budget[pool]:
            best, where = -1, -1
            for f in range(lo, hi):
                if resident[f] and pinned[f] != v and key[f] > best:
                    best, where = key[f], f
            if where < 0:
                break
            resident[where] = False
            left[where] = v
            held[pool] -= pools.units[where]
            first = min(first, upcoming[where])
            if lines < script.shape[0]:
                script[lines, 0], script[lines, 1] = v, -1 - where
                lines += 1
        # prefetch: the next missing expert, while something that is needed later can make room
        at_s, flies = max(ready_s, 0.0), -1
        if line.prefetches[v] and at_s < gate_s:
            u, seen = max(first, v + 1), False
            last = min(visits, v + 1 + ahead)
            while u < last and at_s < gate_s:
                if line.reset[u]:
                    break
                blocked = False
                for a in range(line.start[u], line.start[u + 1]):
                    f = line.flat[a]
                    if not wishes.early[a]:
                        continue
                    if resident[f] or at_s >= gate_s:
                        blocked = blocked or not resident[f]
                        continue
                    target = pools.of[f]
                    lo, hi = (target * experts, (target + 1) * experts) if layered else (0, count)
                    while held[target] + pools.units[f] > pools.budget[target]:
                        best, where = u + margin, -1
                        for g in range(lo, hi):
                            if resident[g] and pinned[g] != v and upcoming[g] > u and key[g] > best:
                                best, where = key[g], g
                        if where < 0:
                            break
                        resident[where] = False
                        left[where] = v
                        held[target] -= pools.units[where]
                        if lines < script.shape[0]:
                            script[lines, 0], script[lines, 1] = v, -1 - where
                            lines += 1
                    if held[target] + pools.units[f] > pools.budget[target]:
                        blocked = True
                        continue
                    resident[f] = True
                    held[target] += pools.units[f]
                    key[f] = u
                    if lines < script.shape[0]:
                        script[lines, 0], script[lines, 1] = v, f
                        lines += 1
                    if left[f] == v:
                        continue  # it was there until now, and stays without a copy
                    pinned[f] = v
                    at_s += pools.copy_s[f]
                    flies = f
                    copies += 1
                if not seen and blocked:
                    first, seen = u, True
                if blocked and not layered:
                    break
                u += 1
            if not seen:
                first = u
            ready_s = at_s
        if flies < 0:
            flies = flying
        link_s = max(ready_s - gate_s, 0.0)
        flying = flies if link_s > 0.0 else -1
    return stall_s, copies, lines
