"""How fast is it? Ratios measured side by side in one run, on this machine.

    python -m experiments.benchmark                          # everything: some minutes
    python -m experiments.benchmark --smoke                  # seconds, some sections: see that it works
    python -m experiments.benchmark --only engine,growth     # some sections
    python -m experiments.benchmark --only memory --full     # streams 10 million tokens too: up to half an hour

Sections: libcachesim, policylang (against these two, if they are installed: ``pip install libcachesim
moe-policylang``), curves (every capacity in one pass), engine (the scan with prefetch and time, and on a GPU the
kernel), growth (cost a visit over layers and experts), job (the main sweep from the shell), memory (a streamed trace),
study (a million cells; on a CPU extrapolated from a slice). Writes rows.csv (a row a number) and manifest.json (machine
and versions) to results/benchmark and prints the rows. Sections that the table already has are not measured again;
--overwrite begins a new one.

Each number is the median of some repeats after a first, unmeasured one that compiles. Times of a machine that does
other work besides are worth little; ratios of one run are worth more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.benchmark import FULL_STREAM_TOKENS, SMOKE_SECTIONS, BenchmarkConfig
from experiments.common.cluster import cores, join
from experiments.common.command_line import main_guard, parser, results_folder
from specmd_jax.api import make_mix, replay_options, replayer
from specmd_jax.engines.curves import curves
from specmd_jax.engines.devices import devices, everywhere, replay_spread
from specmd_jax.engines.gpu_columns import Tape, tape
from specmd_jax.engines.prepared import Replays, prepare
from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.replay.step import Visit
from specmd_jax.report.table import ROWS, Column, ResultWriter, Row, read_rows
from specmd_jax.schedule.demand import pack
from specmd_jax.specs.hardware import hardware
from specmd_jax.trace import store, synthesize
from specmd_jax.trace.stream import save_stretches
from specmd_jax.trace.synthetic import relabelled
from specmd_jax.types import NEVER, Schedule, Trace

ROOT = Path(__file__).resolve().parents[1]
MACHINE = "pcie4-x16"

COLUMNS: dict[str, Column] = {
    "section": Column("str", "what is compared"),
    "what": Column("str", "what is measured"),
    "value": Column("float", "the number"),
    "unit": Column("str", "its unit"),
    "evidence": Column("str", "measured; counted (exact); extrapolated (from a measured slice)"),
    "contract": Column("str", "event or sequential, where a trace is replayed"),
    "capacity_slots": Column("str", "slots of the cache, or their range"),
    "cycles": Column("str", "C/T: capacity over what a token needs in all layers, or its range"),
    "repeats": Column("int", "runs that the median is taken over"),
    "note": Column("str", "what else there is to know"),
}
KEY = ("section", "what")

Section = Callable[[BenchmarkConfig], Iterator[Row]]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "benchmark")
    options.add_argument("--only", metavar="A,B", help=f"some of: {', '.join(SECTIONS)} (default: all)")
    options.add_argument("--full", action="store_true", help="stream 10 million tokens too")
    options.add_argument("--cpu-devices", type=int, metavar="N", help="parts a CPU works in (default: its cores)")
    args = options.parse_args(argv)
    join(argparse.Namespace(cluster=False, coordinator=None, num_processes=None, process_id=None, **vars(args)))
    names = [name.strip() for name in args.only.split(",") if name.strip()] if args.only else []
    for name in names:
        if name not in SECTIONS:
            raise unknown("section", name, SECTIONS)
    names = names or list(SMOKE_SECTIONS if args.smoke else SECTIONS)
    config = BenchmarkConfig().smoke() if args.smoke else BenchmarkConfig()
    if args.full:
        config = replace(config, stream_tokens=config.stream_tokens + FULL_STREAM_TOKENS)
    out = results_folder(options, args)
    described = {**asdict(config), "machine": machine()}
    with ResultWriter(out, described, COLUMNS, args.overwrite, key=KEY) as writer:
        there = {str(row["section"]) for row in read_rows(out, ["section"])} if writer.rows else set()
        for name in names:
            if name in there:
                print(f"{name}: already in {out}; --overwrite begins a new table")
                continue
            for row in SECTIONS[name](config):
                writer.write({"section": name, **row})
                print(_line({"section": name, **row}), flush=True)
    print(out / ROWS)


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
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


def _row(what: str, value: float, unit: str, evidence: str = "measured", **rest: Any) -> Row:
    empty: Row = {"contract": None, "capacity_slots": None, "cycles": None, "repeats": None, "note": None}
    return {"what": what, "value": float(value), "unit": unit, "evidence": evidence, **empty, **rest}


def _line(row: Row) -> str:
    value = row["value"]
    assert isinstance(value, float)
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    size = f", {row['capacity_slots']} slots (C/T {row['cycles']})" if row["capacity_slots"] else ""
    how = f"{row['evidence']}, {row['contract']}{size}" if row["contract"] else row["evidence"]
    note = f"; {row['note']}" if row["note"] else ""
    return f"{row['section']:>12}: {row['what']}: {shown} {row['unit']} [{how}]{note}"


def median_s(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that is not measured."""
    jax.block_until_ready(call())
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def workers(jobs: Sequence[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the slowest of some jobs of `_bench_worker` side by side, begun when all are ready, and what they
    print.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments._bench_worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for job in jobs
    ]
    try:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SpecmdError(f"a worker did not begin: {_last_line(process.communicate()[1])}")
        for process in running:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate() for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        if process.returncode:
            raise SpecmdError(f"a worker ended with status {process.returncode}: {_last_line(errors)}")
    results = [json.loads(output) for output, _ in outputs]
    return max(result["seconds"] for result in results), results


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def olmoe(tokens: int, **changes: Any) -> Trace:
    """Synthetic routing in the shape of OLMoE-1B-7B."""
    return synthesize(**{"layers": 16, "experts": 64, "top_k": 8, "tokens": tokens, **changes})


def traces(config: BenchmarkConfig) -> dict[str, Trace]:
    """The two that the rivals are compared on."""
    recorded = store.first_tokens(store.bundled(config.trace), config.trace_tokens)
    return {
        f"{config.trace}, {recorded.tokens} tokens": recorded,
        f"synthetic 16x64 top-8, {config.synthetic_tokens} tokens": olmoe(config.synthetic_tokens),
    }


def slots_of(trace: Trace, count: int) -> list[int]:
    """Evenly spaced slot counts up to all experts."""
    most = trace.layers * trace.experts
    return sorted({round(size) for size in np.linspace(max(1, most / count), most, count).tolist()})


def _range(trace: Trace, slots: Sequence[int]) -> dict[str, str]:
    cycle = trace.layers * trace.top_k
    if len(slots) == 1:
        return {"capacity_slots": str(slots[0]), "cycles": f"{slots[0] / cycle:.2f}"}
    return {
        "capacity_slots": f"{slots[0]} to {slots[-1]}",
        "cycles": f"{slots[0] / cycle:.2f} to {slots[-1] / cycle:.2f}",
    }


def flat_accesses(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids of a sequential schedule in order, and the index of the next access to the same one (NEVER: none)."""
    demand = pack(schedule)
    assert (np.diff(demand.start) == 1).all()
    return demand.flat, demand.next_use


# ------------------------------------------------------------------------------------------------- the rivals


def against_libcachesim(config: BenchmarkConfig) -> Iterator[Row]:
    """Total time of all capacities; both use all cores, and the rival's processes start before the clock does."""
    installed = util.find_spec("libcachesim") is not None
    if not installed:
        print("libcachesim is not installed (pip install libcachesim): only our side is measured")
    for name, trace in traces(config).items():
        schedule = prepare(trace, contract="sequential").schedule
        demand, units, slots = pack(schedule), np.ones(trace.layers, np.int64), slots_of(trace, config.capacities)
        where: dict[str, Any] = {"contract": "sequential", "repeats": config.repeats, **_range(trace, slots)}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.oracleGeneral.bin"
            write_oracle_general(schedule, path)
            parts = [slots[i :: cores()] for i in range(min(cores(), len(slots)))]
            rivals: dict[str, list[tuple[float, list[dict[str, Any]]]]] = {}
            # the rival's frequency starts anew when an object comes back, as `lfu_resident` counts
            for policy, ours in (("lru", "lru"), ("lfu", "lfu"), ("lfu", "lfu_resident"), ("belady", "belady")):
                mine = partial(curves, schedule, units, slots, ours, demand=demand)
                title = f"{ours} at {len(slots)} capacities, {name}"
                hits = [int(curve.hits.sum()) for curve in mine()]
                mine_s = median_s(mine, config.repeats)
                yield _row(f"{title}: specmd-jax", mine_s, "s", **where)
                if not installed:
                    continue
                job = {"job": "libcachesim", "policy": policy, "trace": str(path), "requests": demand.flat.size}
                if policy not in rivals:
                    rivals[policy] = [
                        workers([{**job, "sizes": part} for part in parts]) for _ in range(config.repeats)
                    ]
                runs = rivals[policy]
                rival_s = statistics.median(took for took, _ in runs)
                theirs = {
                    size: found
                    for part, result in zip(parts, runs[0][1], strict=True)
                    for size, found in zip(part, result["hits"], strict=True)
                }
                gaps = [abs(theirs[size] - found) for size, found in zip(slots, hits, strict=True)]
                yield _row(f"{title}: libcachesim {policy}", rival_s, "s", note=f"{len(parts)} processes", **where)
                yield _row(f"{title}: libcachesim / specmd-jax", rival_s / mine_s, "x", **where)
                counts = {**where, "repeats": None, "note": _difference(ours, gaps, sum(hits))}
                differing = sum(gap > 0 for gap in gaps)
                yield _row(f"{title}: capacities whose hits differ", differing, f"of {len(slots)}", "counted", **counts)


def _difference(ours: str, gaps: Sequence[int], hits: int) -> str | None:
    if not any(gaps):
        return f"{hits} hits over all capacities, the same on both sides"
    why = {
        "lfu": "our lfu counts over the whole history, libcachesim's from the last load",
        "lfu_resident": "experts of the same count leave in another order",
    }.get(ours, "not expected")
    return f"{sum(gaps) / max(hits, 1):.2%} of all hits, {max(gaps)} at most: {why}"


def write_oracle_general(schedule: Schedule, path: Path) -> None:
    """libCacheSim's format of 24 bytes a request: time u32, id u64, size u32, next access i64 (-1: none)."""
    flat, after = flat_accesses(schedule)
    rows = np.zeros(flat.size, np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]))
    rows["time"], rows["id"], rows["size"] = np.arange(flat.size), flat, 1
    rows["next"] = np.where(after == NEVER, -1, after)
    rows.tofile(path)


