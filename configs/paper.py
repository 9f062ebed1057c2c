"""Settings of `experiments.paper`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specmd_jax.report.pages.paper.numbers import CAPACITIES_PCT, MODELS


@dataclass(frozen=True)
class PaperConfig:
    """What is replayed. Every field decides the table, so all of them go into its manifest."""

    models: tuple[str, ...] = MODELS  # synthetic routing of these shapes: no trace of them is public
    traces: tuple[str, ...] = ("gpt-oss-20b", "bigmoe-qwen3-30b-a3b", "bigmoe-gpt-oss-120b")  # recorded routing
    trace_tokens: int = 300  # of each recorded trace
    requests: int = 4  # of each synthetic trace
    prompt_tokens: int = 64
    decode_tokens: int = 32
    skew: float = 1.0  # of the synthetic routing, as are the next four
    stickiness: float = 0.5
    layer_correlation: float = 0.3
    ahead_noise: float = 0.5
    seed: int = 0
    capacities_pct: tuple[float, ...] = CAPACITIES_PCT  # of the bytes of all experts at 16 bits
    bits: tuple[float, ...] = (4.0, 8.0)  # the two readings of what experts are stored in
    hardware: str = "specmd-a100"

    def smoke(self) -> PaperConfig:
        """The same study in under a minute: a few tokens of one model, LRU and Least-Stale only."""
        return replace(self, models=("OLMoE-1B-7B",), traces=(), requests=1, prompt_tokens=4, decode_tokens=4)
