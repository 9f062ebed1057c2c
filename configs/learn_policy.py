"""Settings of `experiments.learn_policy`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from specmd_jax.soft.search import METHODS, TUNED, Search


@dataclass(frozen=True)
class LearnPolicyConfig:
    """What is searched and replayed. Every field decides the table, so all of them go into its manifest."""

    trace: str = "gpt-oss-20b"  # a bundled trace, or the path of a trace file
    capacities: tuple[str, ...] = ("6 slots/layer", "8 slots/layer")  # in total; the search moves slots between layers
    split: str = "category"
    methods: tuple[str, ...] = METHODS
    tuned: tuple[str, ...] = TUNED
    search: Search = field(default_factory=Search)
    draws: int = 2000  # of the bootstrap over requests
    requests: int = 0  # only the first ones; 0: all of them
    tokens: int = 0  # only the first ones of each request; 0: all of them

    def smoke(self) -> LearnPolicyConfig:
        """The same study in seconds."""
        small = replace(self.search, steps=4, batch=2, rounds=2, population=2)
        return replace(
            self, capacities=("6 slots/layer",), tuned=("both",), search=small, draws=100, requests=8, tokens=12
        )
