"""Settings of `experiments.capture`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from configs.options import Settings, option
from specmd_jax.errors import SpecmdError


@dataclass(frozen=True)
class CaptureConfig(Settings):
    """What is run and timed. All of it goes into the manifest."""

    model: str = option(
        "", "a checkpoint: its config.json, weights and tokenizer", metavar="FOLDER", shown="none; --smoke needs none"
    )
    prompts: str = option(
        "", "text with one prompt per line", metavar="FILE", shown="none; --smoke draws random tokens"
    )
    new_tokens: int = option(64, "tokens to generate for each prompt", least=1)
    repeats: int = option(7, "timings with hooks, and as many without", least=1)
    timed_tokens: int = option(64, "decode steps of each timing", least=1)
    logits: bool = option(False, "record the routers' full logits, too")
    chat_template: bool = option(False, "put each prompt into the tokenizer's chat template")
    device: str = option("auto", "torch device; auto: cuda if there is one, else cpu")

    def smoke(self) -> CaptureConfig:
        """Gives the same in seconds."""
        return replace(self, new_tokens=6, repeats=3, timed_tokens=8)

    def check(self) -> None:
        """Raises `SpecmdError` for half a checkpoint, and for paths that lead nowhere."""
        if bool(self.model) != bool(self.prompts):
            raise SpecmdError("--model FOLDER and --prompts FILE go together (or --smoke, without them)")
        if self.model and not os.path.isfile(Path(self.model) / "config.json"):
            raise SpecmdError(f"{self.model}: no config.json there, expected the folder of a checkpoint")
        if self.prompts and not os.path.isfile(self.prompts):
            raise SpecmdError(f"{self.prompts}: no such file, expected one prompt per line")
        if self.chat_template and not self.model:
            raise SpecmdError("--chat-template is given without --model: a random model has no tokenizer")
