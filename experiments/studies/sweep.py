"""The work of `experiments.sweep`: the cells that a table lacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.sweep import LEAST_PCT, MARKS_PCT, SweepConfig
from experiments.common.bars import bar as bar_of
from specmd_jax import grid, sweep
from specmd_jax.api import GAP_BETWEEN
from specmd_jax.engines.devices import first_says
from specmd_jax.errors import SpecmdError
from specmd_jax.files import file_sha256
from specmd_jax.policies.eviction import EVICTION
from specmd_jax.report.columns import Row, Table
from specmd_jax.report.pages.sweep.counts import write_counts
from specmd_jax.report.pages.sweep.table import COUNTS, REUSE, TABLE, WITH_STORAGE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.specs.capacity import describe_capacity, parse_capacity
from specmd_jax.trace.bundled import is_bundled, load_named
from specmd_jax.trace.profile import as_profile
from specmd_jax.trace.select import uses_of
from specmd_jax.trace.stream import TraceFile, stretches, unpacked_bytes
from specmd_jax.trace.stream import open_trace as open_trace_file
from specmd_jax.types import Trace

REUSE_BINS = 12  # of reuse distances, the last one open
STREAM_FROM_BYTES = 1 << 30  # a file whose arrays take more is streamed


def run(
    trace: Trace | TraceFile,
    config: SweepConfig,
    out: Path,
    sha256: str,
    *,
    overwrite: bool,
    resume: bool,
    first: bool = True,
) -> None:
    """Computes the cells that the table in `out` lacks. Of several processes the `first` has the table."""
    head = trace.head if isinstance(trace, TraceFile) else trace
    capacities = plan(config.capacities, head, config.scope)
    cell: Row = {name: getattr(config, name) for name in ("scope", "contract", "phase", "batch", "miss")}
    cell["model"] = head.model
    wanted = [
        {"eviction": name, "hardware": kind, "capacity_bytes": size}
        | {column: how[column] for column in ("drafts", "acceptance")}
        for name in config.evictions
        for size in capacities
        for kind in config.hardware or (None,)
        for how in config.speculation
    ]
    if not first:
        for _ in missing_rows(trace, config, capacities, _lacking(wanted, first_says([False] * len(wanted)))):
            pass
        return
    with ResultWriter(out, asdict(config), table_of(config), overwrite, resume, sha256) as writer:
        lacking = _lacking(wanted, first_says([not writer.has(cell | own) for own in wanted]))
        try:
            with bar_of(len(wanted), "cell", writer.rows) as bar:
                for row in missing_rows(trace, config, capacities, lacking):
                    if writer.write(row):
                        bar.set_postfix_str(str(row["eviction"]), refresh=False)
                        bar.update()
        except KeyboardInterrupt:
            print(f"{writer.rows} of {len(wanted)} cells are in {out}; the same command continues", file=sys.stderr)
            raise
    write_counts(out / COUNTS, routing_counts(trace))
    write_counts(out / REUSE, reuse_counts(trace))


def _lacking(wanted: list[dict[str, Any]], flags: list[bool]) -> dict[str, list[int]]:
    """Gives the capacities of which an eviction policy lacks a cell."""
    found: dict[str, list[int]] = {}
    for own, missing in zip(wanted, flags, strict=True):
        size, sizes = own["capacity_bytes"], found.setdefault(own["eviction"], [])
        if missing and size not in sizes:
            sizes.append(size)
    return found


def missing_rows(
    trace: Trace | TraceFile, config: SweepConfig, capacities: dict[int, str], lacking: dict[str, list[int]]
) -> Iterator[Row]:
    """Gives the rows of the cells that are `lacking`, policies that lack the same capacities together.

    The policies that `gap_closed` is measured against run along, so that a continued table equals an uninterrupted one.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for eviction, sizes in lacking.items():
        if sizes:
            groups.setdefault(tuple(capacities[size] for size in sizes), []).append(eviction)
    begins = starts(config)  # may read a file
    for texts, evictions in groups.items():
        axes: dict[str, Any] = {
            "eviction": [name for name in config.evictions if name in evictions or name in GAP_BETWEEN],
            "capacity": list(texts),
            "hardware": list(config.hardware) or None,
            "scope": config.scope,
            "contract": config.contract,
            "batch": config.batch,
            "reset_per_request": config.reset_per_request,
            "phase": config.phase,
            "warmup_tokens": config.warmup_tokens,
            "context": config.context,
            "miss": config.miss,
            **begins,
            **config.host.fields,
        }
        settings = [setting for how in config.speculation for setting in grid(**axes, **how)]
        for row in sweep(trace, settings):
            yield {name: row[name] for name in table_of(config).columns}


def table_of(config: SweepConfig) -> Table:
    """Gives the table of a sweep: with columns for storage where it is read."""
    return TABLE if config.host.host_capacity is None else WITH_STORAGE


