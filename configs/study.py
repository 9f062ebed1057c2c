"""Settings of `experiments.study`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.host import HOST_OPTIONS, HostMemory
from configs.options import EVICTIONS, HARDWARE, PREFETCHES, TRACES, Settings, machine, option, parts


@dataclass(frozen=True)
class StudyConfig(Settings):
    """The cells: (eviction policies with the values of their numbers) x prefetch policies x capacities x links.

    Every field decides the table, so all of them go into its manifest.
    """

    trace: str = option("gpt-oss-20b", "routing to replay", names=TRACES, metavar="TRACE")
    tokens: int = option(150, "only the first N tokens; 0: all of them", least=0)
    evictions: tuple[str, ...] = option(
        ("lru", "lfu", "least_stale", "lfu_decay", "weighted"), "eviction policies to replay", names=EVICTIONS
    )
    prefetches: tuple[str, ...] = option(
        ("none", "transition"), "prefetch policies to replay", names=PREFETCHES, alias="prefetch"
    )
    values: int = option(8, "how many values of each policy's number", least=2)
    capacities: int = option(12, "how many capacities, from 5 to 80 % of all experts", least=2)
    links: int = option(8, "how many links, from 2 to 64 GB/s", least=2)
    hardware: str = option("pcie4-x16", "the machine, but for the link's rate", names=HARDWARE, check=machine)
    host: HostMemory = field(default_factory=HostMemory, metadata=parts(HOST_OPTIONS))

    def smoke(self) -> StudyConfig:
        """Gives the same study in seconds."""
        return replace(
            self, tokens=20, evictions=("lru", "lfu_decay"), prefetches=("none",), values=2, capacities=3, links=2
        )

    def check(self) -> None:
        """Raises `SpecmdError` for host memory that the machine does not go with."""
        self.host.check_with(self.hardware)


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
