"""Settings of `experiments.least_stale`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LeastStaleConfig:
    """What is replayed. Every field decides the table, so all of them go into its manifest."""

    traces: tuple[str, ...] = ("gpt-oss-20b", "bigmoe-qwen3-30b-a3b", "bigmoe-gpt-oss-120b")
    tokens: int = 8000  # of each trace, without prefetch
    prefetch_tokens: int = 300  # of each trace, with prefetch
    prefetch: str = "previous"
    prefetch_evictions: tuple[str, ...] = (
        "lru",
        "least_stale",
        "least_stale_left_first",
        "least_stale_literal",
        "least_stale_recency",
    )
    hardware: str = "pcie4-x16"  # a prefetch copy starts only when the link is free
    cycles: tuple[float, ...] = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
    check_trace: str = "gpt-oss-20b"
    check_slots: tuple[int, ...] = (38, 77, 120, 162, 324, 649)

    def smoke(self) -> LeastStaleConfig:
        """The same study in seconds."""
        few = ("lru", "least_stale")
        return replace(
            self,
            traces=("bigmoe-gpt-oss-120b",),
            tokens=149,
            prefetch_tokens=100,
            prefetch_evictions=few,
            cycles=(0.5, 1.0, 2.0),
        )
