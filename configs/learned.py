"""Settings of `experiments.train_evictor` and `experiments.train_prefetcher`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.options import TRACES, UNITS, Setting, Settings, fixed, option, parts
from specmd_jax.learn.settings import Settings as Training


@dataclass(frozen=True)
class TrainConfig(Settings):
    """One training run. What decides the weights is in `settings`."""

    trace: str = option("gpt-oss-20b", "routing to learn from", names=TRACES, metavar="TRACE")
    settings: Training = field(
        default=Training("evictor"),
        metadata=parts(
            {
                "seed": Setting("seed of the split, the first weights and the order of the tokens", least=0),
                "split": Setting("what of a trace stays together: requests are held out by it", names=UNITS),
                "epochs": Setting("times that the training requests are gone through", least=1),
                "width": Setting("hidden units of the predictor's scores", least=1),
                "drop": Setting("share of the inputs that training leaves out", least=0, below=1),
                "fade": Setting("how the evictor's label fades with each visit until the next use", least=0, below=1),
            }
        ),
    )
    requests: int = fixed(0, "only the first ones; 0: all of them", least=0)
    tokens: int = fixed(0, "only the first ones of each request; 0: all of them", least=0)

    def smoke(self) -> TrainConfig:
        """Gives the same run in seconds."""
        small = replace(self.settings, epochs=2, batch=16, hidden=8, width=4, topics=4)
        return replace(self, settings=small, requests=8, tokens=24)


EVICTOR = TrainConfig(settings=Training("evictor", epochs=6))
PREFETCHER = TrainConfig(settings=Training("prefetcher", epochs=20, width=128, drop=0.25))
