"""Settings of `experiments.sweep`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep replays. Every field decides the table, so all of them go into its manifest."""

    trace: str = "gpt-oss-20b"  # a bundled trace, or the path of a trace file
    tokens: int = 8_000  # only the first ones; 0: all of them
    evictions: tuple[str, ...] = ()  # (): every policy there is
    capacities: tuple[str, ...] = ("200",)  # a bare number: that many, evenly spaced, and the marks below
    hardware: tuple[str, ...] = ()  # (): no times
    scope: str = "global"
    contract: str = "event"
    batch: int = 1
    phase: str = "all"
    reset_per_request: bool = False
    warmup_tokens: int = 0

    def smoke(self) -> SweepConfig:
        """The same study in seconds: few tokens, policies and capacities."""
        return replace(
            self, tokens=60, evictions=("lru", "lfu", "least_stale", "belady", "belady_bypass"), capacities=("6",)
        )


MARKS_PCT = (5, 10, 25, 50)
"""Capacities in % of all experts that evenly spaced ones are joined by, besides one token cycle."""
LEAST_PCT = 1
"""Where evenly spaced capacities begin, in % of all experts."""
