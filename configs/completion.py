"""Settings of `experiments.offload` where it completes a prompt."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from configs.offload import ENGINES, check_rule, numbers, weights_folder
from configs.options import (
    EVICTIONS,
    MISS_RULES,
    PRECISIONS,
    PREFETCHES,
    WEIGHTS,
    Settings,
    capacity,
    folder,
    machine,
    option,
    size,
)
from specmd_jax.errors import SpecmdError
from specmd_jax.reference import REFERENCE

PROMPTS = ("prompt", "prompt_file", "prompt_ids")
"""Fields that give a prompt; one of them, and there is one to complete."""
SHOWN_PROMPT = "Question: Tom has 3 apples and buys 4 more. How many"
"""What is completed where nothing is asked for."""


def memory(text: str) -> None:
    """Raises `SpecmdError` unless `text` is a number of bytes with its unit."""
    try:
        size(text)
    except SpecmdError:
        raise SpecmdError(f"memory {text!r} cannot be read: expected bytes, such as 6GiB or 500MB") from None


@dataclass(frozen=True)
class Completion(Settings):
    """What completes a prompt, and with how much memory."""

    model: str = option(REFERENCE, "see `configs.offload`", names=WEIGHTS)
    checkpoint: str | None = option(None, "see `configs.offload`", check=folder)
    engine: str | None = option(None, "see `configs.offload`; None: fused on an accelerator", names=ENGINES)
    steps: int = option(128, "tokens made at most", least=1)
    prompt: str | None = option(
        None,
        "complete this text, greedily, as it stands (no chat template); - reads it from stdin",
        metavar="TEXT",
        shown="none",
    )
    prompt_file: str | None = option(None, "complete the text of this file", metavar="FILE", shown="none")
    prompt_ids: tuple[int, ...] | None = option(
        None, "complete these token ids, and print ids; needs no tokenizer", metavar="N,N", least=0, shown="none"
    )
    memory: str | None = option(
        None,
        "device memory for everything: dense weights, keys and values, work, and the experts that then fit",
        metavar="SIZE",
        shown="what the device has; on a CPU --capacity 25%",
        check=memory,
    )
    capacity: str | None = option(
        None,
        "the cache of experts alone, such as 25% or 64slots, in place of --memory",
        metavar="SIZE",
        shown="none",
        check=capacity,
    )
    eviction: str = option("lru", "eviction policy of a prompt", names=EVICTIONS)
    prefetch: str = option("none", "prefetch policy of a prompt", names=PREFETCHES)
    miss: str = option("fetch", "see `configs.offload`", names=MISS_RULES)
    miss_numbers: tuple[tuple[str, float], ...] = option((), "see `configs.offload`", shown="the rule's", read=numbers)
    precisions: tuple[str, ...] | None = option(
        None, "see `configs.offload`", names=PRECISIONS, shown="the model's own precision"
    )
    precision: str = option(
        "native",
        "at which precision a checkpoint's experts are held; any but its own changes the text",
        names=PRECISIONS,
    )
    hardware: str | None = option(
        None,
        "predict with this machine, such as the file that experiments.calibrate wrote",
        metavar="NAME|FILE",
        shown="rates of this engine, from two runs of other tokens after the text",
        check=machine,
    )

    def smoke(self) -> Completion:
        """Gives the same in seconds."""
        return replace(self, steps=8)

    @property
    def weights(self) -> str | None:
        """The folder of the checkpoint; None for made-up weights."""
        return weights_folder(self.model, self.checkpoint)

    def check(self) -> None:
        """Raises `SpecmdError` for no prompt or several, an empty one, two sizes of the cache, and a miss rule without
        its precisions."""
        given = [f"--{name.replace('_', '-')}" for name in PROMPTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SpecmdError(f"{' and '.join(given) or 'no prompt'} given, expected one prompt")
        if self.prompt == "":
            raise SpecmdError("--prompt is empty, expected text")
        if self.prompt_file is not None and not os.path.isfile(self.prompt_file):
            raise SpecmdError(f"{self.prompt_file}: no such file, expected the text of a prompt")
        if self.memory is not None and self.capacity is not None:
            raise SpecmdError("--memory and --capacity are given, expected one of them")
        check_rule(self.miss, self.precisions, self.engine)
        if self.precisions is not None and self.precision != "native":
            raise SpecmdError("--precision and --precisions are given, expected one of them")
        if self.precisions is not None and self.hardware is not None:
            raise SpecmdError("--hardware predicts experts at one precision, expected no --precisions beside it")
        if self.precision != "native" and self.weights is None:
            raise SpecmdError(f"--precision {self.precision}: expected a checkpoint, made-up weights have their own")
