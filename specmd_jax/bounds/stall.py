"""How little a replay can stall, from below and from above.

The model is that of CONTRACT.md: one link, one copy at a time, a pool keeps at most its budget from one visit to the
next. Every policy is covered: any eviction (with bypass too), any prefetcher, even one that knows the whole future.

**Lower bound.** Let ``t_v`` be the time of the gate of visit v, ``w_v`` the computation of its experts and dense part,
``e_v = t_{v+1} - dense_v`` the time when its experts are done, and ``stall_v = t_{v+1} - t_v - w_v``. Look at a
*window* of visits i..j.

1. *Loads.* At t_i at most C experts are resident, a copy in flight included (section 2, step 7). Every demand of the
   window is served by one of them or by a copy that starts at t_i or later. A copy ahead of its demand can be put off
   until the demand: that takes no further copy and leaves every content in between a subset of what it was. So no
   policy starts fewer copies than the best policy that loads on demand. That one begins with the C experts that are
   needed soonest, and after each visit keeps the C soonest of (resident or demanded): Belady's rule with bypass, with
   the usual exchange argument. The rule does not depend on j (what is needed after j is what it gives up first), so
   one pass from i gives the least loads ``n_ij`` of every j. The contents before visit 0 and after a reset are known:
   empty.
2. *Time.* Copies that start at t_i or later end one after another: the last one needed, in a window with
   ``n_ij > 0``, not before ``t_i + n_ij * copy``. Its expert still has to run, at least for ``c`` (the cheapest in
   the window), and it runs before e_j. Hence ``t_i + n_ij * copy + c <= e_j``, and as
   ``e_j = t_i + sum_{v=i..j} (w_v + stall_v) - dense_j``::

       stall_i + ... + stall_j  >=  b_ij = n_ij * copy + c - (w_i + ... + w_j - dense_j)

3. *Windows that do not overlap* add up. ``best_{j+1} = max(best_j, max_i (best_i + b_ij))`` takes the best set of
   windows; any choice of windows is sound. Here they begin at resets, and on a ladder: windows of up to 4 * 2^k passes
   begin at every 2^k-th pass.

With pools of different copy times, each pool has loads and copy times of its own. In one pool of unequal experts, C
counts the smallest of them and a copy takes the shortest time. C is the budget in experts; it is one more if the
largest demand fills the pool, as a copy in flight is pinned beside it. The bound is not for ``oversize="hold"``, nor
for miss rules that run experts on the host. An engine that adds (``Hardware.overlaps`` below 1) ends a visit no sooner,
so the same windows hold for it.

**Feasible schedule.** Aggressive prefetching (Cao, Felten, Karlin and Li, "A study of integrated prefetching and
caching strategies", 1995): whenever the link is free, copy the missing expert that is needed next, and evict the one
that is needed last, unless that is needed sooner. The replay follows CONTRACT.md second by second: experts run as they
become ready, a late copy is waited for, copies start strictly before the next gate, the copy in flight is pinned,
nothing crosses a reset. What it has over the engine's own prefetchers: it knows the future, looks further ahead than L
- 1 layers, and chooses a victim copy by copy. The best of four variants counts: the demand pinned at its own visit, or
not (as ``belady_bypass``); looking one pass ahead, or four.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.bounds import kernels as kernels
from specmd_jax.bounds.kernels import Line, Pools
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.specs.capacity import Budget, Capacity, parse_capacity
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.hardware import hardware as find_hardware
from specmd_jax.types import DECODE, Trace

LOOKAHEADS = (1, 4)
"""Passes that the feasible schedules look ahead."""


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
    **schedule: Any,
) -> Bounds:
    """Bounds the total stall of any policy, certified below and attained above (module docstring).

    Args:
      trace: a trace (`schedule` are options of `schedule.build.build_schedule`), or one that `prepare` has prepared.
      capacity, scope: as in `api.run`; bytes of each layer too.
      hardware: a preset's name or a `Hardware`.

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
    machine = find_hardware(hardware)
    return Bounds(lower_bound(replays, budget, machine), *feasible_schedule(replays, budget, machine))


def lower_bound(replays: Prepared, budget: Budget, hardware: Hardware) -> float:
    """Gives the stall in seconds that no policy can avoid over counted visits; `budget` in bytes, one pool or [L]."""
    line, pools = _line(replays, budget, hardware), _pools(replays, budget, hardware)
    schedule = replays.schedule
    layered = pools.budget.size > 1
    if layered:
        slots = pools.budget // pools.units[:: schedule.experts]
    else:
        slots = pools.budget // pools.units.min()
        pools = pools._replace(copy_s=np.full_like(pools.copy_s, pools.copy_s.min()))
    slots = np.where(slots >= schedule.most + 1, slots, slots + 1)
    begins, reaches = _windows(np.flatnonzero(schedule.starts_pass), schedule.reset)
    best = np.zeros(schedule.visits + 1)
    scratch = _scratch(replays, pools)
    kernels.lower(line, pools, slots, schedule.experts, begins, reaches, *scratch, scratch[0].copy(), best)
    return float(best[-1])


