"""Settings of `experiments.benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.options import TRACES, Settings, fixed


@dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """How much each section measures. Every field decides the table, so all of them go into its manifest."""

    repeats: int = fixed(3, "the median of so many runs is reported", least=1)
    capacities: int = fixed(256, "of the side-by-side replays", least=1)
    trace: str = fixed("gpt-oss-20b", "recorded routing", names=TRACES)
    trace_tokens: int = fixed(2_000, "of the recorded routing", least=1)
    synthetic_tokens: int = fixed(1_000, "16 layers of 64 experts, top-8, as OLMoE has them", least=1)
    rival_accesses: int = fixed(20_000, "that a pure-Python rival is given, at `rival_slots_pct`", least=1)
    rival_slots_pct: float = fixed(25.0, "cache of the rivals, in % of all experts", above=0)
    curve_capacities: int = fixed(1_024, "that one pass counts", least=1)
    curve_decays: int = fixed(4, "values of lfu_decay's number that one pass counts", least=1)
    engine_tokens: int = fixed(40, "that the scan replays", least=1)
    cpu_configurations: int = fixed(256, "that the scan replays at once on a CPU", least=1)
    gpu_configurations: int = fixed(4_096, "that are replayed at once on a GPU", least=1)
    gpu_scaling: tuple[int, ...] = fixed((128, 1_024, 16_384), "further numbers of configurations", least=1)
    shapes: tuple[tuple[int, int, int], ...] = fixed(
        ((16, 64, 8), (48, 128, 8), (61, 256, 8)), "layers, experts and top-k of the section growth", least=1
    )
    shape_visits: int = fixed(488, "of each shape", least=1)
    stream_tokens: tuple[int, ...] = fixed((100_000, 1_000_000), "lengths of the streamed traces", least=1)
    stream_capacities: int = fixed(16, "of the streamed replays", least=1)
    study_cells: int = fixed(1_000_000, "of the whole study", least=1)
    study_tokens: int = fixed(1_000, "of each of its cells", least=1)
    study_axes: tuple[int, int, int] = fixed(
        (16, 4, 4), "capacities, links and policy numbers of the measured slice", least=1
    )
    gpu_study_axes: tuple[int, int, int] = fixed((64, 16, 16), "the same on a GPU", least=1)
    gpu_study_whole: tuple[int, int, int] = fixed((1_000, 40, 25), "the whole study on a GPU", least=1)
    job: tuple[str, ...] = fixed((), "further options of the main job")

    def smoke(self) -> BenchmarkConfig:
        """Gives each of `SMOKE_SECTIONS` in seconds; its numbers say nothing."""
        return replace(
            self,
            repeats=1,
            capacities=8,
            trace_tokens=20,
            synthetic_tokens=20,
            rival_accesses=500,
            curve_capacities=8,
            curve_decays=2,
            engine_tokens=1,
            cpu_configurations=4,
            gpu_configurations=4,
            gpu_scaling=(2,),
            shapes=((2, 8, 2), (4, 8, 2)),
            shape_visits=16,
            stream_tokens=(300,),
            stream_capacities=2,
            study_axes=(2, 2, 2),
            gpu_study_axes=(2, 2, 2),
            gpu_study_whole=(2, 2, 2),
            job=("--smoke", "--evictions", "lru", "--capacities", "2"),
        )


SMOKE_SECTIONS = ("libcachesim", "policylang", "curves", "memory")
"""Those that ``--smoke`` measures unless told otherwise: the others compile for longer."""

FULL_STREAM_TOKENS = (10_000_000,)
"""Streamed besides with ``--full``."""
