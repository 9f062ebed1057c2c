"""The mixes of policies that `experiments.paper` replays, by the names that its table and page give them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from specmd_jax.report.columns import Row

SYNTHETIC, RECORDED = "simulated on synthetic routing", "simulated on recorded routing"

EVICTIONS = ("lru", "score", "least_stale", "least_stale_literal", "lfu", "fld", "belady")
ON_LOGITS = ("substitute",)
"""Miss rules that look at the router's logits, which recorded routing lacks."""


@dataclass(frozen=True)
class Point:
    """One mix of policies and the precisions that experts are stored at."""

    eviction: str = "lru"
    prefetch: str = "none"
    selection: str = "-"
    miss: str = "fetch"
    routing: str = "standard"
    bits: tuple[float, ...] = (4.0,)
    software_ms: float = 0.0  # of each expert that runs; the link is free meanwhile

    def columns(self) -> Row:
        """Says how the point stands in the table."""
        bits = ":".join(f"{b:g}" for b in reversed(self.bits))
        names = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in ("bits", "software_ms")}
        return {**names, "bits": bits, "software_ms": self.software_ms}

    @property
    def needs_logits(self) -> bool:
        return self.routing != "standard" or self.miss in ON_LOGITS

    def on(self, *, ahead: bool, logits: bool) -> Point:
        """This point on a trace that may lack scores: `previous` for the gate-ahead predictor, no rule on logits."""
        point = self
        if self.prefetch == "gate_ahead" and not ahead:
            point = replace(point, prefetch="previous", selection="top-k")
        if not logits and self.needs_logits:
            point = replace(point, routing="standard", miss="fetch" if self.miss in ON_LOGITS else self.miss)
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

READING = Point(prefetch="noisy", selection="top-k x1.5")
"""Of the paper's claim on hits at 5 %: a predictor whose precision and recall are 0.9, as a gate's may be."""
READING_SOFTWARE_MS = (0.0, 1.0, 2.4)
"""None, and the ends of the range that the paper's times contain for each expert."""

MISS_RULES = ("fetch", "fetch_lowest_bit", "fetch_priority", "cascade", "drop", "substitute", "cpu")
MISS_BITS = (4.0, 8.0)
