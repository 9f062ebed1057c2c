"""Settings of `experiments.starts`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import EVICTIONS, SCOPES, TRACES, Settings, capacity, fixed, option


@dataclass(frozen=True)
class StartsConfig(Settings):
    """What is replayed. Every field decides the table, so all of them go into its manifest."""

    trace: str = option(
        "gpt-oss-20b", "routing of at least 2 requests: one half is the profile, the other is replayed", names=TRACES,
        metavar="TRACE",
    )  # fmt: skip
    tokens: int = option(2_000, "only the first N tokens of the replayed half; 0: all of them", least=0)
    capacities: tuple[str, ...] = option(
        ("10%", "25%", "50%", "75%"), "cache sizes, such as 25%,4GiB", metavar="A,B", check=capacity
    )
    scope: str = option("global", "global: one pool; layer: one pool per layer", names=SCOPES)
    reset_per_request: bool = option(False, "begin anew before each request")
    evictions: tuple[str, ...] = fixed(
        ("lru", "lfu_decay", "belady", "belady_bypass"), "policies that are compared", names=EVICTIONS
    )
    shares: tuple[float, ...] = fixed((0.25, 0.5, 0.75, 1.0), "shares of the cache that are pinned", above=0)

    def smoke(self) -> StartsConfig:
        """Gives the same study in seconds."""
        return replace(self, tokens=12, capacities=("25%", "50%"), evictions=("lru", "belady"), shares=(0.5, 1.0))