def against_policylang(config: BenchmarkConfig) -> Iterator[Row]:
    """Nanoseconds an access and capacity, one core each: its caches take one capacity, our curves all of them."""
    if util.find_spec("moe_policylang") is None:
        print("moe-policylang is not installed (pip install moe-policylang): section left out")
        return
    for name, trace in traces(config).items():
        schedule = prepare(trace, contract="sequential").schedule
        demand, units, all_slots = pack(schedule), np.ones(trace.layers, np.int64), slots_of(trace, config.capacities)
        slots = max(1, round(trace.layers * trace.experts * config.rival_slots_pct / 100))
        some = slots_first(schedule, config.rival_accesses)
        flat = pack(some).flat
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "accesses.npy"
            np.save(path, flat)
            for policy, ours in (("lru", "lru"), ("lfu", "lfu_resident")):
                where: dict[str, Any] = {"contract": "sequential", "repeats": config.repeats}
                job = {"job": "policylang", "policy": policy, "accesses": str(path), "slots": slots}
                runs = [workers([job]) for _ in range(config.repeats)]
                rival_ns = statistics.median(took for took, _ in runs) / flat.size * 1e9
                at_one = _range(trace, [slots])
                yield _row(f"moe-policylang {policy}, {name}", rival_ns, "ns an access", **at_one, **where)
                for engine, sizes in (
                    (f"{ours} at {len(all_slots)} capacities", all_slots),
                    (f"{ours} alone", [slots]),
                ):
                    mine = partial(curves, schedule, units, sizes, ours, demand=demand)
                    # the curves of lru are one thread's work; those of lfu_resident are dealt to all cores
                    mine_ns = median_s(mine, config.repeats) / demand.flat.size / len(sizes) * 1e9
                    size = _range(trace, sizes)
                    yield _row(f"specmd-jax {engine}, {name}", mine_ns, "ns an access and capacity", **size, **where)
                    yield _row(
                        f"moe-policylang / specmd-jax {engine}, {name}", rival_ns / mine_ns, "x", **size, **where
                    )
                hits = int(curves(some, units, [slots], ours)[0].hits.sum())
                gap = abs(hits - runs[0][1][0]["hits"][0])
                why = f"{hits} hits on both sides" if gap == 0 else "experts of the same count leave in another order"
                yield _row(f"{policy}, {name}: difference in hits", gap, f"of {hits}", "counted", note=why,
                           **at_one, **{**where, "repeats": None})  # fmt: skip


