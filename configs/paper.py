"""Settings of `experiments.paper`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import BUNDLED, HARDWARE, MODELS, Settings, fixed, machine, option
from configs.quality import TRAINED
from specmd_jax.errors import SpecmdError
from specmd_jax.reference import REFERENCE
from specmd_jax.report.pages.paper.numbers import CAPACITIES_PCT
from specmd_jax.report.pages.paper.numbers import MODELS as PAPER_MODELS


@dataclass(frozen=True)
class PaperConfig(Settings):
    """What is replayed. Every field decides the table, so all of them go into its manifest."""

    models: tuple[str, ...] = option(
        PAPER_MODELS,
        "shapes of synthetic routing, for models without a public trace; '' for none",
        names=MODELS,
        may_be_empty=True,
    )
    traces: tuple[str, ...] = option(
        ("gpt-oss-20b", "bigmoe-qwen3-30b-a3b", "bigmoe-gpt-oss-120b"),
        "recorded routing; '' for none",
        names=BUNDLED,
        may_be_empty=True,
    )
    trained: tuple[str, ...] = option(
        (REFERENCE,),
        "models that read held-out text, for claims on quality (experiments.quality); '' for none",
        names=TRAINED,
        may_be_empty=True,
    )
    trace_tokens: int = option(300, "tokens of each recorded trace", least=1)
    requests: int = option(4, "requests of each synthetic trace", least=1)
    prompt_tokens: int = fixed(64, "of each synthetic request; TTFT needs prompts", least=1)
    decode_tokens: int = fixed(32, "of each synthetic request", least=1)
    skew: float = fixed(1.0, "of the synthetic routing, as are the next five", least=0)
    stickiness: float = fixed(0.5, "correlation of the noise from a token to the next", least=0)
    layer_correlation: float = fixed(0.3, "correlation of the noise of matched experts of neighbouring layers", least=0)
    drift: float = fixed(0.01, "chance that a token changes its request's topic", least=0)
    topics: int = fixed(4, "of the synthetic routing", least=1)
    ahead_noise: float = fixed(0.5, "standard deviation of the noise of the scores that gate_ahead sees", least=0)
    seed: int = option(0, "seed of the synthetic routing", least=0)
    capacities_pct: tuple[float, ...] = fixed(CAPACITIES_PCT, "of the bytes of all experts at 16 bits", above=0)
    bits: tuple[float, ...] = fixed((4.0, 8.0), "the two readings of what experts are stored in", above=0)
    hardware: str = fixed("specmd-a100", "the machine of the times", names=HARDWARE, check=machine)

    def smoke(self) -> PaperConfig:
        """Gives the same study in under a minute: a few tokens of one model, LRU and Least-Stale only."""
        return replace(
            self, models=("OLMoE-1B-7B",), traces=(), trained=(), requests=1, prompt_tokens=4, decode_tokens=4
        )

    def check(self) -> None:
        """Raises `SpecmdError` if there is nothing to replay."""
        if not self.models and not self.traces:
            raise SpecmdError("neither models nor traces are given: expected at least one")
