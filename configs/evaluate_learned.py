"""Settings of `experiments.evaluate_learned`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import HARDWARE, SCOPES, TRACES, Settings, capacity, fixed, machine, option
from specmd_jax.errors import SpecmdError


def for_every_scope(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Gives the same capacities, a list with commas between, in each scope."""
    sizes = tuple(part.strip() for part in text.split(",") if part.strip())
    return tuple((scope, sizes) for scope in SCOPES.known())


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """What is replayed. Every field decides the table, so all of them go into its manifest."""

    trace: str = option("gpt-oss-20b", "routing to replay", names=TRACES, metavar="TRACE")
    checkpoint: str = option(
        "",
        "weights to judge: a folder with evictor.npz and prefetcher.npz, or one of these files",
        metavar="PATH",
        shown="those of the package",
    )
    scopes: tuple[str, ...] = option(
        ("layer", "global"), "caches: one pool per layer, or one pool for all", names=SCOPES, alias="scope"
    )
    capacities: tuple[tuple[str, tuple[str, ...]], ...] = option(
        (("layer", ("18.75%", "25%", "50%")), ("global", ("10%", "25%", "50%"))),
        "cache sizes in every scope, such as 25%,'8 slots/layer'",
        metavar="A,B",
        shown="18.75%,25%,50% in scope layer, 10%,25%,50% in scope global",
        read=for_every_scope,
        alias="capacity",
    )
    counts: tuple[float, ...] = fixed((1.0, 1.5, 2.0, 3.0), "predicted experts per layer, in units of K", above=0)
    horizons: tuple[int, ...] = fixed((1, 2, 4, 8, 0), "layers ahead; 0: all of them, the next token", least=0)
    shift: int = fixed(24 * 5 + 1, "visits by which the control moves predictions", least=0)
    links: tuple[str, ...] = option(
        ("0.5",), "how long one expert's copy takes, in layer times, or the links of hardware presets", alias="link"
    )
    hardware: str = option("pcie4-x16", "the machine, but for a link that --links gives", names=HARDWARE, check=machine)
    stall_capacity: str = fixed("25%", "cache size of the timed replays", check=capacity)
    overfetch: float = fixed(
        1.0, "experts asked for per layer, in units of K; best on validation requests, as the horizon", above=0
    )
    horizon: int = fixed(2, "layers ahead, at most L - 1", least=1)
    evictor_us: float = option(
        6.5, "microseconds that the adaptive eviction takes at a visit, measured (6.2 to 6.8 on an H100)", least=0
    )
    prefetcher_us: float = option(
        24.6, "the same of the adaptive prefetch, its selection included (24.6 on an H100)", least=0
    )
    stall_requests: int = fixed(16, "at most, the first ones: timed replays are slow", least=1)
    control_requests: int = fixed(6, "likewise, for scores given anew at every visit", least=1)
    runs: tuple[int, ...] = fixed((1, 2, 4, 8), "tokens of the leakage check", least=1)
    requests: int = option(0, "at most so many of the requests held out; 0: all of them", least=0)
    tokens: int = fixed(0, "at most so many of each request; 0: all of them", least=0)

    def smoke(self) -> EvaluateConfig:
        """Gives the same study in seconds."""
        return replace(
            self,
            scopes=("layer",),
            capacities=(("layer", ("25%",)), ("global", ("25%",))),
            horizons=(1, 0),
            requests=2,
            tokens=12,
            runs=(1,),
        )

    def check(self) -> None:
        """Raises `SpecmdError` for a scope without capacities, and for capacities and links that cannot be read."""
        sizes = dict(self.capacities)
        for scope in self.scopes:
            if not sizes.get(scope):
                raise SpecmdError(f"capacities has none for scope {scope!r}, expected at least one")
            for text in sizes[scope]:
                capacity(text)
        for text in self.links:
            link_of(text)


def link_of(text: str) -> float | str:
    """Reads a number of layer times, or the name of a hardware preset; raises `SpecmdError`."""
    try:
        times = float(text)
    except ValueError:
        machine(text)
        return HARDWARE.find(text)
    if not 0 < times < float("inf"):
        raise SpecmdError(f"link is {text}, expected layer times above 0")
    return times
