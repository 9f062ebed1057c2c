"""Settings of `experiments.offload`."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass, replace

from configs.options import (
    EVICTIONS,
    MISS_RULES,
    PRECISIONS,
    PREFETCHES,
    ROUTINGS,
    WEIGHTS,
    Names,
    Settings,
    capacity,
    fixed,
    folder,
    option,
)
from specmd_jax.errors import SpecmdError, spelling
from specmd_jax.reference import REFERENCE, reference_folder

ENGINES = Names("engine", also=("layerwise", "fused"))


def numbers(text: str) -> tuple[tuple[str, float], ...]:
    """Reads a list of name=number with commas between."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    try:
        return tuple((name.strip(), int(n) if n.strip().isdigit() else float(n)) for name, _, n in pairs)
    except ValueError:
        raise ArgumentTypeError(f"{text}: expected name=number, such as keep=1") from None


def weights_folder(model: str, checkpoint: str | None) -> str | None:
    """Gives the folder that either names; None for made-up weights."""
    if checkpoint is None and spelling(model, (REFERENCE,)) is not None:
        return str(reference_folder())
    return checkpoint if checkpoint is not None or model in WEIGHTS.known() else model


def check_rule(miss: str, precisions: tuple[str, ...] | None, engine: str | None) -> None:
    """Raises `SpecmdError` for a miss rule without its precisions, or one that the engine (None: any) does not run."""
    from specmd_jax.policies import choose  # brings JAX

    rule = choose("miss", miss).build()
    if len(precisions or ("native",)) < rule.least_levels:
        raise SpecmdError(f"--miss {miss}: expected at least two --precisions, such as int4,native")
    if rule.divides:
        raise SpecmdError(f"--miss {miss}: it divides misses by simulated time, which a running model does not have")
    if engine == "fused" and rule.hosts:
        raise SpecmdError(f"--miss {miss}: --engine fused runs no experts on the host, expected --engine layerwise")


@dataclass(frozen=True)
class OffloadConfig(Settings):
    """What is run and timed. All of it goes into the manifest."""

    model: str = option(
        "tiny",
        "specmd-reference, which comes with this package; tiny or a published model, with made-up weights; or the "
        "folder of a checkpoint: config.json and safetensors",
        names=WEIGHTS,
        metavar="NAME|FOLDER",
        shown="tiny; of a prompt specmd-reference",
    )
    checkpoint: str | None = option(
        None, "the folder of a checkpoint, in place of --model", metavar="FOLDER", shown="none", check=folder
    )
    engine: str = option(
        "layerwise",
        "layerwise: layer by layer from the host; fused: one program per pass",
        names=ENGINES,
        shown="layerwise; of a prompt fused on an accelerator",
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
    routing: str = option("standard", "who chooses the experts: the router, or the cache, too", names=ROUTINGS)
    routing_numbers: tuple[tuple[str, float], ...] = option(
        (),
        "the routing policy's own numbers, such as strength=0.2",
        metavar="A=1,B=2",
        shown="the policy's",
        read=numbers,
    )
    precisions: tuple[str, ...] | None = option(
        None,
        "what the host holds of each expert, by rising bits, such as int4,int8,native",
        names=PRECISIONS,
        shown="the model's own precision",
    )
    calibration_capacity: str = fixed("60%", "small enough to miss, large enough to miss unevenly", check=capacity)
    prompt_tokens: int = option(16, "tokens of each prompt of random ids", least=1)
    steps: int = option(
        32, "tokens made for each prompt; the first is no decode pass", least=2, shown="32; of a prompt 128"
    )
    requests: int = option(3, "prompts, in their order; the first only fills the cache", least=2)
    batch: int = option(1, "requests decoded together, with --engine fused", least=1)

    def smoke(self) -> OffloadConfig:
        """Gives the same in seconds."""
        return replace(self, evictions=("lru",), capacities=("50%",), prompt_tokens=6, steps=6, requests=2)

    @property
    def weights(self) -> str | None:
        """The folder of the checkpoint; None for made-up weights."""
        return weights_folder(self.model, self.checkpoint)

    def check(self) -> None:
        """Raises `SpecmdError` for a miss rule without its precisions, and for what the engine cannot do."""
        check_rule(self.miss, self.precisions, self.engine)
        if self.batch > 1 and self.engine != "fused":
            raise SpecmdError(f"--batch {self.batch}: only --engine fused decodes requests together")
        if self.batch > self.requests:
            raise SpecmdError(f"--batch {self.batch}: expected at most the {self.requests} --requests")
