"""The demand of a schedule as lists, without its dense columns: what the curves, the bounds and a stream read."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from specmd_jax.types import Schedule


class Demand(NamedTuple):
    """The demand of a schedule, packed: visit v demands the entries ``start[v]:start[v + 1]`` of all a, by rank."""

    start: Int64[np.ndarray, " V+1"]
    flat: Int32[np.ndarray, " a"]  # flat ids
    mass: Float32[np.ndarray, " a"]
    next_use: Int32[np.ndarray, " a"]
    layer: Int32[np.ndarray, " V"]
    pass_id: Int32[np.ndarray, " V"]
    clock: Int32[np.ndarray, " V"]
    starts_pass: Bool[np.ndarray, " V"]
    reset: Bool[np.ndarray, " V"]
    counted: Bool[np.ndarray, " V"]


def pack(schedule: Schedule) -> Demand:
    """Gives the demand of a schedule as lists by rank. Worth keeping when several policies replay one schedule."""
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


def cut(demand: Demand, first: int, last: int) -> Annotated[Demand, "with a V of its own"]:
    """Gives the visits first..last - 1."""
    start = demand.start[first : last + 1]
    entries = slice(start[0], start[-1])
    columns = {name: column[first:last] for name, column in demand._asdict().items()}
    columns |= {name: getattr(demand, name)[entries] for name in ("flat", "mass", "next_use")}
    return Demand(**{**columns, "start": start - start[0]})


def widest_demand(demand: Demand, layers: int) -> Int64[np.ndarray, " {layers}"]:
    """Gives the most experts that a visit of each layer demands."""
    widest = np.zeros(layers, np.int64)
    np.maximum.at(widest, demand.layer, np.diff(demand.start))
    return widest
