"""How little a replay can stall, from below and from above.

The model is that of CONTRACT.md: one link, one copy at a time, a pool keeps at most its budget from one visit to the
next. It covers every eviction and admission, every prefetcher, even one that knows the whole future, with `fetch` as
miss rule and a cache that begins empty.

Let ``t_v`` be the time of the gate of visit v, ``w_v`` the computation of its experts and dense part, ``e_v = t_{v+1} -
dense_v`` the time when its experts are done, and ``stall_v = t_{v+1} - t_v - w_v``.

**What a pool holds.** A resident at a gate is *used again* if some visit hits it before it leaves. At the gate of a
visit b, the residents of b's pool that are used again take at most the pool's budget C:

1. Where the demand competes (section 2, admission), nothing is pinned but copies under way, which the room test of
   section 4 keeps within C, so a visit leaves at most C.
2. Else a visit u leaves more than C only as demand(u) and one copy g in flight at its gate, all pinned. Such a visit
   misses an expert, as not all of demand(u) was there beside g. The miss is copied behind g, so g has arrived when u
   ends, and u starts no copy into a pool that is full of pinned ones; one that starts later has its pool brought down
   to C. So whenever a pool holds more than C at its next gate b, no copy into it is in flight there, and b leaves at
   most C. If b does not stream, its hits are pinned and stay: all that is at its gate and is used again is among those
   C. If b streams, C and one expert more are allowed.

**Lower bound by windows.** Look at visits i..j.

1. *Loads.* Every demand of the window is served by a resident at t_i that is used again, or by a copy that starts at
   t_i or later. A copy ahead of its demand can be put off until the demand: that takes no further copy, and what is
   used again at any gate is a part of what it was. So no policy starts fewer copies than the best policy that loads on
   demand. That one begins with the C experts that are needed soonest, and after each visit keeps the C soonest of
   (resident or demanded): Belady's rule with bypass, with the usual exchange argument. The rule does not depend on j
   (what is needed after j is what it gives up first), so one pass from i gives the least loads ``n_ij`` of every j.
2. *Time.* Copies that start at t_i or later end one after another: the last one needed, in a window with
   ``n_ij > 0``, not before ``t_i + n_ij * copy``. Its expert still has to run, at least for ``c`` (the cheapest in
   the window), and it runs before e_j. Hence ``t_i + n_ij * copy + c <= e_j``, and as
   ``e_j = t_i + sum_{v=i..j} (w_v + stall_v) - dense_j``::

       stall_i + ... + stall_j  >=  b_ij = n_ij * copy + c - (w_i + ... + w_j - dense_j)

3. *Windows that do not overlap* add up. ``best_{j+1} = max(best_j, max_i (best_i + b_ij))`` takes the best set of
   windows; any choice of windows is sound. Here they begin at resets, and on a ladder: windows of up to 4 * 2^k passes
   begin at every 2^k-th pass.

A window may copy whatever it likes as early as it likes, and have every copy beside computation. Where slots are few,
that is far from what can be: copies ahead take slots, and copies on demand are waited for.

**Lower bound by prices** (`prices`). Each demand of a visit b, of an expert last used at u, is one of three: *kept*
since u, *copied ahead* at a visit x with u <= x < b that may prefetch, or *copied on demand*. Let D_v and P_v be the
seconds of copies that start at v on demand and ahead (those that serve a demand), F_v what is left at t_v of a copy in
flight. Every schedule has::

    stall_v >= D_v - slack_v                       slack_v: computation of v's experts but the cheapest, as the last
                                                   copy ends before its expert runs
    stall_v >= D_v * max(0, 1 - slack_v / copy)    the same, as D_v is a whole number of copies or none
    stall_v >= F_v + D_v + P_v - F_{v+1} - w_v     the link does one copy at a time
    0 <= F_v <= copy, F_0 = 0                      one copy can be in flight
    C >= units kept over the gate of v, or copied ahead before it and used at it or later      for v's pool

Multiply them by prices (first, wait, link and slot, none negative, the first three at most 1 together) and add them up:
the stall is at least what all demands cost by these prices, each by the cheapest of its ways, less the prices of what
is there anyway. That is so for all prices. Good ones are the dual values of linear programs over stretches of passes
(`programs`): they are tried where schedule and windows are further apart than `CLOSE`.

**Which cases.** With pools of different copy times, each pool has loads and copy times of its own. In one pool of
unequal experts, windows count the smallest of them and the shortest copy. No bound is for ``oversize="hold"``, nor
for miss rules that run experts on the host or leave them out. An engine that adds (``Hardware.overlaps`` below 1) ends
a visit no sooner, so the same bounds hold for it.

**Feasible schedule.** Aggressive prefetching (Cao, Felten, Karlin and Li, "A study of integrated prefetching and
caching strategies", 1995): whenever the link is free, copy the missing expert that is needed next, and evict the one
that is needed last. The replay follows CONTRACT.md second by second: experts run as they become ready, a late copy is
waited for, copies start strictly before the next gate, the copy in flight is pinned, nothing crosses a reset. What it
has over the engine's own prefetchers: it knows the future, and chooses copy by copy what to copy and what leaves. The
best of many rules counts (`schedules`). On a slow link it is worth the most to be less aggressive: what a copy ahead
pushes out must be needed some passes later, or not be in the plan of the linear programs. Where the best is still
further than `SEARCHED` from the lower bound, a local search changes what it keeps and copies ahead.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.bounds import kernels as kernels
from specmd_jax.bounds.lines import line_of, pools_of
from specmd_jax.bounds.prices import bound_s, facts
from specmd_jax.bounds.programs import plan
from specmd_jax.bounds.schedules import Schedule, Schedules
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.specs.capacity import Budget, Capacity, parse_capacity
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.hardware import hardware as find_hardware
from specmd_jax.types import Trace

CLOSE = 0.005
"""Bounds that are no further apart than this share are close enough: no more is tried."""
SEARCHED = 0.05
"""A schedule that is further from the lower bound is searched around."""
PASSES = 2_000
"""Longer traces have linear programs only if asked: they take about 0.1 s a pass."""
STRETCH, CONTEXT = 40, 12
"""Passes of which a linear program finds the prices, and passes that it sees on either side of them."""


class Bounds(NamedTuple):
    """Seconds of stall over the counted visits: no policy stalls less than `lower_s`; one schedule has `feasible_s`."""

    lower_s: float
    feasible_s: float
    feasible_copies: int  # of that schedule, over all visits


def stall_bounds(
    trace: Trace | Prepared,
    capacity: Capacity = "25%",
    scope: str = "global",
    hardware: str | Hardware = "pcie4-x16",
    programs: bool | None = None,
    **schedule: Any,
) -> Bounds:
    """Bounds the total stall of any policy, certified below and attained above (module docstring).

    Args:
      trace: a trace (`schedule` are options of `schedule.build.build_schedule`), or one that `prepare` has prepared.
      capacity, scope: as in `api.run`; bytes of each layer too.
      hardware: a preset's name or a `Hardware`.
      programs: solve linear programs where windows and greedy schedules are not `CLOSE`; None: up to `PASSES` passes.

    Raises:
      SpecmdError: a capacity, scope or hardware that makes no sense, or several stored precisions.
    """
    if isinstance(trace, Trace):
        replays = prepare(trace, **schedule)
    elif schedule:
        raise SpecmdError(f"a prepared trace has its schedule: {next(iter(schedule))!r} was given beside it")
    else:
        replays = trace
    shape = replays.trace
    budget = parse_capacity(
        capacity, expert_bytes=shape.expert_bytes, experts=shape.experts, top_k=shape.top_k, scope=scope
    )
    return bounds_of(replays, budget, find_hardware(hardware), programs)


def bounds_of(replays: Prepared, budget: Budget, hardware: Hardware, programs: bool | None = None) -> Bounds:
    """Gives the bounds on the stall over counted visits; `budget` in bytes, one pool or [L]."""
    lower_s, best = bracket(replays, budget, hardware, programs)
    return Bounds(lower_s, best.stall_s, best.copies)


def bracket(
    replays: Prepared, budget: Budget, hardware: Hardware, programs: bool | None = None
) -> tuple[float, Schedule]:
    """Gives the lower bound and the best schedule; `programs` as in `stall_bounds`."""
    lower_s, schedules = lower_bound(replays, budget, hardware), Schedules(replays, budget, hardware)
    best = schedules.greedy(lambda stall_s: _near(lower_s, stall_s, CLOSE))
    solves = programs if programs is not None else int(replays.schedule.starts_pass.sum()) <= PASSES
    if not solves or _near(lower_s, best.stall_s, CLOSE):
        return lower_s, best
    line, pools = schedules.line, schedules.pools
    known = facts(line, pools)
    found = plan(line, pools, known, _stretches(replays), CONTEXT * schedules.visits_a_pass)
    lower_s = max(lower_s, bound_s(line, pools, known, found.prices))
    best = schedules.planned(found.kept, best, lambda stall_s: _near(lower_s, stall_s, CLOSE))
    return lower_s, schedules.search(best, lambda stall_s: _near(lower_s, stall_s, SEARCHED))


def lower_bound(replays: Prepared, budget: Budget, hardware: Hardware) -> float:
    """Gives the lower bound by windows alone: quick, and close where slots are many or the link is fast."""
    line, pools = line_of(replays, budget, hardware), pools_of(replays, budget, hardware)
    schedule = replays.schedule
    known = facts(line, pools)
    if pools.budget.size > 1:
        slots = pools.budget // pools.units[:: schedule.experts]
        pool = line.layer
    else:
        slots = pools.budget // pools.units.min()
        pool = np.zeros_like(line.layer)
        pools = pools._replace(copy_s=np.full_like(pools.copy_s, pools.copy_s.min()))
    more = np.zeros(slots.size, np.bool_)
    np.logical_or.at(more, pool, known.units > pools.budget[pool])
    slots = slots + more
    begins, reaches = _windows(np.flatnonzero(schedule.starts_pass), schedule.reset)
    best = np.zeros(schedule.visits + 1)
    upcoming = replays.first_use.astype(np.int64).reshape(-1)
    resident, held = np.zeros(upcoming.size, np.bool_), np.zeros(slots.size, np.int64)
    later = np.zeros_like(upcoming)
    kernels.lower(line, pools, slots, schedule.experts, begins, reaches, upcoming, resident, held, later, best)
    return float(best[-1])


def _near(lower_s: float, stall_s: float, share: float) -> bool:
    return (1 - share) * stall_s <= lower_s


def _stretches(replays: Prepared) -> list[tuple[int, int]]:
    """First visit, and the one behind the last, of stretches of passes that no reset interrupts."""
    passes = np.flatnonzero(replays.schedule.starts_pass)
    resets = np.flatnonzero(replays.schedule.reset)
    cuts = [0]
    for begin in passes.tolist():
        behind = np.searchsorted(passes, begin) - np.searchsorted(passes, cuts[-1])
        if begin > 0 and (behind >= STRETCH or begin in resets):
            cuts.append(begin)
    cuts.append(replays.schedule.visits)
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def _windows(
    passes: npt.NDArray[np.int64], reset: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First visits of windows, rising, and the longest window from each: the ladder of the module docstring."""
    count = passes.size
    each = int(np.ceil(reset.size / count))
    # 4 times the largest power of two that divides the number of the pass
    number = np.arange(1, count)
    reach = np.concatenate([[count], 4 * (number & -number)])
    reach = np.where(reset[passes], count, reach)
    ends = np.append(np.flatnonzero(reset[passes])[1:], count) if reset.any() else np.array([count])
    upto = ends[np.searchsorted(ends, np.arange(count), side="right")]  # what lies behind the next reset is its own
    return passes.astype(np.int64), (np.minimum(reach, upto - np.arange(count)) * each).astype(np.int64)
