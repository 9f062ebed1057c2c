"""The demand of a stretch of a trace straight from its cells: what `demand.pack` makes of a schedule, without one.

A schedule's dense columns cost more than the replay of the curves; a trace of millions of tokens goes without them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specmd_jax.loops import compiled

EVENT, BY_POSITION, BY_ID = range(3)  # one visit per pass and layer, or one per demanded expert, in which order


@compiled
def _gather(ids, gates, even_gate, starts, order, clock, scratch, out):
    """Lists the visits of passes starts[p]..starts[p + 1] - 1 (tokens); returns how many visits and entries there are.

    `gates` may be empty: `even_gate` each. `scratch`: [E] int64 of -1, then [E] int64 x 2, [E] float32.
    """
    at, who, last, mass = scratch
    start, group, clocks, flat, mass_of = out
    layers, top_k, experts = ids.shape[1], ids.shape[2], at.size
    rows, entries = 0, 0
    for p in range(starts.size - 1):
        for layer in range(layers):
            found = 0  # at[e]: which of the visit's experts e is, by first position
            for t in range(starts[p], starts[p + 1]):
                for k in range(top_k):
                    e = np.int64(ids[t, layer, k])
                    if e < 0:
                        continue
                    if at[e] < 0:
                        at[e], who[found], mass[found] = found, e, 0
                        found += 1
                    i = at[e]
                    last[i] = (t - starts[p]) * top_k + k
                    mass[i] += gates[t, layer, k] if gates.size > 0 else even_gate
            if order == EVENT or found == 0:
                start[rows], group[rows], clocks[rows] = entries, p * layers + layer, clock
                rows += 1
                clock += found + 1
                if starts[p + 1] - starts[p] == 1:  # the first position is the last one
                    for i in range(found):
                        flat[entries], mass_of[entries] = layer * experts + who[i], mass[i]
                        entries += 1
                else:
                    for t in range(starts[p], starts[p + 1]):
                        for k in range(top_k):
                            e = np.int64(ids[t, layer, k])
                            if e >= 0 and last[at[e]] == (t - starts[p]) * top_k + k:
                                flat[entries], mass_of[entries] = layer * experts + e, mass[at[e]]
                                entries += 1
            else:
                for step in range(found if order == BY_POSITION else experts):
                    i = step if order == BY_POSITION else at[step]
                    if i < 0:
                        continue
                    start[rows], group[rows], clocks[rows] = entries, p * layers + layer, clock
                    flat[entries], mass_of[entries] = layer * experts + who[i], mass[i]
                    rows += 1
                    entries += 1
                    clock += 2
            for i in range(found):
                at[who[i]] = -1
    start[rows] = entries
    return rows, entries, clock


@compiled
def _look_ahead(start, flat, first_visit, upcoming, next_use):
    """Next uses; `upcoming` [N] is the next visit of each expert behind these visits, and becomes that from the first
    one on.
    """
    for v in range(start.size - 2, -1, -1):
        for i in range(start[v], start[v + 1]):
            next_use[i] = upcoming[flat[i]]
            upcoming[flat[i]] = first_visit + v


def gather(
    ids: npt.NDArray[np.integer],
    gates: npt.NDArray[np.float32] | None,
    starts: npt.NDArray[np.int64],
    order: int,
    experts: int,
    clock: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray]:
    """Gives the demand of passes.

    Args:
      ids, gates: [N, L, K]; None: 1/K each.
      starts: [P + 1] first token of each pass, and N.
      order: one of the constants above.
      clock: when the first visit begins.

    Returns:
      start [V + 1], pass * L + layer [V], clock [V + 1] (the last one behind them all), flat ids [A] int32 by rank,
      gate mass [A] float32.
    """
    layers, top_k = ids.shape[1:]
    most = ids.size
    rows = (starts.size - 1) * layers + (0 if order == EVENT else most)
    start, group, clocks = np.empty(rows + 1, np.int64), np.empty(rows, np.int64), np.empty(rows + 1, np.int64)
    flat, mass = np.empty(most, np.int32), np.empty(most, np.float32)
    scratch = (
        np.full(experts, -1, np.int64),
        np.empty(experts, np.int64),
        np.empty(experts, np.int64),
        np.empty(experts, np.float32),
    )
    # copies where types or layout differ: kernels are compiled once
    cells = np.ascontiguousarray(ids, np.int32)
    shares = np.empty((0, 0, 0), np.float32) if gates is None else np.ascontiguousarray(gates, np.float32)
    out = start, group, clocks, flat, mass
    visits, entries, end = _gather(cells, shares, np.float32(1 / top_k), starts, order, clock, scratch, out)
    clocks[visits] = end
    return start[: visits + 1], group[:visits], clocks[: visits + 1], flat[:entries], mass[:entries]


def look_ahead(
    start: npt.NDArray[np.int64], flat: npt.NDArray[np.int32], first_visit: int, upcoming: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """[A] next uses of a demand, given the next visit of each expert behind it (`upcoming` [N]; changed in place to
    that from `first_visit` on).
    """
    next_use = np.empty(flat.size, np.int32)
    _look_ahead(start, flat, first_visit, upcoming, next_use)
    return next_use
