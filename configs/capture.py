"""Settings of `experiments.capture`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CaptureConfig:
    """What is run and timed. All of it goes into the manifest."""

    model: str = ""  # folder of a checkpoint; empty: a tiny random model
    prompts: str = ""  # file with a prompt a line; empty: random tokens
    new_tokens: int = 64  # generated for each prompt
    repeats: int = 7  # timings with hooks, and as many without
    timed_tokens: int = 64  # decode steps of each timing
    logits: bool = False
    chat_template: bool = False
    device: str = "auto"

    def smoke(self) -> CaptureConfig:
        """The same in seconds."""
        return replace(self, new_tokens=6, repeats=3, timed_tokens=8)