def slots_first(schedule: Schedule, visits: int) -> Schedule:
    """The first visits of a schedule."""
    count = min(visits, schedule.visits)
    names = ("layer", "pass_id", "phase", "request", "tokens", "clock", "starts_pass", "ends_layer", "reset", "counted",
             "count", "mass", "rank", "next_use", "by_mass")  # fmt: skip
    return replace(schedule, **{name: getattr(schedule, name)[:count] for name in names})


# --------------------------------------------------------------------------------------------------- the scan


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def configurations(config: BenchmarkConfig) -> int:
    return config.gpu_configurations if on_gpu() else config.cpu_configurations


def budgets_of(replays: Replays, count: int) -> list[int]:
    """Bytes of `count` caches, evenly spaced from one token cycle to half of all experts."""
    trace = replays.trace
    size, most = int(trace.expert_bytes[0]), trace.layers * trace.experts
    slots = np.linspace(min(trace.layers * trace.top_k, most / 2), most / 2, count)
    return [round(count) * size for count in slots.tolist()]


def engine(config: BenchmarkConfig) -> Iterator[Row]:
    """The scan at many configurations, and on a GPU the kernel: demanded experts x configurations a second."""
    trace, count, available = olmoe(config.engine_tokens), configurations(config), len(jax.devices())
    platform = jax.default_backend()
    repeated: dict[str, Any] = {"contract": "event", "repeats": config.repeats}
    scan: dict[str, float] = {}  # rate on one device
    for name, (eviction, prefetch, timed) in MIXES.items():
        measured, rates = Replay(trace, eviction, prefetch, timed), dict[int, float]()
        for used in sorted({1, available}):
            title = f"{name}, {count} configurations, {used} {platform} device{'s' * (used > 1)}: scan"
            rates[used], rows = measured.speed(title, count, devices(used), config.repeats)
            yield from rows
        scan[name] = rates[1]
        if available > 1:
            yield _row(f"{name}: {available} devices / 1 device", rates[available] / rates[1], "x", **repeated)
    if on_gpu():
        yield from whole_program(config, scan)


