"""Settings of `experiments.least_stale`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import BUNDLED, EVICTIONS, HARDWARE, PREFETCHES, Settings, fixed, machine, option


@dataclass(frozen=True)
class LeastStaleConfig(Settings):
    """What is replayed. Every field decides the table, so all of them go into its manifest."""

    traces: tuple[str, ...] = option(
        ("gpt-oss-20b", "bigmoe-qwen3-30b-a3b", "bigmoe-gpt-oss-120b"), "recorded routing to replay", names=BUNDLED
    )
    tokens: int = option(8000, "only the first N tokens of a trace, without prefetch", least=1)
    prefetch_tokens: int = option(300, "only the first N tokens of a trace, with prefetch", least=1)
    prefetch: str = fixed("previous", "predictor of the replays with prefetch", names=PREFETCHES)
    prefetch_evictions: tuple[str, ...] = fixed(
        ("lru", "least_stale", "least_stale_left_first", "least_stale_literal", "least_stale_recency"),
        "eviction policies that are replayed with prefetch, too",
        names=EVICTIONS,
    )
    hardware: str = fixed(
        "pcie4-x16", "a prefetch copy starts only when its link is free", names=HARDWARE, check=machine
    )
    cycles: tuple[float, ...] = fixed(
        (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0),
        "cache sizes in token cycles",
        above=0,
    )
    check_trace: str = fixed("gpt-oss-20b", "the trace that `CHECK` is of", names=BUNDLED)
    check_slots: tuple[int, ...] = fixed((38, 77, 120, 162, 324, 649), "the cache sizes that `CHECK` has", least=1)

    def smoke(self) -> LeastStaleConfig:
        """Gives the same study in seconds."""
        few = ("lru", "least_stale")
        return replace(
            self,
            traces=("bigmoe-gpt-oss-120b",),
            tokens=149,
            prefetch_tokens=100,
            prefetch_evictions=few,
            cycles=(0.5, 1.0, 2.0),
        )
