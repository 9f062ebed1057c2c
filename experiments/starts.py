"""What is a profile worth? Warm starts, pinned experts and admission against plain recency, on requests it never saw.

    python -m experiments.starts                                  # gpt-oss-20b at 10 to 75 %
    python -m experiments.starts --smoke                          # seconds: see that it works
    python -m experiments.starts --reset-per-request              # a cache of its own for each request
    python -m experiments.starts --trace mine.npz --scope layer --tokens 0

Every other request of the trace is counted: that is the profile. The rest is replayed by one cache that is never
emptied, or that begins anew before each request, without prefetch and without seconds. Rows differ in how the cache
begins (empty, or with the profile's most used experts), in how much of it the profile pins for good (1: static, nothing
is ever exchanged), and in which demand copies may stay. Bounds that know the future stand beside them, of caches that
begin empty and of warm ones.

Writes rows.csv, manifest.json, starts.md and starts.html (self-contained) to results/starts; the sentences of the page
follow from the rows by its rules. An interrupted run keeps its rows; the same command continues it. About 3 minutes on
2 idle cores. Expected at 50 %: misses of lru 9.02 %, warm-started 8.92, a quarter of it pinned 9.37, static 19.89.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from configs.starts import StartsConfig
from experiments.common.cluster import split_cpu
from experiments.common.command_line import main_guard, parser, results_folder
from experiments.common.options import options_of, settings_of
from specmd_jax import Setting, first_tokens, profile_of, select_requests, sweep
from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.starts import TABLE, draw
from specmd_jax.report.writer import ResultWriter
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.trace.bundled import load_named
from specmd_jax.trace.profile import Profile
from specmd_jax.types import Trace

ADMISSIONS = {"lru": "limited", "lfu_decay": "compete"}
"""Policies that are also replayed with pins, and with an admission that changes something; the others are bounds."""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "starts", resume=True)
    options_of(options, StartsConfig())
    args = options.parse_args(argv)
    config = settings_of(args, StartsConfig())
    split_cpu()
    out = results_folder(options, args)
    trace, digest = load_named(config.trace)
    profile, replayed = halves(trace, config)
    config = replace(config, trace=Path(config.trace).name)
    with ResultWriter(out, asdict(config), TABLE, args.overwrite, args.resume, digest) as writer:
        wanted = [cell for cell in cells(profile, config) if not writer.has(key_of(cell, replayed))]
        if wanted:
            for row in rows_of(replayed, wanted):
                writer.write(row)
    print(draw(out))


def halves(trace: Trace, config: StartsConfig) -> tuple[Profile, Trace]:
    """Gives the profile of every other request, from the second on, and the rest, cut as the settings say."""
    if trace.requests < 2:
        raise SpecmdError(
            f"{config.trace} has one request, expected at least 2: a profile of others and what it serves"
        )
    others = select_requests(trace, np.arange(1, trace.requests, 2))
    mine = select_requests(trace, np.arange(0, trace.requests, 2))
    return profile_of(others), first_tokens(mine, config.tokens) if config.tokens else mine


def cells(profile: Profile, config: StartsConfig) -> Iterator[Setting]:
    """Gives the settings that are compared."""
    base = Setting(hardware=None, scope=config.scope, reset_per_request=config.reset_per_request)
    for size in config.capacities:
        at = base.replace(capacity=size)
        for eviction in config.evictions:
            yield at.replace(eviction=eviction)
            yield at.replace(eviction=eviction, warm_start=profile)
            if eviction not in ADMISSIONS:
                continue
            yield at.replace(eviction=eviction, admission=ADMISSIONS[eviction])
            for share in config.shares:
                if share < 1 or eviction == "lru":  # all of it pinned leaves nothing to a policy
                    yield at.replace(eviction=eviction, pin_share=share, pin_profile=profile)


def key_of(cell: Setting, trace: Trace) -> Row:
    """Gives what tells a row from others."""
    size = describe_capacity(
        cell.budget(trace), expert_bytes=trace.expert_bytes, experts=trace.experts, top_k=trace.top_k
    )
    return {
        "eviction": str(cell.eviction),
        "start": "cold" if cell.warm_start is None else "warm",
        "pin_share": float(cell.pin_share),
        "admission": str(cell.admission),
        "capacity_bytes": int(size["bytes"]),
    }


def rows_of(trace: Trace, wanted: Sequence[Setting]) -> Iterator[Row]:
    """Replays the cells, and gives a row for each."""
    for found in sweep(trace, wanted):
        own = {"start": "cold" if found["warm_start"] is None else "warm", "miss_pct": 100 * (1 - found["hit_rate"])}
        yield {name: own.get(name, found.get(name)) for name in TABLE.columns}


if __name__ == "__main__":
    main_guard(main)
