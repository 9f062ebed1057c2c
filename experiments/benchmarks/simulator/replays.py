"""The scan, and on a GPU its program: config-accesses per second, growth over shapes, a million cells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.benchmark import BenchmarkConfig
from experiments.benchmarks.simulator.rows import row
from experiments.benchmarks.simulator.workload import budgets_of, configurations, olmoe, on_gpu, slots_range, traces
from experiments.common.timing import median_s
from specmd_jax.engines.devices import devices, everywhere, replay_spread
from specmd_jax.engines.gpu_columns import Columns, columns_of
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.table import replayer
from specmd_jax.replay.state import Visit
from specmd_jax.report.columns import Row
from specmd_jax.setting import Setting
from specmd_jax.specs.hardware import hardware
from specmd_jax.types import Trace

MACHINE = "pcie4-x16"
MIXES = {
    "demand only (lru)": ("lru", "none", False),
    "prefetch (transition, topk) and time": ("lru", "transition", True),
}


class Replay:
    """A trace and a mix, to be replayed by the scan or by the GPU program at some budgets."""

    def __init__(self, trace: Trace, eviction: str, prefetch: str, timed: bool, kernel: bool = False) -> None:
        setting = Setting(eviction=eviction, prefetch=prefetch)
        self.replays, self.mix = prepare(trace), setting.mix(trace.top_k)
        self.machine, self.kernel = hardware(MACHINE) if timed else None, kernel
        self.setup = self.replays.setup(self.mix, self.machine, **setting.options)

    def columns(self) -> Visit | Columns:
        if self.kernel:
            return columns_of(self.replays, self.setup, self.mix.traced())
        return self.replays.visits(self.setup, self.mix)

    def seconds(self, count: int, mesh: Mesh, repeats: int) -> float:
        """Gives the seconds of one replay of `count` configurations."""
        budgets = budgets_of(self.replays, count)
        sizes = np.stack([self.replays.sizes.budget(budget) for budget in budgets])
        numbers = self.replays.numbers(budgets[0], self.machine)._replace(budget=jnp.asarray(sizes))
        columns, given = everywhere(self.columns(), mesh), self.mix.traced()
        return median_s(lambda: replay_spread(self.setup, ("budget",), numbers, given, columns, mesh), repeats)

    def speed(self, title: str, count: int, mesh: Mesh, repeats: int) -> tuple[float, list[Row]]:
        """Gives demanded experts x configurations per second, and the rows that say so."""
        trace, schedule = self.replays.trace, self.replays.schedule
        took = self.seconds(count, mesh, repeats)
        rate = int(schedule.demanded.sum()) * count / took
        size = slots_range(trace, [budget // int(trace.expert_bytes[0]) for budget in budgets_of(self.replays, count)])
        where: dict[str, Any] = {"contract": "event", "repeats": repeats, **size}
        cost = took / schedule.visits / count * 1e6
        return rate, [
            row(title, rate / 1e6, "M config-accesses/s", **where),
            row(f"{title}: cost", cost, "us a visit and configuration", **where),
        ]


def engine(config: BenchmarkConfig) -> Iterator[Row]:
    """Times the scan at many configurations, and on a GPU its program: demanded experts x configurations per second."""
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
            yield row(f"{name}: {available} devices / 1 device", rates[available] / rates[1], "x", **repeated)
    if on_gpu():
        yield from whole_program(config, scan)


def whole_program(config: BenchmarkConfig, scan: Mapping[str, float]) -> Iterator[Row]:
    """Times the GPU program beside the scan; at few configurations a program's chain of steps decides its time."""
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
                yield row(f"{spread} / 1 device", rate / rates[many], "x", **repeated)
            if prefetch != "none":
                note = "predictions of the whole trace and the columns of the schedule, once for all configurations"
                yield row(f"{title}: tape", median_s(measured.columns, config.repeats), "s", note=note, **repeated)
            if scanned:
                yield row(f"{title}: kernel / scan", rates[count] / scan[name], "x", **repeated)


def growth(config: BenchmarkConfig) -> Iterator[Row]:
    """Gives the cost per visit for models of different shape, at the same configurations."""
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
        yield row(title, costs[shape], "us a visit and configuration", **where)
    first = config.shapes[0]
    for shape in config.shapes[1:]:
        ratio = costs[shape] / costs[first]
        names = "{}x{} / {}x{}".format(*shape[:2], *first[:2])
        sums, products = sum(shape[:2]) / sum(first[:2]), shape[0] * shape[1] / (first[0] * first[1])
        note = f"E + L grows {sums:.2f} x, E x L {products:.2f} x"
        yield row(f"growth of the cost, {names}", ratio, "x", contract="event", repeats=config.repeats, note=note)


def study(config: BenchmarkConfig) -> Iterator[Row]:
    """Times a million cells: lfu_decay with prefetch over capacities x links x decays; a slice, or all on a GPU."""
    trace = olmoe(config.synthetic_tokens if on_gpu() else config.engine_tokens)
    platform = jax.default_backend()
    where: dict[str, Any] = {"contract": "event", "repeats": config.repeats}
    title = f"{config.study_cells:,} cells of {config.study_tokens:,} tokens, prefetch and time"
    note = "cells do not talk to each other: linear in cells, visits and devices"
    cells, call = grid_of(trace, config.gpu_study_axes if on_gpu() else config.study_axes, devices(1))
    visits = trace.tokens * trace.layers
    rate = cells * visits / median_s(call, config.repeats)
    shown = f"{cells:,} cells, {trace.tokens:,} tokens of 16x64 top-8"
    yield row(f"slice of it, 1 {platform} device", rate / 1e6, "M cell-visits/s", note=shown, **where)
    if on_gpu():
        used = len(jax.devices())
        cells, call = grid_of(trace, config.gpu_study_whole, devices())
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
        on = f"{used} {platform} device{'s' * (used > 1)}"
        title_all = f"{cells:,} cells of {trace.tokens:,} tokens, prefetch and time, {on}"
        yield row(title_all, took, "s", note="with what is compiled for it", **{**where, "repeats": 1})
    for count in sorted({1, *({8} if on_gpu() else {len(jax.devices())})}):
        whole_s = config.study_cells * config.study_tokens * trace.layers / rate / count
        name = f"{title}, {count} {platform} device{'s' * (count > 1)}"
        yield row(name, whole_s / 3600, "h", "extrapolated", note=note, **{**where, "repeats": None})


def grid_of(trace: Trace, axes: tuple[int, int, int], mesh: Mesh) -> tuple[int, Callable[[], Any]]:
    """Says how many cells capacities x links x decays make, and what replays them all."""
    budgets, links, decays = axes
    replays = prepare(trace)
    varied = {"decay": np.linspace(0.5, 0.99, decays)}
    setting = Setting(eviction="lfu_decay", prefetch="transition", numbers=varied)
    machines = [hardware(MACHINE).replace(link_bytes_per_s=rate) for rate in np.linspace(4e9, 60e9, links).tolist()]
    replay = replayer(replays, setting.mix(trace.top_k), machines, mesh=mesh, **setting.options)
    return budgets * links * decays, partial(replay, budgets_of(replays, budgets))
