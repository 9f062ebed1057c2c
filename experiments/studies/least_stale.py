"""The work of `experiments.least_stale`: the replays that its table lacks."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.least_stale import LeastStaleConfig
from experiments.common.bars import bar as bar_of
from specmd_jax.engines.curves import curves
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.table import replay_grid
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.least_stale.page import POLICIES, TABLE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.schedule.demand import pack
from specmd_jax.setting import Setting
from specmd_jax.trace import first_tokens
from specmd_jax.types import Trace


def replay_all(traces: dict[str, Trace], config: LeastStaleConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Computes the cells that the table in `out` lacks."""
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(t.expert_ids).tobytes() for t in traces.values())).hexdigest()
    total = len(traces) * (2 * len(POLICIES) + len(config.prefetch_evictions))
    with (
        ResultWriter(out, asdict(config), TABLE, overwrite, resume, digest) as writer,
        bar_of(total, "curve") as bar,
    ):
        for name, trace in traces.items():
            sizes = budgets(trace, config)
            if name == config.check_trace:
                sizes |= {slots * int(trace.expert_bytes.max()) for slots in config.check_slots}
            # with prefetch, few tokens are affordable: the same few without it are what they compare with
            for tokens, prefetch in (
                (config.tokens, "none"),
                (config.prefetch_tokens, "none"),
                (config.prefetch_tokens, config.prefetch),
            ):
                if not sys.stderr.isatty():
                    print(f"{name}: {tokens} tokens, prefetch {prefetch}", file=sys.stderr)
                replays = prepare(first_tokens(trace, min(tokens, trace.tokens)), phase="decode")
                packed = pack(replays.schedule)
                for eviction in POLICIES if prefetch == "none" else config.prefetch_evictions:
                    shared: Row = {"trace": name, "tokens": tokens, "prefetch": prefetch, "eviction": eviction}
                    bar.update()
                    if writer.has(shared | {"capacity_bytes": max(sizes)}):
                        continue
                    wanted = sorted(sizes)
                    if prefetch == "none":
                        counts = demand_only(replays, wanted, eviction, packed)
                    else:
                        counts = prefetched(replays, wanted, eviction, config)
                    for size, counted in zip(wanted, counts, strict=True):
                        writer.write(shared | described(trace, size) | counted)


def budgets(trace: Trace, config: LeastStaleConfig) -> set[int]:
    """Gives the budgets in bytes of ``config.cycles``, whole caches at most."""
    cycle = trace.top_k * int(trace.expert_bytes.sum())
    most = trace.experts * int(trace.expert_bytes.sum())
    return {min(most, int(c * cycle)) for c in config.cycles}


def described(trace: Trace, size: int) -> Row:
    every = int(trace.expert_bytes.sum())
    return {
        "capacity_bytes": size,
        "capacity_slots": size // int(trace.expert_bytes.max()),
        "capacity_pct": 100 * size / (trace.experts * every),
        "cycles": size / (trace.top_k * every),
    }


def demand_only(replays: Prepared, sizes: Sequence[int], eviction: str, packed: Any) -> Iterator[Row]:
    """Counts at each size without prefetch: exact, and much faster than a scan."""
    units = [int(replays.sizes.budget(size)) for size in sizes]
    for found in curves(replays.schedule, replays.sizes.units[-1], units, eviction, demand=packed):
        demand, misses = int(found.demand.sum()), int(found.misses.sum())
        yield {
            "demand": demand,
            "hits": demand - misses,
            "hits_late": 0,
            "misses": misses,
            "collisions": int(found.collisions.sum()),
            "loads": misses,
            "stall_s": None,
        }


def prefetched(replays: Prepared, sizes: Sequence[int], eviction: str, config: LeastStaleConfig) -> Iterator[Row]:
    """Counts at each size with prefetch on one contended link."""
    setting = Setting(eviction=eviction, prefetch=config.prefetch, hardware=config.hardware)
    grid = replay_grid(replays, setting.mix(replays.trace.top_k), sizes, [setting.machine], **setting.options)
    for (found,) in grid:
        names = ("demand", "hits", "hits_late", "misses", "collisions", "loads", "stall_s")
        yield {name: getattr(found, name) for name in names}
