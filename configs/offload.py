"""Settings of `experiments.offload`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class OffloadConfig:
    """What is run and timed. All of it goes into the manifest."""

    model: str = "tiny"  # or a name of `specmd_jax.moe.PUBLISHED`
    engine: str = "driven"  # or "fused"
    checkpoint: str | None = None  # a folder: then `model` is not used
    evictions: tuple[str, ...] = ("lru", "lfu", "least_stale", "slru")
    capacities: tuple[str, ...] = ("25%", "50%", "75%", "100%")
    prefetches: tuple[str, ...] = ("none", "gate_ahead")
    miss: str = "fetch"  # a name of `specmd_jax.policies.MISS`
    miss_numbers: tuple[tuple[str, float], ...] = ()  # the rule's own, such as ("keep", 1)
    precisions: tuple[str, ...] | None = None  # held of each expert, by rising bits; None: the model's own
    calibration_capacity: str = "60%"  # small enough to miss, large enough to miss unevenly
    prompt: int = 16
    steps: int = 32
    requests: int = 3

    def smoke(self) -> OffloadConfig:
        """The same in seconds."""
        return replace(self, evictions=("lru",), capacities=("50%",), prompt=6, steps=6, requests=2)
