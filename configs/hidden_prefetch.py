"""Settings of `experiments.hidden_prefetch`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.evaluate_learned import link_of
from configs.options import (
    EVICTIONS,
    HARDWARE,
    PREFETCHES,
    SCOPES,
    Setting,
    Settings,
    capacity,
    fixed,
    machine,
    option,
    parts,
)
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.settings import MapSettings


@dataclass(frozen=True)
class HiddenPrefetchConfig(Settings):
    """What is trained and replayed. Every field decides the table, so all of them go into its manifest."""

    data: str | None = option(
        None, "a folder of tokens that `experiments.train_moe --corpus` made: its training part trains, too",
        metavar="FOLDER", shown="none: texts of the package that do not judge",
    )  # fmt: skip
    texts: int = option(40, "texts of each domain that --data gives", least=1)
    tokens: int = fixed(512, "tokens of a text", least=2, below=513)
    train: tuple[int, ...] = fixed((0, 1, 2, 3, 4), "texts of each domain of the package that train", least=0)
    validation: tuple[int, ...] = fixed((5,), "those that choose the epoch", least=0)
    test: tuple[int, ...] = fixed((6, 7), "those that judge", least=0)
    maps: MapSettings = field(
        default=MapSettings(),
        metadata=parts(
            {
                "epochs": Setting("times that the texts train the maps", least=1),
                "seed": Setting("seed of the order of tokens", least=0),
            }
        ),
    )
    ranks: tuple[int, ...] = option((8, 16), "ranks of the smaller maps", metavar="A,B", least=1)
    aheads: tuple[int, ...] = fixed((0, 1, 2), "layers ahead that maps predict; 1 can be replayed", least=0)
    ids_epochs: int = option(
        6, "times that the same texts train `learned`, which sees ids and gates alone; 0: leave it out", least=0
    )
    predictors: tuple[str, ...] = fixed(
        ("none", "previous", "transition", "online", "adaptive", "learned", "gate_ahead", "perfect"),
        "predictors that are not trained here; none is what the others are held against", names=PREFETCHES,
    )  # fmt: skip
    counts: tuple[float, ...] = fixed((1.0, 1.5, 2.0), "experts predicted for a layer, in units of K", above=0)
    capacities: tuple[str, ...] = option(
        ("10%", "25%", "50%"), "cache sizes, such as 25%,4GiB", metavar="A,B", check=capacity
    )
    scope: str = option("global", "global: one pool; layer: one pool per layer", names=SCOPES)
    eviction: str = option("lru", "eviction policy", names=EVICTIONS)
    hardware: str = option("pcie4-x16", "the machine, but for a link that --links gives", names=HARDWARE, check=machine)
    links: tuple[str, ...] = option(
        ("0.25", "1"), "how long one expert's copy takes, in layer times, or the links of hardware presets",
        metavar="A,B", check=link_of,
    )  # fmt: skip
    overfetch: float = option(1.0, "experts asked for per layer, in units of K", above=0)
    launch_us: float = option(
        5.0, "of a predictor that is a kernel of its own, in microseconds (an assumption)", least=0
    )

    def smoke(self) -> HiddenPrefetchConfig:
        """Gives the same study in seconds."""
        return replace(
            self, tokens=16, train=(0,), validation=(1,), test=(2,), maps=replace(self.maps, epochs=1), ranks=(4,),
            aheads=(0, 1), ids_epochs=0, predictors=("none", "gate_ahead"), counts=(1.0,), capacities=("25%",),
            links=("0.25",),
        )  # fmt: skip

    def check(self) -> None:
        """Raises `SpecmdError` for texts that train and judge."""
        self.maps.check()
        if both := {*self.test} & {*self.train, *self.validation}:
            raise SpecmdError(f"texts {sorted(both)} are to judge and to train, expected others")