def feasible_schedule(replays: Prepared, budget: Budget, hardware: Hardware) -> tuple[float, int]:
    """Gives the seconds of stall over the counted visits, and copies, of the best aggressive schedule."""
    line, pools = _line(replays, budget, hardware), _pools(replays, budget, hardware)
    found, adds = [], float(_costs(replays, hardware)["adds"])
    for bypass in (False, True):
        for passes in LOOKAHEADS:
            ahead = passes * int(np.ceil(replays.schedule.visits / max(1, replays.schedule.starts_pass.sum())))
            upcoming, resident, held = _scratch(replays, pools)
            pinned = np.zeros_like(resident)
            found.append(
                kernels.feasible(
                    line, pools, replays.schedule.experts, ahead, bypass, adds, upcoming, resident, held, pinned
                )
            )
    stall_s, copies = min(found)
    return float(stall_s), int(copies)


def _line(replays: Prepared, budget: Budget, hardware: Hardware) -> Line:
    """Gives the schedule with float64 times; a demand larger than its pool is copied by id and starts no prefetch."""
    if len(replays.sizes.level_bytes) != 1:
        raise SpecmdError(f"bounds are for one stored precision, not for {len(replays.sizes.level_bytes)}")
    s, costs = replays.schedule, _costs(replays, hardware)
    visit, expert = np.nonzero(s.count)
    start = np.zeros(s.visits + 1, np.int64)
    np.cumsum(np.bincount(visit, minlength=s.visits), out=start[1:])
    pool = replays.sizes.budget(budget)
    units = replays.sizes.units[1].astype(np.int64)
    streams = s.demanded * units[s.layer] > (pool[s.layer] if pool.ndim else pool)
    at = np.lexsort((expert, np.where(streams[visit], 0, -s.mass[visit, expert]), visit))
    visit, expert = visit[at], expert[at]
    layer = s.layer.astype(np.int64)
    tokens = s.count[visit, expert]
    compute_s = np.maximum(tokens * costs["expert_flop_s"][layer[visit]], costs["expert_read_s"][0, layer[visit]])
    compute_s = compute_s + costs["launch_s"]
    flop_s, read_s = costs["dense_flop_s"][layer], costs["dense_read_s"][layer]
    if "context_read_s" in costs:
        decode = s.phase == DECODE
        flop_s = flop_s + decode * costs["context_flop_s"][layer]
        read_s = read_s + decode * s.served * costs["context_read_s"][layer]
    dense_s = np.maximum(s.tokens * flop_s, read_s) + costs["launch_s"] + costs["layer_s"]
    dense_s = np.where(s.ends_layer, dense_s, 0.0)
    if s.drafting_s is not None:  # the link goes on while tokens are drafted, as it does beside the dense part
        dense_s = dense_s + s.drafting_s[:, 1]
    return Line(
        start=start,
        flat=layer[visit] * s.experts + expert,
        next_use=s.next_use[visit, expert].astype(np.int64),
        compute_s=compute_s,
        layer=layer,
        dense_s=dense_s,
        work_s=np.bincount(visit, compute_s, s.visits).astype(np.float64) + dense_s,
        reset=np.array(s.reset, np.bool_),
        counted=np.array(s.counted, np.bool_),
        prefetches=np.array(s.ends_layer & ~streams, np.bool_),
    )


def _pools(replays: Prepared, budget: Budget, hardware: Hardware) -> Pools:
    layers, experts = replays.schedule.layers, replays.schedule.experts
    size = np.asarray(replays.sizes.budget(budget), np.int64)
    of_layer = np.arange(layers) if size.ndim else np.zeros(layers, np.int64)
    return Pools(
        of=np.repeat(of_layer, experts).astype(np.int64),
        budget=np.atleast_1d(size),
        units=np.repeat(replays.sizes.units[1].astype(np.int64), experts),
        copy_s=np.repeat(_costs(replays, hardware)["copy_s"][0], experts),
    )


def _costs(replays: Prepared, hardware: Hardware) -> dict[str, npt.NDArray[np.float64]]:
    """Gives the engine's float32 seconds, in float64."""
    costs = replays.costs(hardware)
    assert costs is not None
    return {name: np.asarray(value, np.float64) for name, value in costs._asdict().items() if value is not None}


def _scratch(
    replays: Prepared, pools: Pools
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """First use of every expert, and room for who is resident and what each pool holds."""
    upcoming = replays.first_use.astype(np.int64).reshape(-1)
    return upcoming, np.zeros(upcoming.size, np.bool_), np.zeros(pools.budget.size, np.int64)


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
