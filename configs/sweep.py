"""Settings of `experiments.sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from configs.host import HOST_OPTIONS, HostMemory
from configs.options import (
    ADMISSIONS,
    CONTRACTS,
    EVICTIONS,
    HARDWARE,
    MISS_RULES,
    PHASES,
    SCOPES,
    TRACES,
    Settings,
    capacity,
    machine,
    option,
    parts,
    profile,
    share,
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
    miss: str = option("fetch", "what a miss does", names=MISS_RULES)
    warm_start: str = option(
        "",
        "begin with the most used experts of this profile or trace, of other requests than the replayed ones",
        check=profile,
        shown="empty caches",
        metavar="FILE",
    )
    pin_share: float = option(0.0, "share of the cache whose most used experts never leave", least=0, check=share)
    pin_profile: str = option(
        "", "the profile or trace whose experts are pinned", check=profile, shown="that of --warm-start", metavar="FILE"
    )
    admission: str = option("always", "which demand copies stay in the cache", names=ADMISSIONS)
    copies: int = option(4, "admission limited: how many copies of a pass stay", least=0)
    gain: float = option(1.0, "admission margin: by how much a newcomer must beat what it pushes out", least=0)
    drafts: tuple[int, ...] = option((0,), "speculative decoding: tokens drafted for each decode pass", least=0)
    acceptance: tuple[float, ...] = option(
        (),
        "how probable it is that a draft is accepted if those before it were",
        least=0,
        shown="the counts of the trace",
        may_be_empty=True,
    )
    draft_seed: int = option(0, "what accepted drafts are drawn from", least=0)
    draft_ms: float = option(0.0, "time of drafting before each decode pass, in ms", least=0)
    host: HostMemory = field(default_factory=HostMemory, metadata=parts(HOST_OPTIONS))

    def smoke(self) -> SweepConfig:
        """Gives the same study in seconds: few tokens, policies and capacities."""
        return replace(
            self, tokens=60, evictions=("lru", "lfu", "least_stale", "belady", "belady_bypass"), capacities=("6",)
        )

    def check(self) -> None:
        """Raises `SpecmdError` for settings that do not go together, and rules that a sweep has nothing for."""
        from specmd_jax.policies import choose
        from specmd_jax.schedule.build import check_options  # brings JAX
        from specmd_jax.schedule.drafts import Drafts, check_drafts

        rule = choose("miss", self.miss).build()
        if rule.least_levels > 1:
            raise SpecmdError(f"--miss {self.miss}: it needs several stored precisions, and a sweep has one")
        if rule.divides and not self.hardware:
            raise SpecmdError(f"--miss {self.miss}: it divides misses by time, expected --hardware")
        check_options(self.batch, None, self.contract, self.reset_per_request, self.phase, self.warmup_tokens)
        if self.pin_share and not (self.pin_profile or self.warm_start):
            raise SpecmdError("pin_share is given without a profile, expected --pin-profile or --warm-start")
        if self.pin_profile and not self.pin_share:
            raise SpecmdError("pin_profile is given with pin_share 0, expected a share above 0")
        for name, rule in (("copies", "limited"), ("gain", "margin")):
            if getattr(self, name) != getattr(SweepConfig, name) and self.admission != rule:
                raise SpecmdError(f"{name} is given with admission {self.admission!r}, expected {rule!r}")
        if not any(self.drafts) and (self.acceptance or self.draft_ms):
            name = "acceptance" if self.acceptance else "draft_ms"
            raise SpecmdError(f"{name} is given and nothing is drafted, expected drafts above 0")
        for drafts in self.speculation:
            if drafts["drafts"]:
                check_drafts(Drafts(drafts["drafts"], drafts["acceptance"], self.draft_seed, drafts["draft_s"]))
        for name in self.hardware or (None,):
            self.host.check_with(name)

    @property
    def speculation(self) -> list[dict[str, Any]]:
        """Fields of `specmd_jax.Setting`, for each way of drafting."""
        return [
            {
                "drafts": drafts,
                "acceptance": acceptance,
                "draft_seed": self.draft_seed if drafts else 0,
                "draft_s": self.draft_ms / 1e3 if drafts else 0.0,
            }
            for drafts in self.drafts
            for acceptance in ((self.acceptance if drafts else ()) or (None,))
        ]


MARKS_PCT = (5, 10, 25, 50)
"""Capacities in % of all experts that evenly spaced ones are joined by, besides one token cycle."""
LEAST_PCT = 1
"""Where evenly spaced capacities begin, in % of all experts."""
