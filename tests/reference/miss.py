"""Miss rules: what happens to a demanded expert that is not resident at the level it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .events import DROPPED, EITHER, FETCHED, ON_CPU, SUBSTITUTED
from .schedule import Visit


class Plan(NamedTuple):
    """What happens to a demanded expert that is not resident at `need`."""

    need: int
    action: int = FETCHED
    level: int = 0  # at which it is fetched
    stand_in: int = -1  # expert that replaces it


class Arrived(NamedTuple):
    """Residents of the visited layer when the visit begins, the copy in flight left out: expert -> level."""

    levels: dict[int, int]
    top: int
    here: dict[int, int]  # of every expert of the layer, the one in flight too; 0: absent
    room: int  # experts of the layer at the top level that fit into its pool as it is


def fetch(visit: Visit, arrived: Arrived) -> dict[int, Plan]:
    return {e: Plan(arrived.top, level=arrived.top) for e in visit.demand}


def fetch_lowest_bit(visit: Visit, arrived: Arrived) -> dict[int, Plan]:
    """Any resident level is a hit; a missing expert is copied at the cheapest precision."""
    del arrived
    return {e: Plan(1, level=1) for e in visit.demand}


def fetch_priority(visit: Visit, arrived: Arrived, bottom: float = 0.6) -> dict[int, Plan]:
    """The `bottom` share of the demand by falling mass makes do with the lowest level, the rest needs the highest."""
    first_low = (1 - bottom) * len(visit.demand) - 1e-9
    levels = {e: 1 if r >= first_low else arrived.top for r, e in enumerate(visit.by_mass)}
    return {e: Plan(level, level=level) for e, level in levels.items()}


def cascade(visit: Visit, arrived: Arrived, high: float = 0.6, low: float = 0.2) -> dict[int, Plan]:
    """Precision by share of the visit's mass: >= high the highest, >= low the middle (Q + 1) // 2, else the lowest.

    Shares are float64 with a slack of 1e-6, so that equal gates that sit on a threshold fall on its upper side.
    """
    total = sum(float(m) for m in visit.mass.values())
    plans: dict[int, Plan] = {}
    for e in visit.demand:
        mass = float(visit.mass[e])
        if mass >= (high - 1e-6) * total:
            level = arrived.top
        elif mass >= (low - 1e-6) * total:
            level = (arrived.top + 1) // 2
        else:
            level = 1
        plans[e] = Plan(level, level=level)
    return plans


def drop(visit: Visit, arrived: Arrived, keep: int = 2) -> dict[int, Plan]:
    """Misses from rank `keep` on (by falling mass, over the whole demand) are left out, others fetched at the top."""
    return {
        e: Plan(arrived.top, DROPPED) if r >= keep else Plan(arrived.top, level=arrived.top)
        for r, e in enumerate(visit.by_mass)
    }


def cpu(visit: Visit, arrived: Arrived) -> dict[int, Plan]:
    """Misses are copied while there is room; from then on they run on the host."""
    plans = {e: Plan(arrived.top, ON_CPU) for e in visit.demand}
    missing = [e for e in visit.by_mass if arrived.here[e] < arrived.top]
    return plans | {e: Plan(arrived.top, level=arrived.top) for e in missing[: arrived.room]}


def split(visit: Visit, arrived: Arrived) -> dict[int, Plan]:
    """Every miss is copied or runs on the host; `divide` in step.py says which."""
    return {e: Plan(arrived.top, EITHER, level=arrived.top) for e in visit.demand}


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    powers = np.exp(logits.astype(np.float32) - np.float32(logits.max()))
    return np.asarray(powers / powers.sum(dtype=np.float32), np.float32)


def substitute(visit: Visit, arrived: Arrived, tolerance: float = 0.1) -> dict[int, Plan]:
    """A miss of a one-token pass is replaced by the likeliest arrived, non-demanded expert of its layer.

    Only experts whose router probability (float32 softmax over all E) differs from the missing one's by at most
    `tolerance` qualify; ties go to the lower id; one expert may stand in for several. If none qualifies, or the pass
    has several tokens: fetch.
    """
    plans = fetch(visit, arrived)
    if visit.tokens != 1 or not visit.demand:
        return plans
    if visit.logits is None:
        raise ValueError("substitute needs `logits` in the schedule")
    probability = softmax(visit.logits)
    spare = [e for e in arrived.levels if e not in visit.count]
    for missing in visit.demand:
        near = [e for e in spare if abs(probability[e] - probability[missing]) <= np.float32(tolerance)]
        if near:
            best = min(near, key=lambda e: (-probability[e], e))
            plans[missing] = Plan(arrived.top, SUBSTITUTED, stand_in=best)
    return plans


MISS: dict[str, Callable[..., dict[int, Plan]]] = {
    "fetch": fetch,
    "fetch_lowest_bit": fetch_lowest_bit,
    "fetch_priority": fetch_priority,
    "cascade": cascade,
    "drop": drop,
    "cpu": cpu,
    "split": split,
    "substitute": substitute,
}
