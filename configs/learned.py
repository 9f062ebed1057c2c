"""Settings of `experiments.train_evictor`, `experiments.train_prefetcher` and `experiments.evaluate_learned`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specmd_jax.learn.training import Settings


@dataclass(frozen=True)
class TrainConfig:
    """One training run. What decides the weights is in `settings`."""

    settings: Settings
    trace: str = "gpt-oss-20b"  # a bundled trace, or the path of a trace file
    requests: int = 0  # only the first ones; 0: all of them
    tokens: int = 0  # only the first ones of each request; 0: all of them

    def smoke(self) -> TrainConfig:
        """The same run in seconds."""
        small = replace(self.settings, epochs=2, batch=16, hidden=8, width=4, topics=4)
        return replace(self, settings=small, requests=8, tokens=24)


EVICTOR = TrainConfig(Settings("evictor", epochs=6))
PREFETCHER = TrainConfig(Settings("prefetcher", epochs=20, width=128, drop=0.25))
