"""Settings of `experiments.recommend`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RecommendConfig:
    """What is asked, and what is tried for an answer."""

    model: str = "gpt-oss-20b"
    memory: str = "6GiB"  # all of the accelerator's
    hardware: str = "pcie4-x16"
    trace: str | None = None  # None: a recorded one of the model if there is any, else synthetic routing of its shape
    batch: int = 1
    kv_bytes: str = "0"  # memory for keys and values of the context
    target_tpot_ms: float | None = None
    lossy: bool = False  # also rules that change what the model computes
    # a `learned` policy is left out: its weights may have seen the requests that are replayed; --evictions adds it
    evictions: tuple[str, ...] = ("lru", "lfu", "lfu_decay", "online", "least_stale")
    prefetches: tuple[str, ...] = ()  # (): all of `PREFETCHES` that the trace can serve
    shares_pct: tuple[float, ...] = (
        5,
        10,
        15,
        20,
        30,
        40,
        55,
        75,
        100,
    )  # capacities of the curves, in % of all experts
    visits: int = 3000  # layers x passes that are replayed, about
    request_tokens: int = 96  # requests are cut to so many
    prompt_tokens: int = 32  # of them, where the trace has no prompts
    readings: tuple[str, ...] = ("left_first", "literal", "recency")
    bits: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)  # slot precisions: the native one's neighbours are tried

    def smoke(self) -> RecommendConfig:
        """The same answer from few policies, capacities and tokens."""
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


PREFETCHES = ("none", "previous", "transition", "gate_ahead")
LOSSY = ("drop", "fetch_lowest_bit", "fetch_priority", "cascade")
BUNDLED_OF = {
    "gpt-oss-20b": "gpt-oss-20b",
    "Qwen3-30B-A3B": "bigmoe-qwen3-30b-a3b",
    "gpt-oss-120b": "bigmoe-gpt-oss-120b",
}
"""Recorded traces of `MODELS`."""
