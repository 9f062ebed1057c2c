"""Whole jobs in processes of their own: the main sweep from the shell, memory of a streamed trace."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.benchmark import BenchmarkConfig
from experiments.benchmarks.simulator.rows import row
from experiments.benchmarks.simulator.workload import olmoe, slots_of, slots_range
from experiments.common.subprocesses import ROOT, last_line, workers
from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row
from specmd_jax.trace.stream import save_stretches
from specmd_jax.trace.synthetic import relabelled


def main_job(config: BenchmarkConfig) -> Iterator[Row]:
    """Times the main sweep from the shell, with nothing compiled and again."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"XDG_CACHE_HOME": folder, "NUMBA_CACHE_DIR": str(Path(folder) / "numba")}
        environment = {**os.environ, **caches, "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "xla")}
        for run in ("first run, nothing compiled", "second run"):
            command = [
                sys.executable,
                "-m",
                "experiments.sweep",
                "--out",
                str(Path(folder) / run.split()[0]),
                *config.job,
            ]
            began = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            took = time.perf_counter() - began
            if done.returncode:
                raise SpecmdError(f"{' '.join(command)} failed: {last_line(done.stderr)}")
            shown = " ".join(["python -m experiments.sweep", *config.job])
            yield row(f"{shown}: {run}", took, "s", contract="event", repeats=1)


def memory(config: BenchmarkConfig) -> Iterator[Row]:
    """Measures the peak resident memory of streamed curves over the length of the trace."""
    base = olmoe(min(500, min(config.stream_tokens)), requests=8)
    slots = slots_of(base, config.stream_capacities)
    where: dict[str, Any] = {"contract": "event", "repeats": 1, **slots_range(base, slots)}
    with tempfile.TemporaryDirectory() as folder:
        for tokens in config.stream_tokens:
            path = Path(folder) / f"{tokens}.npz"
            parts = (replace(part, gates=None) for part in relabelled(base, tokens))
            save_stretches(parts, path, compress=False)
            took, (result,) = workers([{"job": "stream", "trace": str(path), "policy": "lru", "slots": slots}])
            title = f"lru at {len(slots)} capacities, 16x64 top-8, {tokens:,} tokens streamed"
            note = (
                f"file of {path.stat().st_size / 1e6:,.0f} MB; {result['before_bytes'] / 1e6:,.0f} MB before it is read"
            )
            yield row(f"{title}: peak resident memory", result["peak_bytes"] / 1e6, "MB", note=note, **where)
            yield row(f"{title}: time", took, "s", note=f"{tokens / took:,.0f} tokens/s", **where)
            path.unlink()
