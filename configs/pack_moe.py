"""Settings of `experiments.pack_moe`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from configs.options import Settings, folder, option
from specmd_jax.errors import SpecmdError
from specmd_jax.reference import HELD_OUT


@dataclass(frozen=True)
class PackMoEConfig(Settings):
    """Which weights are packed, and what they read before and after."""

    checkpoint: str | None = option(
        None, "weights in 16 bits or more to pack, such as model/ of experiments.train_moe", metavar="FOLDER",
        shown="none; the packed model that comes with this package is read", check=folder,
    )  # fmt: skip
    data: str | None = option(
        None, "the folder of tokens that it was trained on, whose held-out text is read", metavar="FOLDER",
        shown=f"none; {HELD_OUT} of the checkpoint",
    )  # fmt: skip
    windows: int = option(8, "most windows of each domain, spread evenly", least=1)
    tokens: int = option(512, "tokens of a window that are predicted, at most", least=1)
    plain: bool = option(False, "also write what the packed weights stand for in bfloat16, which transformers loads")

    def smoke(self) -> PackMoEConfig:
        """Gives the same in seconds."""
        return replace(self, windows=1, tokens=16)

    def check(self) -> None:
        """Raises `SpecmdError` for text without weights, and for weights without text."""
        if self.checkpoint is None and self.data is not None:
            raise SpecmdError("--data is given without --checkpoint FOLDER, whose text it is")
        if self.checkpoint is not None and self.data is None and not (Path(self.checkpoint) / HELD_OUT).is_file():
            raise SpecmdError(f"{self.checkpoint} has no {HELD_OUT}: expected --data FOLDER, with held-out text for it")
