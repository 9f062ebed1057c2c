"""The work of `experiments.starts`: cells that differ in how their cache begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from configs.starts import StartsConfig
from specmd_jax import Setting, first_tokens, profile_of, select_requests, sweep
from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.starts import TABLE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.trace.bundled import load_named
from specmd_jax.trace.profile import Profile
from specmd_jax.types import Trace

ADMISSIONS = {"lru": "limited", "lfu_decay": "compete"}
"""Policies that are also replayed with pins, and with an admission that changes something; the others are bounds."""


def run(config: StartsConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Computes the cells that the table in `out` lacks."""
    trace, digest = load_named(config.trace)
    profile, replayed = halves(trace, config)
    config = replace(config, trace=Path(config.trace).name)
    with ResultWriter(out, asdict(config), TABLE, overwrite, resume, digest) as writer:
        wanted = [cell for cell in cells(profile, config) if not writer.has(key_of(cell, replayed))]
        if wanted:
            for row in rows_of(replayed, wanted):
                writer.write(row)


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
