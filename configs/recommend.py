"""Settings of `experiments.recommend`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import EVICTIONS, HARDWARE, MODELS, PREFETCHES, TRACES, Settings, fixed, machine, option, size


@dataclass(frozen=True)
class RecommendConfig(Settings):
    """What is asked, and what is tried for an answer."""

    model: str = option("gpt-oss-20b", "the model to run", names=MODELS)
    memory: str = option("6GiB", "all of the accelerator's memory", metavar="SIZE", check=size)
    hardware: str = option("pcie4-x16", "the machine", names=HARDWARE, check=machine)
    trace: str | None = option(
        None,
        "routing to replay",
        names=TRACES,
        metavar="TRACE",
        shown="a recorded one of the model if there is any, else synthetic routing of its shape",
    )
    batch: int = option(1, "requests decoded together", least=1)
    kv_bytes: str = option("0", "memory for keys and values of the context", metavar="SIZE", check=size)
    target_tpot_ms: float | None = option(
        None, "also find the least memory that decodes a token in so many milliseconds", above=0, shown="none"
    )
    lossy: bool = option(False, "also try rules that change what the model computes")
    # a `learned` policy is left out: its weights may have seen the requests that are replayed; --evictions adds it
    evictions: tuple[str, ...] = option(
        ("lru", "lfu", "lfu_decay", "online", "least_stale"), "eviction policies to replay", names=EVICTIONS
    )
    prefetches: tuple[str, ...] = option(
        (),
        "prefetch policies to replay",
        names=PREFETCHES,
        shown="none,previous,transition,gate_ahead, as far as the trace serves them",
    )
    shares_pct: tuple[float, ...] = fixed(
        (5, 10, 15, 20, 30, 40, 55, 75, 100), "capacities of the curves, in % of all experts", above=0
    )
    visits: int = fixed(3000, "layers x passes that are replayed, about", least=1)
    request_tokens: int = fixed(96, "requests are cut to so many", least=2)
    prompt_tokens: int = fixed(32, "of them, where the trace has no prompts", least=1)
    readings: tuple[str, ...] = fixed(
        ("left_first", "literal", "recency"), "of Least-Stale, besides the default", may_be_empty=True
    )
    bits: tuple[float, ...] = fixed(
        (2.0, 4.0, 8.0, 16.0), "slot precisions: the native one's neighbours are tried", above=0
    )

    def smoke(self) -> RecommendConfig:
        """Gives the same answer from few policies, capacities and tokens."""
        return replace(
            self,
            evictions=("lru", "least_stale"),
            prefetches=("none", "previous"),
            shares_pct=(10, 40, 100),
            visits=300,
            request_tokens=12,
            prompt_tokens=4,
            readings=(),
        )


TRIED = ("none", "previous", "transition", "gate_ahead")
LOSSY = ("drop", "fetch_lowest_bit", "fetch_priority", "cascade")
BUNDLED_OF = {
    "gpt-oss-20b": "gpt-oss-20b",
    "Qwen3-30B-A3B": "bigmoe-qwen3-30b-a3b",
    "gpt-oss-120b": "bigmoe-gpt-oss-120b",
}
"""Recorded traces of `MODELS`."""
