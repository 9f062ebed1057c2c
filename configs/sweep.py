"""Settings of `experiments.sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.host import HOST_OPTIONS, HostMemory
from configs.options import (
    CONTRACTS,
    EVICTIONS,
    HARDWARE,
    PHASES,
    SCOPES,
    TRACES,
    Settings,
    capacity,
    machine,
    option,
    parts,
)
from specmd_jax.errors import SpecmdError


def capacity_or_count(text: str) -> None:
    """Raises `SpecmdError` for what is neither a capacity nor how many of them."""
    if not text.isdigit():
        capacity(text)
    elif int(text) < 2:
        raise SpecmdError(f"capacities is {text}, expected at least 2 evenly spaced capacities")


@dataclass(frozen=True)
class SweepConfig(Settings):
    """What a sweep replays. Every field decides the table, so all of them go into its manifest."""

    trace: str = option("gpt-oss-20b", "routing to replay", names=TRACES, metavar="TRACE")
    tokens: int = option(8_000, "only the first N tokens; 0: all of them", least=0)
    evictions: tuple[str, ...] = option((), "eviction policies to replay", names=EVICTIONS, shown="all")
    capacities: tuple[str, ...] = option(
        ("200",),
        "cache sizes, such as 5%,4GiB; a bare number asks for that many, evenly spaced",
        metavar="N|A,B",
        check=capacity_or_count,
    )
    hardware: tuple[str, ...] = option(
        (), "give times on these machines, too", names=HARDWARE, check=machine, shown="none"
    )
    scope: str = option("global", "global: one pool; layer: one pool per layer", names=SCOPES)
    contract: str = option(
        "event",
        "event: a layer's experts are asked for together; sequential: one after another; sequential-id: by id",
        names=CONTRACTS,
    )
    batch: int = option(1, "requests decoded together", least=1)
    phase: str = option("all", "the passes that count", names=PHASES)
    reset_per_request: bool = option(False, "empty the cache before each request")
    warmup_tokens: int = option(0, "leave the first N tokens out of the counts", least=0)
    context: int = option(0, "tokens that each request attends to while it decodes; 0: attention is free", least=0)
    host: HostMemory = field(default_factory=HostMemory, metadata=parts(HOST_OPTIONS))

    def smoke(self) -> SweepConfig:
        """Gives the same study in seconds: few tokens, policies and capacities."""
        return replace(
            self, tokens=60, evictions=("lru", "lfu", "least_stale", "belady", "belady_bypass"), capacities=("6",)
        )

    def check(self) -> None:
        """Raises `SpecmdError` for settings that do not go together."""
        from specmd_jax.schedule.build import check_options  # brings JAX

        check_options(self.batch, None, self.contract, self.reset_per_request, self.phase, self.warmup_tokens)
        for name in self.hardware or (None,):
            self.host.check_with(name)


MARKS_PCT = (5, 10, 25, 50)
"""Capacities in % of all experts that evenly spaced ones are joined by, besides one token cycle."""
LEAST_PCT = 1
"""Where evenly spaced capacities begin, in % of all experts."""
