"""Settings of `experiments.study`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StudyConfig:
    """The cells: (eviction policies with the values of their numbers) x prefetch x capacities x links.

    Every field decides the table, so all of them go into its manifest.
    """

    trace: str = "gpt-oss-20b"  # a bundled trace, or the path of a trace file
    tokens: int = 150  # only the first ones; 0: all
    evictions: tuple[str, ...] = ("lru", "lfu", "least_stale", "lfu_decay", "weighted")
    prefetch: tuple[str, ...] = ("none", "transition")
    values: int = 8  # of the number of each policy that has one in `RANGES`
    capacities: int = 12
    links: int = 8
    hardware: str = "pcie4-x16"  # everything but the link's rate

    def smoke(self) -> StudyConfig:
        """The same study in seconds."""
        return replace(
            self, tokens=20, evictions=("lru", "lfu_decay"), prefetch=("none",), values=2, capacities=3, links=2
        )


RANGES: dict[str, tuple[str, float, float]] = {
    # policy: its number, between what it is varied (CONTRACT.md section 3 has their meaning)
    "lfu_decay": ("decay", 0.5, 0.99),
    "weighted": ("recency", 0.0, 2.0),
    "slru": ("protected", 0.2, 0.95),
}
LEAST_PCT, MOST_PCT = 5.0, 80.0
"""Capacities, in % of all experts, evenly spaced in proportion."""
SLOWEST, FASTEST = 2e9, 64e9
"""Rates of the links, bytes/s, evenly spaced in proportion."""
STEP_CELLS = 65_536
"""About as many cells are replayed at once, and kept before the next ones; on a CPU a hundredth of them."""
