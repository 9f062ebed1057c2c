"""What happened in a replay, visit by visit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

NOT_DEMANDED, HIT_REUSE, HIT_PREFETCH, HIT_LATE, FETCHED, DROPPED, SUBSTITUTED, ON_CPU = range(8)
"""Values of `Replay.outcome`."""
EITHER = 8
"""Of a plan: fetched or on the host, whichever ends the visit first."""


@dataclass
class Replay:
    """What happened, visit by visit (counts and lists cover all visits, also those that are not counted in metrics)."""

    outcome: npt.NDArray[np.int8]  # [V, E] one of the codes above
    collision: npt.NDArray[np.bool_]  # [V, E] missed after being evicted earlier in the same pass
    stand_in: npt.NDArray[np.int32]  # [V, E] expert that ran in place of a substituted one, else -1
    resident: npt.NDArray[np.int8]  # [V, L, E] level after the visit, 0: absent
    visit_s: npt.NDArray[np.float64]  # [V] from this gate to the next
    stall_late_s: npt.NDArray[np.float64]  # [V]
    stall_miss_s: npt.NDArray[np.float64]  # [V]
    stall_link_busy_s: npt.NDArray[np.float64]  # [V]
    host_s: npt.NDArray[np.float64]  # [V] that the host computes
    link_s: npt.NDArray[np.float64]  # [V] by which the visit prolongs what the link has to do
    demand_bytes: npt.NDArray[np.int64]  # [V] copied for misses
    prefetch_bytes: npt.NDArray[np.int64]  # [V] copied ahead
    loads: npt.NDArray[np.int64]  # [L] absent experts that became resident, by demand or prefetch
    upgrades: npt.NDArray[np.int64]  # [L] lower copies replaced by a higher one
    evictions: npt.NDArray[np.int64]  # [L]
    emptied: npt.NDArray[np.int64]  # [L] residents thrown out by a reset
    evicted: list[list[int]] = field(default_factory=list)  # [V] flat ids as they left
    prefetched: list[list[int]] = field(default_factory=list)  # [V] flat ids as their copies started
    prefetch_used: int = 0  # prefetched experts that were hit before they left
    admitted: int = 0  # demand copies that were resident, as copied, behind their visit
    prefetch_wasted: int = 0  # prefetched experts that left, or stayed to the end, unused
    # of a host tier:
    read: list[list[int]] = field(default_factory=list)  # [V] flat ids of misses that were read from storage, ascending
    # [V] of prefetch copies that were read first, or of reads ahead into host memory; as they started
    read_ahead: list[list[int]] = field(default_factory=list)
    read_late: list[list[int]] = field(
        default_factory=list
    )  # [V] of asked experts that were being read ahead, ascending
    skipped: list[int] = field(default_factory=list)  # [V] reads ahead into host memory without room there
    reads_used: int = 0  # of those into host memory: asked for before they left
    reads_wasted: int = 0
    in_host: list[npt.NDArray[np.int8]] = field(default_factory=list)  # [V] [L, E] level after the visit
    host_evictions: list[int] = field(default_factory=list)  # [V]
    stall_storage_s: list[float] = field(default_factory=list)  # [V]
    reading_s: list[float] = field(default_factory=list)  # [V] of the storage link


def nothing_yet(visits: int, layers: int, experts: int) -> Replay:
    """Before the first visit."""
    return Replay(
        outcome=np.zeros((visits, experts), np.int8),
        collision=np.zeros((visits, experts), np.bool_),
        stand_in=np.full((visits, experts), -1, np.int32),
        resident=np.zeros((visits, layers, experts), np.int8),
        visit_s=np.zeros(visits),
        stall_late_s=np.zeros(visits),
        stall_miss_s=np.zeros(visits),
        stall_link_busy_s=np.zeros(visits),
        host_s=np.zeros(visits),
        link_s=np.zeros(visits),
        demand_bytes=np.zeros(visits, np.int64),
        prefetch_bytes=np.zeros(visits, np.int64),
        loads=np.zeros(layers, np.int64),
        upgrades=np.zeros(layers, np.int64),
        evictions=np.zeros(layers, np.int64),
        emptied=np.zeros(layers, np.int64),
    )
