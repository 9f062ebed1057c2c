"""Demand-only curves beside libCacheSim and moe-policylang, and alone."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from configs.benchmark import BenchmarkConfig
from experiments.benchmarks.simulator.rows import row
from experiments.benchmarks.simulator.workload import olmoe, slots_of, slots_range, traces
from experiments.common.cluster import cores
from experiments.common.subprocesses import workers
from experiments.common.timing import median_s
from specmd_jax.engines.curves import curves
from specmd_jax.engines.prepared import prepare
from specmd_jax.report.columns import Row
from specmd_jax.schedule.demand import pack
from specmd_jax.schedule.export import write_oracle_general
from specmd_jax.types import Schedule


def against_libcachesim(config: BenchmarkConfig) -> Iterator[Row]:
    """Times all capacities together; both sides use all cores, and the rival's processes start before the clock."""
    installed = util.find_spec("libcachesim") is not None
    if not installed:
        print("libcachesim is not installed (pip install libcachesim): only our side is measured")
    for name, trace in traces(config).items():
        schedule = prepare(trace, contract="sequential").schedule
        demand, units, slots = pack(schedule), np.ones(trace.layers, np.int64), slots_of(trace, config.capacities)
        where: dict[str, Any] = {"contract": "sequential", "repeats": config.repeats, **slots_range(trace, slots)}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.oracleGeneral.bin"
            write_oracle_general(path, flat_accesses(schedule)[0])
            parts = [slots[i :: cores()] for i in range(min(cores(), len(slots)))]
            rivals: dict[str, list[tuple[float, list[dict[str, Any]]]]] = {}
            # the rival's frequency starts anew when an object comes back, as `lfu_resident` counts
            for policy, ours in (("lru", "lru"), ("lfu", "lfu"), ("lfu", "lfu_resident"), ("belady", "belady")):
                mine = partial(curves, schedule, units, slots, ours, demand=demand)
                title = f"{ours} at {len(slots)} capacities, {name}"
                hits = [int(curve.hits.sum()) for curve in mine()]
                mine_s = median_s(mine, config.repeats)
                yield row(f"{title}: specmd-jax", mine_s, "s", **where)
                if not installed:
                    continue
                job = {"job": "libcachesim", "policy": policy, "trace": str(path), "requests": demand.flat.size}
                if policy not in rivals:
                    rivals[policy] = [
                        workers([{**job, "sizes": part} for part in parts]) for _ in range(config.repeats)
                    ]
                runs = rivals[policy]
                rival_s = statistics.median(took for took, _ in runs)
                theirs = {
                    size: found
                    for part, result in zip(parts, runs[0][1], strict=True)
                    for size, found in zip(part, result["hits"], strict=True)
                }
                gaps = [abs(theirs[size] - found) for size, found in zip(slots, hits, strict=True)]
                yield row(f"{title}: libcachesim {policy}", rival_s, "s", note=f"{len(parts)} processes", **where)
                yield row(f"{title}: libcachesim / specmd-jax", rival_s / mine_s, "x", **where)
                counts = {**where, "repeats": None, "note": _difference(ours, gaps, sum(hits))}
                differing = sum(gap > 0 for gap in gaps)
                yield row(f"{title}: capacities whose hits differ", differing, f"of {len(slots)}", "counted", **counts)


def _difference(ours: str, gaps: Sequence[int], hits: int) -> str | None:
    if not any(gaps):
        return f"{hits} hits over all capacities, the same on both sides"
    why = {
        "lfu": "our lfu counts over the whole history, libcachesim's from the last load",
        "lfu_resident": "experts of the same count leave in another order",
    }.get(ours, "not expected")
    return f"{sum(gaps) / max(hits, 1):.2%} of all hits, {max(gaps)} at most: {why}"


