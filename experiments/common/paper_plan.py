"""Which mixes of policies `experiments.paper` replays, and the columns of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from specmd_jax.replay.metrics import Metrics
from specmd_jax.report.columns import Column, Table
from specmd_jax.report.pages.paper.points import (
    EVICTIONS,
    MISS_BITS,
    MISS_RULES,
    MIXES,
    PREDICTORS,
    READING,
    READING_SOFTWARE_MS,
    SYSTEMS,
    Point,
)
from specmd_jax.report.pages.sweep.table import COLUMNS as SWEEP_COLUMNS
from specmd_jax.types import Trace

PREFETCHED = ("lru", "score", "least_stale", "least_stale_literal")
"""Evictions that are also replayed with the paper's prefetching."""

SELECTIONS: dict[str, dict[str, Any]] = {
    "-": {},
    "top-k": {"selection": "topk", "overfetch": 1.0},
    "top-k x1.5": {"selection": "topk", "overfetch": 1.5},
    "percentile 80": {"selection": "percentile", "percentile": 80.0},
}


NUMBERS = {"noisy": {"precision": 0.9, "recall": 0.9}}
"""Of predictors whose defaults are not meant."""


def arguments(point: Point) -> dict[str, Any]:
    """Fields of `specmd_jax.setting.Setting`."""
    policies = {name: getattr(point, name) for name in ("eviction", "prefetch", "miss", "routing")}
    return policies | SELECTIONS[point.selection] | {"numbers": NUMBERS.get(point.prefetch, {})}


def plan(trace: Trace, bits: Sequence[float], *, few: bool = False) -> list[Point]:
    """Gives every point to replay on `trace`, in order and once."""
    scores = {"ahead": trace.ahead is not None, "logits": trace.logits is not None}
    drop_in = [*SYSTEMS.values(), *(replace(p, eviction="least_stale") for p in SYSTEMS.values())]
    gate = PREDICTORS["gate, top-k"]
    if few:
        wanted = [Point(e, bits=(b,)) for e in ("lru", "least_stale") for b in bits]
        wanted += [replace(gate, eviction=e) for e in ("lru", "least_stale")]
        return list(dict.fromkeys(p.on(**scores) for p in wanted))
    predictors = list(PREDICTORS.values())
    if scores["ahead"]:
        predictors = [p for p in predictors if p.prefetch not in ("previous", "transition")]
    wanted = [Point(e) for e in EVICTIONS]
    wanted += [replace(gate, eviction=e) for e in PREFETCHED]
    wanted += [*predictors, replace(PREDICTORS["gate, percentile 80"], eviction="least_stale")]
    wanted = [replace(p, bits=(b,)) for p in wanted for b in bits]
    wanted += [Point(miss=rule, bits=MISS_BITS) for rule in MISS_RULES] if scores["logits"] else []
    wanted += [*drop_in, *MIXES.values()]
    wanted += [
        replace(READING, eviction=e, bits=(b,), software_ms=ms)
        for b in (4.0, 16.0)
        for e in ("least_stale", "lru")
        for ms in READING_SOFTWARE_MS
    ]
    return list(dict.fromkeys(p.on(**scores) for p in wanted))


KEY = ("trace", "eviction", "prefetch", "selection", "miss", "routing", "bits", "software_ms", "capacity_pct", "layer")

_MEANINGS = {
    "dropped": "misses that were skipped",
    "substituted": "misses replaced by a resident expert",
    "on_host": "misses run on the host",
    "rerouted": "demanded only because of the routing policy",
    "lost_mass": "share of the gate mass that was dropped or moved to a substitute (quality proxy)",
    "mean_bits": "mean precision of the experts that ran on the device (quality proxy)",
    "prefetch_precision": "share of the predicted experts that were needed",
    "prefetch_recall": "share of the demanded experts that had been predicted",
    "link_utilisation": "share of the time that the link copies",
    "host_utilisation": "share of the time that the host computes experts",
}

COLUMNS: dict[str, Column] = {
    "trace": Column("str", "recorded trace, or model whose shape the synthetic routing has"),
    "evidence": Column("str", "what was simulated on"),
    "repeat": Column("float", "share of a token's experts that the token before used at the same layer"),
    "eviction": Column("str", "eviction policy"),
    "prefetch": Column("str", "predictor"),
    "selection": Column("str", "how many of the predicted experts are asked for"),
    "miss": Column("str", "miss rule"),
    "routing": Column("str", "routing policy"),
    "bits": Column("str", "stored precisions, highest first"),
    "software_ms": Column("float", "time of software for each expert that runs, while the link is free"),
    "capacity_pct": Column("float", "cache size as a share of the bytes of all experts at 16 bits, in %"),
    "layer": Column("int", "layer that the counts are of; empty: the whole model"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_slots": Column("int", "cache size in experts at the highest stored precision"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    **{
        f.name: Column(SWEEP_COLUMNS[f.name].kind, _MEANINGS.get(f.name) or SWEEP_COLUMNS[f.name].meaning)
        for f in fields(Metrics)
        if f.name in SWEEP_COLUMNS  # no model of the paper's study reads storage
    },
}
TABLE = Table("paper", COLUMNS, KEY)
"""A row of one layer has only its demand, hits, misses and collisions."""
