"""Settings of `experiments.calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CalibrateConfig:
    """What is timed. All of it goes into the manifest."""

    model: str = "tiny"  # or a name of `specmd_jax.moe.PUBLISHED`
    repeats: int = 20
    copy_bytes: tuple[int, ...] = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 12 << 20, 48 << 20)
    in_flight: int = 4  # copies at once
    tokens: tuple[int, ...] = (1, 8, 64, 256, 1024)

    def smoke(self) -> CalibrateConfig:
        """The same in seconds."""
        return replace(self, repeats=3, copy_bytes=(1 << 16, 1 << 20, 1 << 22), tokens=(1, 16))
