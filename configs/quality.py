"""Settings of `experiments.quality`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import HARDWARE, MODELS, Names, Settings, fixed, machine, option
from specmd_jax.reference import HELD_OUT, REFERENCE
from specmd_jax.report.pages.paper.numbers import CAPACITIES_PCT

TRAINED = Names("model with held-out text", also=(REFERENCE,), holds=HELD_OUT)
RULES = Names("rule", also=("precisions", "lowest_bit", "priority", "cascade", "drop", "substitute", "cache_aware"))
OWN = "own"


@dataclass(frozen=True)
class QualityConfig(Settings):
    """What reads held-out text. Every field decides the table, so all of them go into its manifest."""

    model: str = option(
        REFERENCE,
        f"the model that comes with this package, or the folder of a checkpoint with {HELD_OUT} beside it",
        names=TRAINED,
        metavar="NAME|FOLDER",
    )
    rules: tuple[str, ...] = option(RULES.known(), "what is compared", names=RULES)
    windows: int = option(1, "held-out texts of each domain", least=1)
    prompt_tokens: int = option(16, "tokens of each text that are read as a prompt and not scored", least=1)
    steps: int = option(96, "tokens of each text that are scored, one by one", least=1)
    capacities_pct: tuple[float, ...] = fixed(CAPACITIES_PCT, "of the bytes of all experts at 16 bits", above=0)
    precisions: tuple[str, ...] = fixed(("int2", "int4", "int8", "native"), "of experts that all have one precision")
    high: str = fixed("int4", "what experts are held in, and the best precision of rules that choose one")
    low: str = fixed("int2", "the cheaper precision of rules that choose one")
    keeps: tuple[int, ...] = option((3, 2, 1), "experts of a token that `drop` never drops", least=0)
    tolerances: tuple[float, ...] = option((0.05, 0.1, 0.3, 1.0), "of `substitute`", above=0)
    strengths: tuple[float, ...] = option((0.1, 0.2, 0.3, 0.5, 1.0), "of `cache_aware`", above=0)
    hardware: str = option("specmd-a100", "the machine of the times", names=HARDWARE, check=machine)
    sizes: str = option(
        "OLMoE-1B-7B",
        f"the published model whose experts and dense layers the times are of, layer by layer; {OWN}: this one's",
        names=Names(MODELS.kind, MODELS.module, MODELS.table, MODELS.suffix, (OWN,), MODELS.holds, written=False),
    )

    def smoke(self) -> QualityConfig:
        """Gives the same study in seconds."""
        return replace(
            self, rules=("precisions", "drop"), precisions=("native",), high="native", capacities_pct=(5.0,),
            prompt_tokens=1, steps=6, keeps=(2,),
        )  # fmt: skip