def starts(config: SweepConfig) -> dict[str, Any]:
    """Gives what the cache begins with and what it lets in, as fields of a `Setting`."""
    numbers = {"limited": {"copies": config.copies}, "margin": {"gain": config.gain}}.get(config.admission, {})
    return {
        "warm_start": as_profile(config.warm_start) if config.warm_start else None,
        "pin_share": config.pin_share,
        "pin_profile": as_profile(config.pin_profile) if config.pin_profile else None,
        "admission": config.admission,
        **numbers,
    }


def open_trace(name: str, tokens: int, stream: bool, batch: int) -> tuple[Trace | TraceFile, str]:
    """Opens a bundled trace or a trace file, only its first `tokens` unless 0, and the SHA-256 of the file."""
    if is_bundled(name):
        if stream:
            raise SpecmdError(f"--stream: {name} is a bundled trace, expected a trace file")
    elif stream or (batch == 1 and unpacked_bytes(name) > STREAM_FROM_BYTES):
        return open_trace_file(name, tokens or None), file_sha256(name)
    return load_named(name, tokens or None)


def resolve(config: SweepConfig) -> SweepConfig:
    """Gives `config` with its policies in the order of their table: equal settings give equal manifests."""
    return replace(
        config,
        trace=Path(config.trace).name,
        evictions=tuple(name for name in EVICTION if name in config.evictions or not config.evictions),
    )


def plan(wishes: Sequence[str], trace: Trace, scope: str) -> dict[int, str]:
    """Lists capacities, rising: total bytes -> what `sweep` is asked. Bare numbers become evenly spaced capacities."""
    model = {"expert_bytes": trace.expert_bytes, "experts": trace.experts, "top_k": trace.top_k}
    texts = [text for wish in wishes for text in (evenly(int(wish), trace, scope) if wish.isdigit() else [wish])]
    found: dict[int, str] = {}
    for text in texts:
        budget = parse_capacity(text, scope=scope, **model)
        found.setdefault(int(describe_capacity(budget, **model)["bytes"]), text)
    return dict(sorted(found.items()))


def evenly(points: int, trace: Trace, scope: str) -> list[str]:
    """Gives `points` whole slot counts from `LEAST_PCT` to everything, joined by `MARKS_PCT` and one token cycle.

    In the layer scope they are slots of every layer. Experts of different sizes have no common slot: shares instead.
    """
    if scope == "global" and len(set(trace.expert_bytes.tolist())) > 1:
        shares = np.linspace(LEAST_PCT, 100, points)
        return [*(f"{share:.6f}%" for share in shares), *(f"{mark}%" for mark in MARKS_PCT), "1 cycles"]
    unit, layers = ("slots/layer", 1) if scope == "layer" else ("slots", trace.layers)
    most = trace.experts * layers
    counts = {round(count) for count in np.linspace(max(1, most * LEAST_PCT / 100), most, points).tolist()}
    marks = {most * mark // 100 for mark in MARKS_PCT} | {min(trace.top_k, trace.experts) * layers}
    return [f"{count} {unit}" for count in sorted(counts | marks) if count > 0]


def routing_counts(trace: Trace | TraceFile) -> list[list[int]]:
    """Gives [L, E] tokens routed to each expert."""
    head, parts = (trace.head, stretches(trace, arrays=())) if isinstance(trace, TraceFile) else (trace, [trace])
    counts = np.zeros((head.layers, head.experts), np.int64)
    for part in parts:
        counts += uses_of(part.expert_ids, head.experts)
    return counts.tolist()


def reuse_counts(trace: Trace | TraceFile) -> list[list[int]]:
    """Gives [L, bins] uses by how many tokens ago the request used the same expert last: 1, 2, 3 to 4, 5 to 8 and so
    on, and in the last bin those that are its first.
    """
    head, parts = (trace.head, stretches(trace, arrays=())) if isinstance(trace, TraceFile) else (trace, [trace])
    counts = np.zeros((head.layers, REUSE_BINS + 1), np.int64)
    for part in parts:
        request = np.repeat(np.arange(part.requests), part.lengths)
        for layer in range(head.layers):
            ids = part.expert_ids[:, layer].astype(np.int64)
            token, place = np.nonzero(ids >= 0)
            who = request[token] * head.experts + ids[token, place]
            order = np.lexsort((token, who))
            first = np.diff(who[order], prepend=-1) != 0
            apart = np.diff(token[order], prepend=0)
            bins = np.minimum(np.ceil(np.log2(np.maximum(apart, 1))).astype(np.int64), REUSE_BINS - 1)
            counts[layer] += np.bincount(np.where(first, REUSE_BINS, bins), minlength=REUSE_BINS + 1)
    return counts.tolist()