def against_policylang(config: BenchmarkConfig) -> Iterator[Row]:
    """Measures nanoseconds per access and capacity, one core each: a rival's cache has one capacity, our curves all."""
    if util.find_spec("moe_policylang") is None:
        print("moe-policylang is not installed (pip install moe-policylang): section left out")
        return
    for name, trace in traces(config).items():
        schedule = prepare(trace, contract="sequential").schedule
        demand, units, all_slots = pack(schedule), np.ones(trace.layers, np.int64), slots_of(trace, config.capacities)
        slots = max(1, round(trace.layers * trace.experts * config.rival_slots_pct / 100))
        some = slots_first(schedule, config.rival_accesses)
        flat = pack(some).flat
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "accesses.npy"
            np.save(path, flat)
            for policy, ours in (("lru", "lru"), ("lfu", "lfu_resident")):
                where: dict[str, Any] = {"contract": "sequential", "repeats": config.repeats}
                job = {"job": "policylang", "policy": policy, "accesses": str(path), "slots": slots}
                runs = [workers([job]) for _ in range(config.repeats)]
                rival_ns = statistics.median(took for took, _ in runs) / flat.size * 1e9
                at_one = slots_range(trace, [slots])
                yield row(f"moe-policylang {policy}, {name}", rival_ns, "ns an access", **at_one, **where)
                for engine, sizes in (
                    (f"{ours} at {len(all_slots)} capacities", all_slots),
                    (f"{ours} alone", [slots]),
                ):
                    mine = partial(curves, schedule, units, sizes, ours, demand=demand)
                    # the curves of lru are one thread's work; those of lfu_resident are dealt to all cores
                    mine_ns = median_s(mine, config.repeats) / demand.flat.size / len(sizes) * 1e9
                    size = slots_range(trace, sizes)
                    yield row(f"specmd-jax {engine}, {name}", mine_ns, "ns an access and capacity", **size, **where)
                    yield row(f"moe-policylang / specmd-jax {engine}, {name}", rival_ns / mine_ns, "x", **size, **where)
                hits = int(curves(some, units, [slots], ours)[0].hits.sum())
                gap = abs(hits - runs[0][1][0]["hits"][0])
                why = f"{hits} hits on both sides" if gap == 0 else "experts of the same count leave in another order"
                yield row(f"{policy}, {name}: difference in hits", gap, f"of {hits}", "counted", note=why,
                           **at_one, **{**where, "repeats": None})  # fmt: skip


def one_pass(config: BenchmarkConfig) -> Iterator[Row]:
    """Times the demand-only curves at every capacity and some decays: one pass per decay, on the host's processor."""
    trace = olmoe(config.synthetic_tokens)
    replays = prepare(trace)
    slots, decays = slots_of(trace, config.curve_capacities), np.linspace(0.5, 0.99, config.curve_decays).tolist()
    demand, units = int(replays.schedule.demanded.sum()), np.ones(trace.layers, np.int64)
    where: dict[str, Any] = {"contract": "event", "repeats": config.repeats, **slots_range(trace, slots)}

    def draw(policy: str, numbers: dict[str, float]) -> None:
        curves(replays.schedule, units, slots, policy, numbers, demand=replays.demand)

    def grid() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(lambda decay: draw("lfu_decay", {"decay": decay}), decays))

    alone_s = median_s(lambda: draw("lru", {}), config.repeats)
    title = f"lru at {len(slots)} capacities, one pass"
    yield row(title, demand * len(slots) / alone_s / 1e6, "M config-accesses/s", **where)
    grid_s, cells = median_s(grid, config.repeats), len(slots) * len(decays)
    title = f"lfu_decay at {len(slots)} capacities x {len(decays)} decays, {len(decays)} passes"
    yield row(title, demand * cells / grid_s / 1e6, "M config-accesses/s", **where)


def flat_accesses(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Lists a sequential schedule's flat ids in order, and the index of the next access to the same one (or NEVER)."""
    demand = pack(schedule)
    assert (np.diff(demand.start) == 1).all()
    return demand.flat, demand.next_use


def slots_first(schedule: Schedule, visits: int) -> Schedule:
    """Gives the first visits of a schedule."""
    count = min(visits, schedule.visits)
    names = ("layer", "pass_id", "phase", "request", "tokens", "clock", "starts_pass", "ends_layer", "reset", "counted",
             "count", "mass", "rank", "next_use", "by_mass")  # fmt: skip
    return replace(schedule, **{name: getattr(schedule, name)[:count] for name in names})
