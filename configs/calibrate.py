"""Settings of `experiments.calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import SHAPES, Settings, fixed, option


@dataclass(frozen=True)
class CalibrateConfig(Settings):
    """What is timed. All of it goes into the manifest."""

    model: str = option("tiny", "the shapes to time: tiny or a published model", names=SHAPES)
    repeats: int = option(20, "timings of each point; the median counts", least=1)
    copy_bytes: tuple[int, ...] = fixed(
        (1 << 16, 1 << 18, 1 << 20, 1 << 22, 12 << 20, 48 << 20), "sizes of the copies", least=1
    )
    in_flight: int = fixed(4, "copies at once", least=1)
    tokens: tuple[int, ...] = fixed((1, 8, 64, 256, 1024), "tokens that one expert computes", least=1)

    def smoke(self) -> CalibrateConfig:
        """Gives the same in seconds."""
        return replace(self, repeats=3, copy_bytes=(1 << 16, 1 << 20, 1 << 22), tokens=(1, 16))
