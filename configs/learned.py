"""Settings of `experiments.train`, `experiments.train_evictor` and `experiments.train_prefetcher`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from configs.options import HARDWARE, TRACES, UNITS, Names, Setting, Settings, capacity, fixed, option, parts
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.settings import Settings as Training

PACKAGE = "package"  # in place of a folder
TRAINING_ENGINES = Names("engine of training", "specmd_jax.learn.settings", "ENGINES")


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
                "validation": Setting("share of them, expected, that chooses the epoch", least=0, below=1),
                "test": Setting("share of them, expected, that judges the weights", least=0, below=1),
                "epochs": Setting("times that the training requests are gone through", least=1),
                "width": Setting("hidden units of the predictor's scores", least=1),
                "drop": Setting("share of the inputs that training leaves out", least=0, below=1),
                "fade": Setting("how the evictor's label fades with each visit until the next use", least=0, below=1),
                "every": Setting("a target layer learns from one in so many tokens of a batch, in turn", least=1),
                "engine": Setting("what does the work", names=TRAINING_ENGINES),
            }
        ),
    )
    requests: int = fixed(0, "only the first ones; 0: all of them", least=0)
    tokens: int = fixed(0, "only the first ones of each request; 0: all of them", least=0)

    def smoke(self) -> TrainConfig:
        """Gives the same run in seconds."""
        small = replace(self.settings, epochs=2, batch=16, hidden=8, width=4, topics=4, every=2)
        return replace(self, settings=small, requests=8, tokens=24)

    def of(self, run: TrainHeadsConfig) -> TrainConfig:
        """Gives this head's part of a run of several heads."""
        own = (self.smoke() if run.small else self).settings
        told = replace(
            own,
            split=run.split,
            seed=run.seed,
            validation=run.validation,
            test=run.test,
            epochs=run.epochs or own.epochs,
            engine=run.engine,
        )
        return replace(self, trace=run.trace, settings=told, requests=run.requests, tokens=run.tokens)


EVICTOR = TrainConfig(settings=Training("evictor", epochs=6))
PREFETCHER = TrainConfig(settings=Training("prefetcher", epochs=20, width=128, drop=0.25, every=2))


class Head(NamedTuple):
    """Something that `experiments.train` can train."""

    config: Any  # its defaults; ``of(TrainHeadsConfig)`` gives those of a run
    work: str  # "module:function", called with (config, out): leaves <head>.npz, gives what the manifest says


HEADS: dict[str, Head] = {
    "prefetcher": Head(PREFETCHER, "experiments.common.train:train_head"),
    "evictor": Head(EVICTOR, "experiments.common.train:train_head"),
}


@dataclass(frozen=True)
class TrainHeadsConfig(Settings):
    """One run of `experiments.train`: several heads learn from one trace."""

    trace: str = option("gpt-oss-20b", "routing to learn from", names=TRACES, metavar="TRACE")
    heads: tuple[str, ...] = option(
        ("prefetcher", "evictor"), "what is trained", names=Names("head", "configs.learned", "HEADS", written=False)
    )
    split: str = option("category", "what of a trace stays together: requests are held out by it", names=UNITS)
    seed: int = option(0, "seed of the split, the first weights and the order of the tokens", least=0)
    validation: float = option(0.1, "share of them, expected, that chooses the epoch", least=0, below=1)
    test: float = option(0.2, "share of them, expected, that judges the weights", least=0, below=1)
    epochs: int = option(0, "times that the training requests are gone through", least=0, shown="each head's own")
    engine: str = option("auto", "what does the work", names=TRAINING_ENGINES)
    begin: str = option(
        "",
        "folder of weights, or 'package' for those that come with it: trains nothing anew, but moves their last layers "
        "along the gradient of a soft cache",
        metavar="FOLDER",
        shown="none",
    )
    capacity: str = option("25%", "with --begin, size of that cache; each layer has a share of its own", check=capacity)
    hardware: str = option(
        "none",
        "with --begin, machine whose stall falls; none: the misses do",
        names=replace(HARDWARE, also=("none",)),
        metavar="MACHINE",
    )
    prefetching: bool = option(
        False, "with --begin and --hardware, the folder's prefetcher fetches, whether or not --heads moves it"
    )
    updates: int = option(120, "with --begin, steps along the gradient", least=1)
    requests: int = fixed(0, "only the first ones; 0: all of them", least=0)
    tokens: int = fixed(0, "only the first ones of each request; 0: all of them", least=0)
    small: bool = fixed(False, "networks of a few weights")

    def smoke(self) -> TrainHeadsConfig:
        """Gives the same run in seconds."""
        return replace(self, small=True, requests=8, tokens=24)

    def check(self) -> None:
        """Raises SpecmdError for heads that nothing can move."""
        if not self.begin:
            return
        if "evictor" not in self.heads:
            raise SpecmdError("--begin without the evictor among --heads, which decides what is missed")
        if ("prefetcher" in self.heads or self.prefetching) and self.hardware == "none":
            raise SpecmdError(
                "--begin with a prefetcher goes by the stall it saves: expected --hardware, or --heads evictor alone"
            )