def whole_program(config: BenchmarkConfig, scan: Mapping[str, float]) -> Iterator[Row]:
    """The kernel beside the scan; at few configurations its time is that of a program's chain of steps."""
    available, count = len(jax.devices()), config.gpu_configurations
    repeated: dict[str, Any] = {"contract": "event", "repeats": config.repeats}
    for shape, trace in traces(config).items():
        for name, (eviction, prefetch, timed) in MIXES.items():
            measured, rates = Replay(trace, eviction, prefetch, timed, kernel=True), dict[int, float]()
            scanned = trace.model == "synthetic"
            for many in sorted({count, *(config.gpu_scaling if scanned else ())}):
                title = f"{name}, {shape}, {many} configurations, 1 device: kernel"
                rates[many], rows = measured.speed(title, many, devices(1), config.repeats)
                yield from rows
            title = f"{name}, {shape}"
            if available > 1:
                many = max(rates)
                spread = f"{title}, {many} configurations, {available} devices: kernel"
                rate, rows = measured.speed(spread, many, devices(), config.repeats)
                yield from rows
                yield _row(f"{spread} / 1 device", rate / rates[many], "x", **repeated)
            if prefetch != "none":
                note = "predictions of the whole trace and the columns of the schedule, once for all configurations"
                yield _row(f"{title}: tape", median_s(measured.columns, config.repeats), "s", note=note, **repeated)
            if scanned:
                yield _row(f"{title}: kernel / scan", rates[count] / scan[name], "x", **repeated)


MIXES = {
    "demand only (lru)": ("lru", "none", False),
    "prefetch (transition, topk) and time": ("lru", "transition", True),
}


