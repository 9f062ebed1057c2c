"""What there is to say about the training of a predictor, from ids or from activations.

Imports no JAX before the settings are checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.learn.splits import UNITS

ENGINES = {
    "auto": "host where JAX has no accelerator, jax elsewhere",
    "host": "compiled loops, on all cores",
    "jax": "one JAX program for each update",
}
BATCHES = {"host": 128, "jax": 256}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights besides the trace."""

    head: str
    split: str = "category"
    seed: int = 0
    validation: float = 0.1  # expected share of the groups
    test: float = 0.2
    fade: float = 0.85  # of the evictor's label, per visit
    epochs: int = 6
    batch: int = 0  # tokens; 0: 128 on the host, 256 in JAX
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    hidden: int = 32
    width: int = 64
    topics: int = 64
    drop: float = 0.1
    every: int = 4  # a target layer learns from one in so many tokens of a batch, in turn; in JAX, from all of them
    window_bytes: int = 1 << 30  # of examples that are shuffled together; a longer trace has several windows
    engine: str = "auto"  # loops on the host, or JAX; a key of ENGINES

    def check(self) -> None:
        """Raises SpecmdError for numbers that make no sense."""
        from specmd_jax.policies.trained import HEADS  # brings JAX

        if self.head not in HEADS:
            raise unknown("head", self.head, HEADS)
        if self.split not in UNITS:
            raise unknown("unit of a split", self.split, UNITS)
        if self.engine not in ENGINES:
            raise unknown("engine of training", self.engine, ENGINES)
        for name in ("epochs", "hidden", "width", "topics", "every", "window_bytes"):
            if getattr(self, name) < 1:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("fade", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected 0 up to, but not including, 1")
        if not 0 < self.learning_rate < 1 or self.weight_decay < 0 or self.seed < 0:
            raise SpecmdError("expected a learning rate between 0 and 1, and neither weight decay nor seed below 0")
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise SpecmdError(
                f"validation is {self.validation} and test is {self.test}, expected shares that leave some to train on"
            )
        if self.batch < 0:
            raise SpecmdError(f"batch is {self.batch}, expected at least 0")


@dataclass(frozen=True)
class MapSettings:
    """Everything that decides a map besides what it is shown. ``rank`` 0 is a full matrix."""

    rank: int = 0
    epochs: int = 20
    batch: int = 256  # tokens
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0

    def check(self) -> None:
        """Raises SpecmdError for numbers that make no sense."""
        for name, least in (("rank", 0), ("epochs", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 < self.learning_rate < 1 or self.weight_decay < 0:
            raise SpecmdError("expected a learning rate between 0 and 1, and no weight decay below 0")


@dataclass(frozen=True)
class CacheSettings:
    """Everything that decides weights that are moved through a soft cache, besides trace, cache and machine."""

    split: str = "category"
    seed: int = 0
    updates: int = 120
    rounds: int = 6  # of validation and of checkpoints
    batch: int = 8  # windows
    tokens: int = 64  # of a window
    learning_rate: float = 5e-3
    hot: float = 0.5  # first and last temperature, in logits
    cold: float = 0.15
    count: int = 4  # experts of the next layer that a prefetcher asks for

    def check(self) -> None:
        """Raises SpecmdError for numbers that make no sense."""
        if self.split not in UNITS:
            raise unknown("unit of a split", self.split, UNITS)
        for name in ("updates", "rounds", "batch", "tokens", "count"):
            if getattr(self, name) < 1:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "hot", "cold"):
            if not getattr(self, name) > 0:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected above 0")

    def measure(self, timed: bool) -> str:
        """Says what falls."""
        return "stall, in copies over demand," if timed else "misses over demand"
