"""Which mixes of policies `experiments.paper` replays, and the columns of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from specmd_jax.policies import NEEDS_LOGITS
from specmd_jax.replay.metrics import Metrics
from specmd_jax.report.table import SWEEP_COLUMNS, Column, Row
from specmd_jax.types import Trace

SYNTHETIC, RECORDED = "simulated on synthetic routing", "simulated on recorded routing"

EVICTIONS = ("lru", "score", "least_stale", "least_stale_literal", "lfu", "fld", "belady")
PREFETCHED = ("lru", "score", "least_stale", "least_stale_literal")
"""Evictions that are also replayed with the paper's prefetching."""

SELECTIONS: dict[str, dict[str, Any]] = {
    "-": {},
    "top-k": {"selection": "topk", "overfetch": 1.0},
    "top-k x1.5": {"selection": "topk", "overfetch": 1.5},
    "percentile 80": {"selection": "percentile", "percentile": 80.0},
}


@dataclass(frozen=True)
class Point:
    """One mix of policies and the precisions that experts are stored at."""

    eviction: str = "lru"
    prefetch: str = "none"
    selection: str = "-"
    miss: str = "fetch"
    routing: str = "standard"
    bits: tuple[float, ...] = (4.0,)

    def columns(self) -> Row:
        """How the point stands in the table."""
        bits = ":".join(f"{b:g}" for b in reversed(self.bits))
        names = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "bits"}
        return {**names, "bits": bits}

    def arguments(self) -> dict[str, Any]:
        """Arguments of `specmd_jax.api.make_mix`."""
        policies = {name: getattr(self, name) for name in ("eviction", "prefetch", "miss", "routing")}
        return policies | SELECTIONS[self.selection]

    @property
    def needs_logits(self) -> bool:
        return self.routing != "standard" or self.miss in NEEDS_LOGITS

    def on(self, *, ahead: bool, logits: bool) -> Point:
        """This point on a trace that may lack scores: `previous` for the gate-ahead predictor, no rule on logits."""
        point = self
        if self.prefetch == "gate_ahead" and not ahead:
            point = replace(point, prefetch="previous", selection="top-k")
        if not logits and self.needs_logits:
            point = replace(point, routing="standard", miss="fetch" if self.miss in NEEDS_LOGITS else self.miss)
        return point


SYSTEMS = {
    "Eliseev": Point("lru", "gate_ahead", "top-k"),
    "Zhu": Point("score", "gate_ahead", "percentile 80", "substitute"),
    "HOBBIT": Point("lhu", "gate_ahead", "top-k", "cascade", bits=(2.0, 4.0)),
    "MixtureCache": Point("lru", routing="cache_aware"),
}
"""The four systems that Least-Stale is dropped into. Each stores its experts at 4 bits; the cascade also at 2."""

MIXES = {
    "baseline": Point(bits=(8.0,)),
    "#1": SYSTEMS["Eliseev"],
    "#2": SYSTEMS["Zhu"],
    "#3": SYSTEMS["HOBBIT"],
    "#4": SYSTEMS["MixtureCache"],
    "#5": Point("least_stale", "gate_ahead", "percentile 80"),
}

PREDICTORS = {
    "none": Point(),
    "gate, top-k": Point(prefetch="gate_ahead", selection="top-k"),
    "gate, top-k x1.5": Point(prefetch="gate_ahead", selection="top-k x1.5"),
    "gate, percentile 80": Point(prefetch="gate_ahead", selection="percentile 80"),
    "previous token": Point(prefetch="previous", selection="top-k"),
    "transition": Point(prefetch="transition", selection="top-k"),
    "perfect": Point(prefetch="perfect", selection="top-k"),
    "shuffled": Point(prefetch="shuffled", selection="top-k"),
}

MISS_RULES = ("fetch", "fetch_lowest_bit", "fetch_priority", "cascade", "drop", "substitute", "cpu")
MISS_BITS = (4.0, 8.0)


def plan(trace: Trace, bits: Sequence[float], *, few: bool = False) -> list[Point]:
    """Every point to replay on `trace`, in order and once."""
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
    return list(dict.fromkeys(p.on(**scores) for p in wanted))


KEY = ("trace", "eviction", "prefetch", "selection", "miss", "routing", "bits", "capacity_pct", "layer")

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
    "capacity_pct": Column("float", "cache size as a share of the bytes of all experts at 16 bits, in %"),
    "layer": Column("int", "layer that the counts are of; empty: the whole model"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_slots": Column("int", "cache size in experts at the highest stored precision"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    **{
        f.name: Column("int" if f.type == "int" else "float", _MEANINGS.get(f.name) or SWEEP_COLUMNS[f.name].meaning)
        for f in fields(Metrics)
        if not f.name.startswith("layer_")
    },
}
"""Columns of the table; a row of one layer has only its demand, hits, misses and collisions."""
