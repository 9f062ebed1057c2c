"""Settings of `experiments.routing`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import EVICTIONS, PREFETCHES, SCOPES, TRACES, UNITS, Settings, capacity, fixed, option
from specmd_jax.reference import REFERENCE


@dataclass(frozen=True)
class RoutingConfig(Settings):
    """What is counted. Every field decides the table, so all of them go into its manifest."""

    traces: tuple[str, ...] = option(
        (REFERENCE, "gpt-oss-20b", "bigmoe-qwen3-30b-a3b", "bigmoe-gpt-oss-120b"),
        "routing to describe; the first is held against the others", names=TRACES, metavar="A,B",
    )  # fmt: skip
    texts: int = option(
        8, f"texts of each domain that {REFERENCE} reads for this; 0: what is bundled of it", least=0, below=9
    )
    tokens: int = option(128, "decoded tokens of each request, so that traces are alike; 0: all of them", least=0)
    unit: str = option("dataset", "what a request's domain is", names=UNITS)
    capacities: tuple[str, ...] = option(
        ("10%", "25%", "50%", "2 cycles"), "cache sizes, such as 25%,4GiB", metavar="A,B", check=capacity
    )
    scope: str = option("global", "global: one pool; layer: one pool per layer", names=SCOPES)
    evictions: tuple[str, ...] = fixed(
        ("lru", "belady", "belady_bypass", "learned", "adaptive", "online", "weighted", "lfu_decay", "lfu", "lfru",
         "slru", "fifo", "least_stale", "fld", "score", "random"),
        "policies, lru and belady among them: the ends of the gap", names=EVICTIONS,
    )  # fmt: skip
    predictors: tuple[str, ...] = fixed(
        ("previous", "popular", "transition", "learned", "adaptive", "online", "gate_ahead"),
        "prefetchers; gate_ahead where a trace has its scores", names=PREFETCHES,
    )  # fmt: skip
    counts: tuple[float, ...] = fixed((1.0, 2.0), "experts predicted for a layer, in units of K", above=0)
    quantiles: tuple[float, ...] = fixed((0.1, 0.25, 0.5, 0.75, 0.9), "of reuse distances", least=0, below=1)
    reaches: tuple[float, ...] = fixed(
        (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1), "reuse distances, in shares of a layer's experts",
        least=0,
    )  # fmt: skip
    lags: tuple[int, ...] = fixed((1, 2, 4, 8, 16, 32), "tokens between the two whose experts are compared", least=1)
    window: int = fixed(16, "tokens in a row whose use is looked at", least=1)

    def smoke(self) -> RoutingConfig:
        """Gives the same study in seconds."""
        return replace(
            self, traces=(REFERENCE, "bigmoe-gpt-oss-120b"), texts=0, tokens=24, capacities=("25%",),
            evictions=("lru", "belady", "lfu_decay"), predictors=("previous", "transition", "gate_ahead"), lags=(1, 4),
            window=8,
        )  # fmt: skip
