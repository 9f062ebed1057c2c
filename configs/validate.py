"""Settings of `experiments.validate`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import Names, Settings, option

ENGINES = Names("engine", "experiments.validation.cells", "ENGINES", written=False)


@dataclass(frozen=True)
class ValidateConfig(Settings):
    """Which cells are held against the model. Every field decides the table, so all of them go into its manifest."""

    engines: tuple[str, ...] = option((), "engines of the table", names=ENGINES, shown="all", metavar="A,B")

    def smoke(self) -> ValidateConfig:
        """Gives the same in less time."""
        return replace(self, engines=("moe-speed-of-light", "imp", "SpecMD"))