class Replay:
    """A trace and a mix, to be replayed by the scan or by the kernel at some budgets."""

    def __init__(self, trace: Trace, eviction: str, prefetch: str, timed: bool, kernel: bool = False) -> None:
        self.replays, self.mix = prepare(trace), make_mix(trace, eviction=eviction, prefetch=prefetch)
        self.machine, self.kernel = hardware(MACHINE) if timed else None, kernel
        self.choices = self.mix.choices()
        self.setup = self.replays.setup(self.choices, self.machine, **replay_options())

    def columns(self) -> Visit | Tape:
        if self.kernel:
            return tape(self.replays, self.setup, self.choices, self.mix.traced())
        return self.replays.visits(self.setup, self.choices)

    def seconds(self, count: int, mesh: Mesh, repeats: int) -> float:
        """Of one replay of `count` configurations."""
        budgets = budgets_of(self.replays, count)
        sizes = np.stack([self.replays.sizes.budget(budget) for budget in budgets])
        numbers = self.replays.numbers(budgets[0], self.machine)._replace(budget=jnp.asarray(sizes))
        columns, given = everywhere(self.columns(), mesh), self.mix.traced()
        return median_s(
            lambda: replay_spread(self.setup, self.choices, ("budget",), numbers, given, columns, mesh), repeats
        )

    def speed(self, title: str, count: int, mesh: Mesh, repeats: int) -> tuple[float, list[Row]]:
        """Demanded experts x configurations a second, and the rows that say so."""
        trace, schedule = self.replays.trace, self.replays.schedule
        took = self.seconds(count, mesh, repeats)
        rate = int(schedule.demanded.sum()) * count / took
        size = _range(trace, [budget // int(trace.expert_bytes[0]) for budget in budgets_of(self.replays, count)])
        where: dict[str, Any] = {"contract": "event", "repeats": repeats, **size}
        cost = took / schedule.visits / count * 1e6
        return rate, [
            _row(title, rate / 1e6, "M config-accesses/s", **where),
            _row(f"{title}: cost", cost, "us a visit and configuration", **where),
        ]


def one_pass(config: BenchmarkConfig) -> Iterator[Row]:
    """The demand-only curves at every capacity and some decays: one pass a decay, on the host's processor."""
    trace = olmoe(config.synthetic_tokens)
    replays = prepare(trace)
    slots, decays = slots_of(trace, config.curve_capacities), np.linspace(0.5, 0.99, config.curve_decays).tolist()
    demand, units = int(replays.schedule.demanded.sum()), np.ones(trace.layers, np.int64)
    where: dict[str, Any] = {"contract": "event", "repeats": config.repeats, **_range(trace, slots)}

    def draw(policy: str, numbers: dict[str, float]) -> None:
        curves(replays.schedule, units, slots, policy, numbers, demand=replays.demand)

    def grid() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(lambda decay: draw("lfu_decay", {"decay": decay}), decays))

    alone_s = median_s(lambda: draw("lru", {}), config.repeats)
    title = f"lru at {len(slots)} capacities, one pass"
    yield _row(title, demand * len(slots) / alone_s / 1e6, "M config-accesses/s", **where)
    grid_s, cells = median_s(grid, config.repeats), len(slots) * len(decays)
    title = f"lfu_decay at {len(slots)} capacities x {len(decays)} decays, {len(decays)} passes"
    yield _row(title, demand * cells / grid_s / 1e6, "M config-accesses/s", **where)


def growth(config: BenchmarkConfig) -> Iterator[Row]:
    """Cost a visit over models of different shape, the same configurations."""
    count, costs = configurations(config), dict[tuple[int, int, int], float]()
    for shape in config.shapes:
        layers, experts, top_k = shape
        tokens = max(1, config.shape_visits // layers)
        trace = olmoe(tokens, layers=layers, experts=experts, top_k=top_k)
        measured = Replay(trace, "lru", "previous", timed=True, kernel=on_gpu())
        took = measured.seconds(count, devices(), config.repeats)
        costs[shape] = took / measured.replays.schedule.visits / count * 1e6
        where: dict[str, Any] = {"contract": "event", "repeats": config.repeats}
        title = f"{layers}x{experts} top-{top_k}, lru with prefetch (previous) and time, {count} configurations"
        yield _row(title, costs[shape], "us a visit and configuration", **where)
    first = config.shapes[0]
    for shape in config.shapes[1:]:
        ratio = costs[shape] / costs[first]
        names = "{}x{} / {}x{}".format(*shape[:2], *first[:2])
        sums, products = sum(shape[:2]) / sum(first[:2]), shape[0] * shape[1] / (first[0] * first[1])
        note = f"E + L grows {sums:.2f} x, E x L {products:.2f} x"
        yield _row(f"growth of the cost, {names}", ratio, "x", contract="event", repeats=config.repeats, note=note)


# ------------------------------------------------------------------------------------------ jobs and memory


def main_job(config: BenchmarkConfig) -> Iterator[Row]:
    """The main sweep from the shell, with nothing compiled and again."""
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
                raise SpecmdError(f"{' '.join(command)} failed: {_last_line(done.stderr)}")
            shown = " ".join(["python -m experiments.sweep", *config.job])
            yield _row(f"{shown}: {run}", took, "s", contract="event", repeats=1)


def memory(config: BenchmarkConfig) -> Iterator[Row]:
    """Peak resident memory of streamed curves over the length of the trace."""
    base = olmoe(min(500, min(config.stream_tokens)), requests=8)
    slots = slots_of(base, config.stream_capacities)
    where: dict[str, Any] = {"contract": "event", "repeats": 1, **_range(base, slots)}
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
            yield _row(f"{title}: peak resident memory", result["peak_bytes"] / 1e6, "MB", note=note, **where)
            yield _row(f"{title}: time", took, "s", note=f"{tokens / took:,.0f} tokens/s", **where)
            path.unlink()


def study(config: BenchmarkConfig) -> Iterator[Row]:
    """A million cells: lfu_decay with prefetch over capacities x links x decays; a slice of them, or all on a GPU."""
    trace = olmoe(config.synthetic_tokens if on_gpu() else config.engine_tokens)
    platform = jax.default_backend()
    where: dict[str, Any] = {"contract": "event", "repeats": config.repeats}
    title = f"{config.study_cells:,} cells of {config.study_tokens:,} tokens, prefetch and time"
    note = "cells do not talk to each other: linear in cells, visits and devices"
    cells, call = grid_of(trace, config.gpu_study_axes if on_gpu() else config.study_axes, devices(1))
    visits = trace.tokens * trace.layers
    rate = cells * visits / median_s(call, config.repeats)
    shown = f"{cells:,} cells, {trace.tokens:,} tokens of 16x64 top-8"
    yield _row(f"slice of it, 1 {platform} device", rate / 1e6, "M cell-visits/s", note=shown, **where)
    if on_gpu():
        used = len(jax.devices())
        cells, call = grid_of(trace, config.gpu_study_whole, devices())
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
        on = f"{used} {platform} device{'s' * (used > 1)}"
        title_all = f"{cells:,} cells of {trace.tokens:,} tokens, prefetch and time, {on}"
        yield _row(title_all, took, "s", note="with what is compiled for it", **{**where, "repeats": 1})
    for count in sorted({1, *({8} if on_gpu() else {len(jax.devices())})}):
        whole_s = config.study_cells * config.study_tokens * trace.layers / rate / count
        name = f"{title}, {count} {platform} device{'s' * (count > 1)}"
        yield _row(name, whole_s / 3600, "h", "extrapolated", note=note, **{**where, "repeats": None})


def grid_of(trace: Trace, axes: tuple[int, int, int], mesh: Mesh) -> tuple[int, Callable[[], Any]]:
    """How many cells capacities x links x decays make, and what replays them all."""
    budgets, links, decays = axes
    replays, mix = prepare(trace), make_mix(trace, eviction="lfu_decay", prefetch="transition")
    machines = [hardware(MACHINE).replace(link_bytes_per_s=rate) for rate in np.linspace(4e9, 60e9, links).tolist()]
    varied = {"decay": np.linspace(0.5, 0.99, decays).tolist()}
    replay = replayer(replays, mix, machines, values=varied, mesh=mesh, **replay_options())
    return budgets * links * decays, partial(replay, budgets_of(replays, budgets))


SECTIONS: dict[str, Section] = {
    "libcachesim": against_libcachesim,
    "policylang": against_policylang,
    "curves": one_pass,
    "engine": engine,
    "growth": growth,
    "job": main_job,
    "memory": memory,
    "study": study,
}

if __name__ == "__main__":
    main_guard(main)
