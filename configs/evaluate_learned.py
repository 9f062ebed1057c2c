"""Settings of `experiments.evaluate_learned`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EvaluateConfig:
    """What is replayed. Every field decides the table, so all of them go into its manifest."""

    trace: str = "gpt-oss-20b"  # a bundled trace, or the path of a trace file
    checkpoint: str = ""  # a folder with evictor.npz and prefetcher.npz, or one of these; "": those of the package
    scopes: tuple[str, ...] = ("layer", "global")
    capacities: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("layer", ("18.75%", "25%", "50%")),
        ("global", ("10%", "25%", "50%")),
    )
    counts: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)  # predicted experts a layer, in units of K
    horizons: tuple[int, ...] = (1, 2, 4, 8, 0)  # layers ahead; 0: all of them, the next token
    shift: int = 24 * 5 + 1  # visits by which the control moves predictions
    links: tuple[str, ...] = ("0.5",)  # layer times of one expert's copy, or the name of a hardware preset
    hardware: str = "pcie4-x16"  # computation, and the link where that is not given
    stall_capacity: str = "25%"
    overfetch: float = 1.0  # experts asked for a layer, in units of K; best on validation requests, as the horizon
    horizon: int = 2  # layers ahead, at most L - 1
    stall_requests: int = 16  # at most, the first ones: timed replays are slow
    control_requests: int = 6  # likewise, for scores given anew at every visit
    runs: tuple[int, ...] = (1, 2, 4, 8)  # tokens, of the leakage check
    requests: int = 0  # at most, of those held out; 0: all of them
    tokens: int = 0  # at most, of each; 0: all of them

    def smoke(self) -> EvaluateConfig:
        """The same study in seconds."""
        return replace(
            self,
            scopes=("layer",),
            capacities=(("layer", ("25%",)),),
            horizons=(1, 0),
            requests=2,
            tokens=12,
            runs=(1,),
        )
