"""Settings of `experiments.learn_policy`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.options import EVICTIONS, TRACES, UNITS, Names, Setting, Settings, capacity, fixed, option, parts
from specmd_jax.soft.settings import METHODS, TUNED, Search

SCORED = replace(EVICTIONS, also=("none",))


@dataclass(frozen=True)
class LearnPolicyConfig(Settings):
    """What is searched and replayed. Every field decides the table, so all of them go into its manifest."""

    trace: str = option("gpt-oss-20b", "routing to learn from and to judge on", names=TRACES, metavar="TRACE")
    capacities: tuple[str, ...] = option(
        ("6 slots/layer", "8 slots/layer"),
        "total cache sizes, such as 25%,'2 cycles'; the search moves slots between layers",
        check=capacity,
    )
    on: str = option(
        "none",
        "policy whose own scores are weighed together with the features, such as adaptive: the search begins at it",
        names=SCORED,
    )
    split: str = option("category", "what of a trace stays together: requests are held out by it", names=UNITS)
    methods: tuple[str, ...] = fixed(METHODS, "kinds of search", names=Names("method of search", also=METHODS))
    tuned: tuple[str, ...] = fixed(TUNED, "what is searched for", names=Names("thing to tune", also=TUNED))
    search: Search = field(
        default=Search(),
        metadata=parts(
            {
                "steps": Setting(
                    "updates by gradient; the other searches make as many as cost the same number of replays", least=1
                ),
                "seed": Setting("seed of the split and of the searches", least=0),
            }
        ),
    )
    draws: int = fixed(2000, "of the bootstrap over requests", least=1)
    requests: int = fixed(0, "only the first ones; 0: all of them", least=0)
    tokens: int = fixed(0, "only the first ones of each request; 0: all of them", least=0)

    def smoke(self) -> LearnPolicyConfig:
        """Gives the same study in seconds."""
        small = replace(self.search, steps=4, batch=2, rounds=2, population=2)
        return replace(
            self, capacities=("6 slots/layer",), tuned=("both",), search=small, draws=100, requests=8, tokens=12
        )
