"""What there is to say about a search for the numbers of `weighted` and the layers' budgets. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass, fields

from specmd_jax.errors import SpecmdError

METHODS = ("gradient", "evolution", "random")
TUNED = ("weights", "budgets", "both")
GRADIENT_REPLAYS = 3  # measured: 2.7 times the time of the replay alone


@dataclass(frozen=True)
class Search:
    """What decides a search besides the requests."""

    steps: int = 64  # updates by gradient; the other methods make as many as cost the same number of replays
    batch: int = 8  # requests per update
    rounds: int = 8  # of validation and of checkpoints
    learning_rate: float = 0.06  # of Adam, in units of the spreads
    evolution_rate: float = 0.15  # the same, for evolution's fewer updates
    hot: float = 0.1  # first and last temperature of a search by gradient
    cold: float = 0.01
    population: int = 12  # points per update, of evolution and random search
    mutation: float = 0.15  # of evolution, in units of the spreads
    weight_spread: float = 1.0  # standard deviation of random search's weights ...
    budget_spread: float = 0.3  # ... and of its budgets' logarithms
    seed: int = 0
    fast_decay: float = 0.7
    slow_decay: float = 0.95

    def check(self) -> None:
        """Raises SpecmdError for numbers that make no sense."""
        for name in ("steps", "batch", "rounds", "population"):
            if getattr(self, name) < 1:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.population % 2:
            raise SpecmdError(f"population is {self.population}, expected an even number: points come in pairs")
        rates = ("learning_rate", "evolution_rate", "hot", "cold", "mutation", "weight_spread", "budget_spread")
        for name in rates:
            if not getattr(self, name) > 0:
                raise SpecmdError(f"{name} is {getattr(self, name)}, expected above 0")
        for field in fields(self):
            if field.name.endswith("decay") and not 0 <= getattr(self, field.name) < 1:
                raise SpecmdError(f"{field.name} is {getattr(self, field.name)}, expected 0 up to 1")

    def updates(self, method: str) -> int:
        """Says how many updates a method makes at the price of `steps` gradients."""
        if method == "gradient":
            return self.steps
        return max(1, self.steps * GRADIENT_REPLAYS // self.population)

    def replays(self, method: str) -> int:
        """Gives the price of a search in replays of a request, validation left out."""
        each = GRADIENT_REPLAYS if method == "gradient" else self.population
        return self.updates(method) * self.batch * each
