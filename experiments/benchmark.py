"""How fast is it? Ratios measured side by side in one run, on this machine.

    python -m experiments.benchmark                          # everything: some minutes
    python -m experiments.benchmark --smoke                  # seconds, some sections: see that it works
    python -m experiments.benchmark --only engine,growth     # some sections
    python -m experiments.benchmark --only memory --full     # streams 10 million tokens too: up to half an hour

Sections: libcachesim, policylang (against these two, if they are installed: ``pip install libcachesim
moe-policylang``), curves (every capacity in one pass), engine (the scan with prefetch and time, and on a GPU its
program), growth (the cost of a visit over layers and experts), job (the main sweep from the shell), memory (a streamed
trace), study (a million cells; on a CPU extrapolated from a slice). Writes rows.csv (one row per number) and
manifest.json (machine and versions) to results/benchmark and prints the rows. Sections that the table already has are
not measured again; --overwrite begins a new one.

Each number is the median of some repeats after a first, unmeasured one that compiles. Times of a machine that does
other work besides are worth little; ratios of one run are worth more.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from configs.benchmark import FULL_STREAM_TOKENS, SMOKE_SECTIONS, BenchmarkConfig
from experiments.benchmarks.simulator import processes, replays, rivals
from experiments.common.cluster import add_cpu_devices, cores, split_cpu
from experiments.common.command_line import main_guard, parser, results_folder
from experiments.common.options import names
from specmd_jax.errors import find
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.benchmark import TABLE, line
from specmd_jax.report.reader import ROWS, read_rows
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


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "benchmark")
    options.add_argument(
        "--only", type=names, metavar="A,B", help=f"sections; some of: {', '.join(SECTIONS)} (default: all)"
    )
    options.add_argument("--full", action="store_true", help="stream 10 million tokens too")
    add_cpu_devices(options)
    args = options.parse_args(argv)
    sections = [find("section", name, SECTIONS) for name in args.only or (SMOKE_SECTIONS if args.smoke else SECTIONS)]
    split_cpu(args.cpu_devices)
    config = BenchmarkConfig().smoke() if args.smoke else BenchmarkConfig()
    if args.full:
        config = replace(config, stream_tokens=config.stream_tokens + FULL_STREAM_TOKENS)
    out = results_folder(options, args)
    described = {**asdict(config), "machine": machine()}
    with ResultWriter(out, described, TABLE, args.overwrite) as writer:
        there = {str(row["section"]) for row in read_rows(out, ["section"])} if writer.rows else set()
        for name in sections:
            if name in there:
                print(f"{name}: already in {out}; --overwrite begins a new table")
                continue
            for row in SECTIONS[name](config):
                writer.write({"section": name, **row})
                print(line({"section": name, **row}), flush=True)
    print(out / ROWS)


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


if __name__ == "__main__":
    main_guard(main)
