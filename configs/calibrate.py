"""Settings of `experiments.calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import SHAPES, Settings, capacity, fixed, option
from specmd_jax.errors import SpecmdError


@dataclass(frozen=True)
class CalibrateConfig(Settings):
    """What is timed. All of it goes into the manifest."""

    model: str = option("tiny", "the shapes to time: tiny or a published model", names=SHAPES)
    layers: int = option(4, "layers with experts to make and run at most, the first of the model", least=1)
    repeats: int = option(20, "timings of each point that the host takes; the median counts", least=1)
    loop_repeats: int = option(8, "timings of each point that a loop of a program takes; the median counts", least=1)
    copy_bytes: tuple[int, ...] = fixed(
        (1 << 16, 1 << 18, 1 << 20, 1 << 22, 12 << 20, 48 << 20), "sizes of the copies", least=1
    )
    in_flight: int = fixed(4, "copies at once", least=1)
    tokens: tuple[int, ...] = fixed((16, 64, 256), "tokens of the passes of several tokens", least=2)
    prompt: int = fixed(64, "tokens of a prompt, one of those numbers", least=2)
    visits: int = fixed(32, "steps of one token in a program", least=1)
    prompt_visits: int = fixed(4, "steps of several tokens in a program", least=1)
    steps: int = fixed(24, "tokens that the engine makes of each prompt", least=2)
    requests: int = fixed(3, "prompts of a run; the first is not counted", least=2)
    runs: int = fixed(3, "runs of the engine at each capacity; the fastest counts", least=1)
    capacity: str = fixed("30%", "cache of the run that misses", check=capacity)

    def check(self) -> None:
        if self.prompt not in self.tokens:
            raise SpecmdError(f"prompt is {self.prompt}, expected one of the tokens {', '.join(map(str, self.tokens))}")

    def smoke(self) -> CalibrateConfig:
        """Gives the same in seconds."""
        return replace(
            self, layers=2, repeats=3, loop_repeats=2, copy_bytes=(1 << 16, 1 << 20, 1 << 22), tokens=(16,),
            prompt=16, visits=8, prompt_visits=2, steps=8, runs=1,
        )  # fmt: skip
