"""Settings of `experiments.offload`."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path

from configs.options import (
    EVICTIONS,
    MISS_RULES,
    PRECISIONS,
    PREFETCHES,
    SHAPES,
    Names,
    Settings,
    capacity,
    fixed,
    option,
)
from specmd_jax.errors import SpecmdError

ENGINES = Names("engine", also=("layerwise", "fused"))


def numbers(text: str) -> tuple[tuple[str, float], ...]:
    """Reads a list of name=number with commas between."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    try:
        return tuple((name.strip(), int(n) if n.strip().isdigit() else float(n)) for name, _, n in pairs)
    except ValueError:
        raise ArgumentTypeError(f"{text}: expected name=number, such as keep=1") from None


@dataclass(frozen=True)
class OffloadConfig(Settings):
    """What is run and timed. All of it goes into the manifest."""

    model: str = option("tiny", "made-up weights in these shapes: tiny or a published model", names=SHAPES)
    engine: str = option(
        "layerwise", "layerwise: layer by layer from the host; fused: one program per pass", names=ENGINES
    )
    checkpoint: str | None = option(
        None, "run this checkpoint instead of --model: config.json and safetensors", metavar="FOLDER", shown="none"
    )
    evictions: tuple[str, ...] = option(
        ("lru", "lfu", "least_stale", "slru"), "eviction policies to run", names=EVICTIONS
    )
    capacities: tuple[str, ...] = option(
        ("25%", "50%", "75%", "100%"), "cache sizes, such as 25% or 64slots", check=capacity
    )
    prefetches: tuple[str, ...] = option(("none", "gate_ahead"), "prefetch policies to run", names=PREFETCHES)
    miss: str = option("fetch", "what a miss does", names=MISS_RULES)
    miss_numbers: tuple[tuple[str, float], ...] = option(
        (), "the miss rule's own numbers, such as keep=1", metavar="A=1,B=2", shown="the rule's", read=numbers
    )
    precisions: tuple[str, ...] | None = option(
        None,
        "what the host holds of each expert, by rising bits, such as int4,int8,native",
        names=PRECISIONS,
        shown="the model's own precision",
    )
    calibration_capacity: str = fixed("60%", "small enough to miss, large enough to miss unevenly", check=capacity)
    prompt: int = option(16, "tokens of each prompt", least=1)
    steps: int = option(32, "tokens made for each prompt; the first is no decode pass", least=2)
    requests: int = option(3, "prompts, one after the other; the first only fills the cache", least=2)

    def smoke(self) -> OffloadConfig:
        """Gives the same in seconds."""
        return replace(self, evictions=("lru",), capacities=("50%",), prompt=6, steps=6, requests=2)

    def check(self) -> None:
        """Raises `SpecmdError` for a miss rule without its precisions, and for what the fused engine cannot do."""
        from specmd_jax.policies import choose  # brings JAX

        if self.checkpoint is not None and not (Path(self.checkpoint) / "config.json").is_file():
            raise SpecmdError(f"{self.checkpoint}: no config.json there, expected the folder of a checkpoint")
        rule = choose("miss", self.miss).build()
        if len(self.precisions or ("native",)) < rule.least_levels:
            raise SpecmdError(f"--miss {self.miss}: expected at least two --precisions, such as int4,native")
        if self.engine == "fused" and (self.precisions is not None or not rule.fetches_all):
            raise SpecmdError(
                "--engine fused: fetches every expert at its one precision, expected --engine layerwise for other miss "
                "rules and --precisions"
            )
