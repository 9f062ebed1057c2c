"""Settings of `experiments.recommend`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from configs.options import (
    EVICTIONS,
    HARDWARE,
    MODELS,
    PREFETCHES,
    TRACES,
    Settings,
    fixed,
    numbers,
    option,
    size,
    tokens,
)
from configs.options import machine as known_machine
from specmd_jax.errors import SpecmdError
from specmd_jax.units import GB

if TYPE_CHECKING:
    from specmd_jax.specs.hardware import Hardware


@dataclass(frozen=True)
class RecommendConfig(Settings):
    """What is asked, and what is tried for an answer."""

    model: str = option("gpt-oss-20b", "the model to run, or the path of its config.json", names=MODELS)
    memory: str = option("6GiB", "all of the accelerator's memory", metavar="SIZE", check=size)
    hardware: str = option("pcie4-x16", "the machine", names=HARDWARE, check=known_machine)
    link: float | None = option(
        None, "rate of the link in GB/s, in place of the machine's", above=0, metavar="GB/S", shown="the machine's"
    )
    machine: tuple[str, ...] = option(
        (),
        "numbers in place of the machine's, such as link_latency_s=2e-5; may be given several times",
        metavar="NAME=X",
        repeated=True,
        shown="none",
    )
    ram: str | None = option(
        None, "host memory that experts may take; the rest is read from --ssd", metavar="SIZE", check=size,
        shown="room for all",
    )  # fmt: skip
    ssd: str | None = option(
        None, "the storage behind it: a machine whose link it is, such as nvme-4", names=HARDWARE, shown="none"
    )
    bits: float | None = option(
        None,
        "bits of an expert's weight, scales included (4-bit quantisations take about 4.5)",
        above=0,
        metavar="X",
        shown="as published",
    )
    trace: str | None = option(
        None,
        "routing to replay, in the model's shape",
        names=TRACES,
        metavar="TRACE",
        shown="a recorded one that has the model's shape, else synthetic routing with the model's locality",
    )
    batch: int = option(1, "requests decoded together", least=1)
    context: int | None = option(
        None,
        "tokens of context that each request keeps and attends to, such as 32k",
        least=0,
        read=tokens,
        metavar="N",
        shown="4k, where the model's attention is known",
    )
    drafts: int = option(0, "speculative decoding: tokens drafted for each decode pass", least=0)
    acceptance: float | None = option(
        None, "how probable it is that a draft is accepted if those before it were", least=0, shown="none"
    )
    draft_ms: float = option(0.0, "time of drafting before each decode pass, in ms", least=0)
    target_tpot_ms: float | None = option(
        None, "also find the least memory that decodes a token in so many milliseconds", above=0, shown="none"
    )
    lossy: bool = option(False, "also try rules that change what the model computes")
    # a `learned` policy is left out: its weights may have seen the requests that are replayed; --evictions adds it
    evictions: tuple[str, ...] = option(
        ("lru", "lfu", "lfu_decay", "online", "adaptive", "least_stale"),
        "eviction policies to replay",
        names=EVICTIONS,
    )
    prefetches: tuple[str, ...] = option(
        (),
        "prefetch policies to replay",
        names=PREFETCHES,
        shown="none,previous,transition,adaptive,gate_ahead, as far as the trace serves them",
    )
    shares_pct: tuple[float, ...] = fixed(
        (5, 10, 15, 20, 30, 40, 55, 75), "capacities of the curves, in % of all experts; 100 is always there", above=0
    )
    visits: int = fixed(16_000, "layers x passes that are replayed, about", least=1)
    requests: int = fixed(6, "requests that are counted", least=2)
    warmup_requests: int = fixed(10, "requests before them, which are not; some policies learn from them", least=1)
    prompt_tokens: int = fixed(16, "of each request, where the trace has no prompts", least=1)
    least_decoded: int = fixed(24, "tokens that each request decodes at least", least=2)
    most_decoded: int = fixed(96, "and at most", least=2)
    readings: tuple[str, ...] = fixed(
        ("left_first", "literal", "recency"), "of Least-Stale, besides the default", may_be_empty=True
    )
    other_bits: tuple[float, ...] = fixed(
        (2.0, 4.0, 8.0, 16.0), "slot precisions: the asked one's neighbours are tried", above=0
    )
    link_factors: tuple[float, ...] = fixed((0.5, 2.0), "of the link's rate: other links that are tried", above=0)
    host_evictions: tuple[str, ...] = fixed(
        ("lfu_decay",),
        "other policies of host memory that are tried where it does not hold everything",
        may_be_empty=True,
    )
    seed: int = fixed(0, "of synthetic routing", least=0)

    def smoke(self) -> RecommendConfig:
        """Gives the same answer from few policies, capacities and tokens."""
        return replace(
            self,
            evictions=("lru", "least_stale"),
            prefetches=("none", "previous"),
            shares_pct=(10, 40),
            visits=300,
            requests=2,
            warmup_requests=1,
            prompt_tokens=2,
            least_decoded=4,
            readings=(),
            other_bits=(2.0,),
            link_factors=(2.0,),
            host_evictions=(),
        )

    def check(self) -> None:
        """Raises `SpecmdError` for numbers of the machine that cannot be."""
        self.whole_machine()
        if self.drafts:
            from specmd_jax.schedule.drafts import Drafts, check_drafts

            if self.acceptance is None:
                raise SpecmdError(f"drafts is {self.drafts} without an acceptance, expected --acceptance 0 up to 1")
            check_drafts(Drafts(*self.drafting.values()))
        elif self.acceptance is not None or self.draft_ms:
            raise SpecmdError("acceptance or draft_ms is given and nothing is drafted, expected --drafts above 0")
        if self.ssd is not None and self.ram is None:
            raise SpecmdError("--ssd is given without --ram, expected how much of host memory experts may take")
        if self.link is not None and any(item.startswith("link_bytes_per_s") for item in self.machine):
            raise SpecmdError("--link and --machine link_bytes_per_s are given, expected one of them")

    @property
    def drafting(self) -> dict[str, Any]:
        """Fields of `specmd_jax.Setting`, in the order of `schedule.drafts.Drafts`; none without drafts."""
        if not self.drafts:
            return {}
        return {
            "drafts": self.drafts,
            "acceptance": self.acceptance,
            "draft_seed": self.seed,
            "draft_s": self.draft_ms / 1e3,
        }

    def whole_machine(self) -> Hardware:
        """Gives the machine with the numbers that replace its own, checked."""
        from specmd_jax.specs.hardware import Hardware, hardware  # brings JAX

        changed = numbers(self.machine, "number of the machine", [leaf.name for leaf in fields(Hardware)])
        if self.link is not None:
            changed["link_bytes_per_s"] = self.link * GB
        return hardware(hardware(self.hardware).replace(**changed))


TRIED = ("none", "previous", "transition", "adaptive", "gate_ahead")
LOSSY = ("drop", "fetch_lowest_bit", "fetch_priority", "cascade")
BUNDLED_OF = {
    "gpt-oss-20b": "gpt-oss-20b",
    "Qwen3-30B-A3B": "bigmoe-qwen3-30b-a3b",
    "gpt-oss-120b": "bigmoe-gpt-oss-120b",
}
"""Recorded traces of `MODELS`; those that route otherwise than the model are not taken."""
