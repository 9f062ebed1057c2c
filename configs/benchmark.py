"""Settings of `experiments.benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BenchmarkConfig:
    """How much each section measures. Every field decides the table, so all of them go into its manifest."""

    repeats: int = 3  # the median is reported
    capacities: int = 256
    trace: str = "gpt-oss-20b"
    trace_tokens: int = 2_000
    synthetic_tokens: int = 1_000  # 16 layers of 64 experts, top-8, as OLMoE has them
    rival_accesses: int = 20_000  # that a pure-Python rival is given, at `rival_slots_pct`
    rival_slots_pct: float = 25.0
    curve_capacities: int = 1_024
    curve_decays: int = 4
    engine_tokens: int = 40
    cpu_configurations: int = 256
    gpu_configurations: int = 4_096
    gpu_scaling: tuple[int, ...] = (128, 1_024, 16_384)  # further numbers of configurations
    shapes: tuple[tuple[int, int, int], ...] = ((16, 64, 8), (48, 128, 8), (61, 256, 8))  # layers, experts, top-k
    shape_visits: int = 488
    stream_tokens: tuple[int, ...] = (100_000, 1_000_000)
    stream_capacities: int = 16
    study_cells: int = 1_000_000
    study_tokens: int = 1_000
    study_axes: tuple[int, int, int] = (16, 4, 4)  # capacities, links and policy numbers of the measured slice
    gpu_study_axes: tuple[int, int, int] = (64, 16, 16)
    gpu_study_whole: tuple[int, int, int] = (1_000, 40, 25)
    job: tuple[str, ...] = ()  # further options of the main job

    def smoke(self) -> BenchmarkConfig:
        """Each of `SMOKE_SECTIONS` in seconds; its numbers say nothing."""
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
