"""The work of `experiments.benchmark`: its sections, and the machine that they ran on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from configs.benchmark import BenchmarkConfig
from experiments.benchmarks.simulator import processes, replays, rivals
from experiments.common.cluster import cores
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.benchmark import TABLE, draw, line
from specmd_jax.report.reader import read_rows
from specmd_jax.report.writer import ResultWriter

Section = Callable[[BenchmarkConfig], Iterator[Row]]

SECTIONS: dict[str, Section] = {
    "libcachesim": rivals.against_libcachesim,
    "policylang": rivals.against_policylang,
    "curves": rivals.one_pass,
    "engine": replays.engine,
    "growth": replays.growth,
    "job": processes.main_job,
    "memory": processes.memory,
    "study": replays.study,
}


def run(config: BenchmarkConfig, sections: Sequence[str], out: Path, *, overwrite: bool) -> None:
    """Measures the sections that the table in `out` lacks, and prints each number as it comes."""
    described = {**asdict(config), "machine": machine()}
    with ResultWriter(out, described, TABLE, overwrite) as writer:
        there = {str(row["section"]) for row in read_rows(out, ["section"])} if writer.rows else set()
        for name in sections:
            if name in there:
                print(f"{name}: already in {out}; --overwrite begins a new table")
                continue
            for row in SECTIONS[name](config):
                writer.write({"section": name, **row})
                print(line({"section": name, **row}), flush=True)
    print(*draw(out).splitlines()[-3:], sep="\n")  # the files: the lines are there already


def machine() -> dict[str, Any]:
    """Gives what the numbers depend on besides the code."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": cores(),
        "device": f"{len(jax.devices())} x {device.platform} {device.device_kind}",
        "system": platform.platform(),
        **{name: _version(name) for name in ("numba", "libcachesim", "moe-policylang")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
