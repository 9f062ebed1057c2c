"""The demand of a schedule as lists, without its dense columns: what the curves, the bounds and a stream read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Schedule


class Demand(NamedTuple):
    """The demand of a schedule, packed: visit v demands the entries ``start[v]:start[v + 1]`` of all A, by rank."""

    start: npt.NDArray[np.int64]  # [V + 1]
    flat: npt.NDArray[np.int32]  # [A] flat ids
    mass: npt.NDArray[np.float32]  # [A]
    next_use: npt.NDArray[np.int32]  # [A]
    layer: npt.NDArray[np.int32]  # [V]
    pass_id: npt.NDArray[np.int32]  # [V]
    clock: npt.NDArray[np.int32]  # [V]
    starts_pass: npt.NDArray[np.bool_]  # [V]
    reset: npt.NDArray[np.bool_]  # [V]
    counted: npt.NDArray[np.bool_]  # [V]


def pack(schedule: Schedule) -> Demand:
    """The demand of a schedule as lists by rank. Worth keeping when several policies replay one schedule."""
    visit, expert = np.nonzero(schedule.count > 0)
    start = np.zeros(schedule.visits + 1, np.int64)
    np.cumsum(np.bincount(visit, minlength=schedule.visits), out=start[1:])
    at = np.empty(visit.size, np.int64)
    at[start[visit] + schedule.rank[visit, expert]] = np.arange(visit.size)
    visit, expert = visit[at], expert[at]
    return Demand(
        start=start,
        # copies with fixed types: a read-only or strided array would be compiled for once more
        flat=np.array(schedule.layer[visit] * schedule.experts + expert, np.int32),
        mass=np.array(schedule.mass[visit, expert], np.float32),
        next_use=np.array(schedule.next_use[visit, expert], np.int32),
        layer=np.array(schedule.layer, np.int32),
        pass_id=np.array(schedule.pass_id, np.int32),
        clock=np.array(schedule.clock, np.int32),
        starts_pass=np.array(schedule.starts_pass, np.bool_),
        reset=np.array(schedule.reset, np.bool_),
        counted=np.array(schedule.counted, np.bool_),
    )


def cut(demand: Demand, first: int, last: int) -> Demand:
    """The visits first..last - 1."""
    start = demand.start[first : last + 1]
    entries = slice(start[0], start[-1])
    columns = {name: column[first:last] for name, column in demand._asdict().items()}
    columns |= {name: getattr(demand, name)[entries] for name in ("flat", "mass", "next_use")}
    return Demand(**{**columns, "start": start - start[0]})


def widest_demand(demand: Demand, layers: int) -> npt.NDArray[np.int64]:
    """[L] the most experts that a visit of each layer demands."""
    widest = np.zeros(layers, np.int64)
    np.maximum.at(widest, demand.layer, np.diff(demand.start))
    return widest
