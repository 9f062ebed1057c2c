"""Turns integer totals into ratios, once, at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from specmd_jax.replay.totals import BUSY_S, HOST_S, LATE_S, LINK_S, MISS_S, READ_S, STORAGE_S, VISIT_S, Totals
from specmd_jax.schedule.counted import Counted
from specmd_jax.types import DECODE, PREFILL


@dataclass(frozen=True)
class Metrics:
    """What one replay comes to, over the counted passes. All of it is simulated; seconds are None without hardware."""

    tokens: int  # of the counted passes, without those whose draft was rejected
    demand: int  # demanded experts, summed over visits
    hits: int
    hits_reuse: int  # on time, came in by demand or used before
    hits_prefetch: int  # on time, first use of a prefetched expert
    hits_late: int  # resident, but the copy was still in flight
    misses: int
    hit_rate: float
    collisions: int  # misses on experts evicted earlier in the same pass
    collision_rate: float  # collisions / misses
    loads: int  # copies over the link
    evictions: int
    bytes_demand: int
    bytes_prefetch_used: int
    bytes_prefetch_wasted: int
    dropped: int
    substituted: int
    on_host: int  # misses that the host computed
    rerouted: int  # demanded only because of the routing policy
    lost_mass: float  # share of the gate mass that was dropped or moved to a substitute (quality proxy)
    mean_bits: float  # of the experts that ran on the device
    prefetch_precision: float | None  # predictions that came true; None without predictions
    prefetch_recall: float | None  # demanded experts that had been predicted
    ttft_s: float | None  # mean prefill time of a request
    tpot_s: float | None  # mean time of a decode pass, drafting too, for each token of a request that it keeps
    tokens_per_s: float | None  # decoded tokens per second
    stall_s: float | None
    stall_late_s: float | None
    stall_miss_s: float | None
    stall_link_busy_s: float | None
    link_utilisation: float | None  # share of the time that the link copies
    host_s: float | None  # that the host computes experts
    host_utilisation: float | None  # share of the time that it does
    verified: int  # rows of the decode passes: their tokens, and drafts that were rejected
    acceptance_length: float | None  # tokens that a decode pass keeps of a request, on average; None: no decode pass
    loads_per_token: float  # loads / tokens
    layer_demand: tuple[int, ...]
    layer_hits: tuple[int, ...]
    layer_collisions: tuple[int, ...]
    admitted: int | None = None  # demand copies that stayed in the cache; None: all that it could hold (no admission)
    profile: str | None = None  # what a warm start or pins know, and whether of the replayed requests
    # of storage behind host memory; without it, everything is in host memory
    host_hits: int = 0  # misses that are copied, or run on the host, and were in host memory
    host_misses: int = 0  # and those that storage was read for
    storage_reads: int = 0  # for prefetch copies, too
    host_evictions: int = 0
    bytes_storage: int = 0
    stall_storage_s: float | None = None
    storage_utilisation: float | None = None  # share of the time that storage is read
    reads_ahead: int = 0  # of storage_reads: what was foreseen
    # of predictions that are read into host memory; None: they go to the device
    reads_ahead_used: int | None = None  # were asked for before they left host memory
    reads_ahead_wasted: int | None = None  # and were not
    reads_ahead_skipped: int | None = None  # had time, but no room in host memory
    host_hits_late: int | None = None  # of host_hits: were still being read

    def row(self) -> dict[str, Any]:
        """Gives the scalar fields."""
        return {k: v for k, v in asdict(self).items() if not k.startswith("layer_")}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def metrics_of(
    counted: Counted, level_bytes: npt.NDArray[np.int64], totals: Totals, bits: tuple[float, ...], timed: bool
) -> Metrics:
    """Gives the metrics of one cell.

    Args:
      level_bytes: [Q, L].
      totals: numpy and unbatched.
      bits: the stored precisions, ascending.
    """
    experts: Any = jax.tree.map(lambda x: np.asarray(x).astype(np.int64), totals.experts)
    sums, runs = _sums(level_bytes, totals), np.asarray(totals.runs_at, np.int64)
    demand, misses = int(sums.demand), int(sums.misses)
    used = int((experts.prefetch_used * level_bytes[-1]).sum())
    seconds = np.asarray(totals.seconds, np.float64)
    times: dict[str, float | None] = dict.fromkeys(
        (
            "ttft_s",
            "tpot_s",
            "tokens_per_s",
            "stall_s",
            "stall_late_s",
            "stall_miss_s",
            "stall_link_busy_s",
            "link_utilisation",
            "host_s",
            "host_utilisation",
        )
    )
    if timed:
        both = seconds.sum(axis=0)
        times = {
            "ttft_s": _ratio(float(seconds[PREFILL, VISIT_S]), counted.prompts),
            "tpot_s": _ratio(float(seconds[DECODE, VISIT_S]), counted.decodes * counted.acceptance_length),
            "tokens_per_s": _ratio(counted.decoded, float(seconds[DECODE, VISIT_S])),
            "stall_s": float(both[[LATE_S, MISS_S, BUSY_S]].sum()) + _storage_stall(totals),
            "stall_late_s": float(both[LATE_S]),
            "stall_miss_s": float(both[MISS_S]),
            "stall_link_busy_s": float(both[BUSY_S]),
            "link_utilisation": _ratio(float(both[LINK_S]), float(both[VISIT_S])),
            "host_s": float(both[HOST_S]),
            "host_utilisation": _ratio(float(both[HOST_S]), float(both[VISIT_S])),
        }
    return Metrics(
        tokens=counted.tokens,
        demand=demand,
        hits=int(sums.hits),
        hits_reuse=int(experts.reused.sum()),
        hits_prefetch=int(experts.prefetch_hits.sum()),
        hits_late=int(sums.hits_late),
        misses=misses,
        hit_rate=int(sums.hits) / max(demand, 1),
        collisions=int(sums.collisions),
        collision_rate=int(sums.collisions) / max(misses, 1),
        loads=int(sums.loads),
        evictions=int(np.asarray(totals.evictions, np.int64).sum()),
        bytes_demand=int(sums.bytes_demand),
        bytes_prefetch_used=used,
        bytes_prefetch_wasted=int(sums.bytes_prefetch) - used,
        dropped=int(experts.dropped.sum()),
        substituted=int(experts.substituted.sum()),
        on_host=int(experts.host.sum()),
        rerouted=int(experts.rerouted.sum()),
        lost_mass=float(np.asarray(totals.lost_mass).sum()) / max(float(np.asarray(totals.mass).sum()), 1e-30),
        mean_bits=float((runs.sum(axis=1) * np.asarray(bits)).sum() / max(int(runs.sum()), 1)),
        prefetch_precision=_ratio(int(experts.predicted_right.sum()), int(experts.predicted.sum())),
        prefetch_recall=_ratio(int(experts.predicted_right.sum()), demand) if experts.predicted.any() else None,
        **times,
        verified=counted.verified,
        acceptance_length=counted.acceptance_length if counted.turns else None,
        loads_per_token=int(sums.loads) / max(counted.tokens, 1),
        layer_demand=_ints(experts.demand),
        layer_hits=_ints(_hits(experts)),
        layer_collisions=_ints(experts.collisions),
        admitted=None if totals.admitted is None else int(np.asarray(totals.admitted, np.int64).sum()),
        profile=None,  # whoever has the setting knows
        **_tier_metrics(level_bytes, totals, int((experts.fetched + experts.host).sum()), seconds if timed else None),
    )


def _tier_metrics(
    level_bytes: npt.NDArray[np.int64], totals: Totals, asked: int, seconds: npt.NDArray[np.float64] | None
) -> dict[str, Any]:
    """Gives what a host tier adds; without one, everything that is asked of host memory is there."""
    if totals.tier is None:
        none = None if seconds is None else 0.0
        return {"host_hits": asked, "stall_storage_s": none, "storage_utilisation": none}
    reads, ahead = np.asarray(totals.tier.reads, np.int64), np.asarray(totals.tier.reads_ahead, np.int64)
    found: dict[str, Any] = {
        "host_hits": asked - int(reads.sum()),
        "host_misses": int(reads.sum()),
        "storage_reads": int((reads + ahead).sum()),
        "host_evictions": int(np.asarray(totals.tier.evictions, np.int64).sum()),
        "bytes_storage": int(((reads + ahead) * level_bytes[-1]).sum()),
        "reads_ahead": int(ahead.sum()),
    }
    if totals.tier.early is not None:
        used, late, skipped = (int(np.asarray(count, np.int64).sum()) for count in totals.tier.early)
        found |= {"reads_ahead_used": used, "reads_ahead_wasted": int(ahead.sum()) - used}
        found |= {"reads_ahead_skipped": skipped, "host_hits_late": late}
    if seconds is None:
        return found
    both = np.asarray(totals.tier.seconds, np.float64).sum(axis=0)
    return found | {
        "stall_storage_s": float(both[STORAGE_S]),
        "storage_utilisation": _ratio(float(both[READ_S]), float(seconds[:, VISIT_S].sum())),
    }


def _storage_stall(totals: Totals) -> Any:
    """Gives the seconds of stall by storage, with the leading axes of the totals."""
    if totals.tier is None:
        return 0.0
    return np.asarray(totals.tier.seconds, np.float64)[..., STORAGE_S].sum(axis=-1)


def arrays_of(counted: Counted, level_bytes: npt.NDArray[np.int64], totals: Totals) -> dict[str, npt.NDArray[Any]]:
    """Gives some of `Metrics` of many timed cells at once: arrays with the leading axes of `totals` (numpy)."""
    sums = _sums(level_bytes, totals)
    seconds = np.asarray(totals.seconds, np.float64)  # [..., 2, 6]
    same = ("demand", "hits", "hits_late", "misses", "collisions", "loads")
    return {name: getattr(sums, name) for name in same} | {
        "link_bytes": sums.bytes_demand + sums.bytes_prefetch,
        "tpot_s": seconds[..., DECODE, VISIT_S] / max(counted.decodes * counted.acceptance_length, 1),
        "stall_s": seconds[..., [LATE_S, MISS_S, BUSY_S]].sum(axis=(-2, -1)) + _storage_stall(totals),
    }


class _Sums(NamedTuple):
    """Counts over all layers, int64 with the leading axes of the totals."""

    demand: Any
    hits: Any
    hits_late: Any
    misses: Any
    collisions: Any
    loads: Any
    bytes_demand: Any
    bytes_prefetch: Any


def _sums(level_bytes: npt.NDArray[np.int64], totals: Totals) -> _Sums:
    experts: Any = jax.tree.map(lambda x: np.asarray(x).sum(axis=-1, dtype=np.int64), totals.experts)
    fetched, ahead = np.asarray(totals.fetched_at, np.int64), np.asarray(totals.prefetched, np.int64)
    hits = _hits(experts)
    return _Sums(
        demand=experts.demand,
        hits=hits,
        hits_late=experts.late,
        misses=experts.demand - hits,
        collisions=experts.collisions,
        loads=fetched.sum(axis=(-2, -1)) + ahead.sum(axis=-1),
        bytes_demand=(fetched * level_bytes).sum(axis=(-2, -1)),
        bytes_prefetch=(ahead * level_bytes[-1]).sum(axis=-1),
    )


def _hits(experts: Any) -> Any:
    return experts.reused + experts.prefetch_hits + experts.late


def _ints(counts: npt.NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(int(c) for c in counts)
