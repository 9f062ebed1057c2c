"""The work of `experiments.study`: all cells, step by step."""

from __future__ import annotations

import inspect
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from configs.study import FASTEST, LEAST_PCT, MOST_PCT, RANGES, SLOWEST, STEP_CELLS, StudyConfig
from experiments.common.bars import bar as bar_of
from specmd_jax.engines.devices import first_says
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.table import replayer
from specmd_jax.files import whole_file
from specmd_jax.policies import EVICTION
from specmd_jax.replay.metrics import arrays_of
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.study.table import CELLS, TABLE
from specmd_jax.report.rows import mix_name
from specmd_jax.report.writer import ResultWriter
from specmd_jax.schedule.counted import counted_of
from specmd_jax.setting import Setting
from specmd_jax.types import Trace

PHASE = "decode"  # only decode passes count


class Step(NamedTuple):
    """What is replayed at once: one mix at some capacities, all links and all values."""

    eviction: str
    prefetch: str
    first: int  # of the capacities
    last: int

    @property
    def file(self) -> str:
        return f"{self.eviction}+{self.prefetch}-{self.first:05}.npz"


class Axes(NamedTuple):
    """What the cells differ in besides the mix."""

    capacity_bytes: list[int]
    link_bytes_per_s: list[float]

    def values(self, eviction: str, count: int) -> list[float]:
        """Gives the values of the policy's number, its default among them; [nan] if it has none."""
        if eviction not in RANGES:
            return [float("nan")]
        _, low, high = RANGES[eviction]
        return sorted({*np.linspace(low, high, count).round(6).tolist(), default_of(eviction)})


def default_of(eviction: str) -> float:
    """Gives what the policy's number is unless told otherwise."""
    return float(inspect.signature(EVICTION[eviction]).parameters[RANGES[eviction][0]].default)


def axes_of(trace: Trace, config: StudyConfig) -> Axes:
    every = int(trace.expert_bytes.sum()) * trace.experts
    shares = np.geomspace(LEAST_PCT, MOST_PCT, config.capacities) / 100
    sizes = sorted({int(share * every) for share in shares.tolist()})
    return Axes(sizes, np.geomspace(SLOWEST, FASTEST, config.links).round().tolist())


def steps_of(axes: Axes, config: StudyConfig) -> Iterator[Step]:
    """Gives all of them; those of one mix have the same shape, but for the last."""
    most = STEP_CELLS if jax.default_backend() == "gpu" else STEP_CELLS // 100
    for eviction in config.evictions:
        width = max(1, most // (len(axes.link_bytes_per_s) * len(axes.values(eviction, config.values))))
        for prefetch in config.prefetches:
            for first in range(0, len(axes.capacity_bytes), width):
                yield Step(eviction, prefetch, first, min(first + width, len(axes.capacity_bytes)))


def run(trace: Trace, config: StudyConfig, out: Path, digest: str, overwrite: bool, resume: bool, first: bool) -> None:
    """Replays the steps that the table in `out` lacks. Of several processes the `first` has the table."""
    axes = axes_of(trace, config)
    steps = list(steps_of(axes, config))
    if not first:
        for _ in results(trace, config, axes, _chosen(steps, first_says([False] * len(steps)))):
            pass
        return
    with ResultWriter(out, asdict(config), TABLE, overwrite, resume, digest) as writer:
        if overwrite:
            shutil.rmtree(out / CELLS, ignore_errors=True)
        flags = first_says([not _is_done(step, axes, writer, out) for step in steps])
        total = sum(_cells(step, axes, config) for step in steps)
        lacking = _chosen(steps, flags)
        done = total - sum(_cells(step, axes, config) for step in lacking)
        try:
            with bar_of(total, "cell", done) as bar:
                for step, arrays in results(trace, config, axes, lacking):
                    for row in rows_of(trace, step, arrays):
                        writer.write(row)
                    _keep(out / CELLS / step.file, arrays)
                    bar.set_postfix_str(mix_name(step.eviction, step.prefetch), refresh=False)
                    bar.update(_cells(step, axes, config))
        except KeyboardInterrupt:
            print(f"{writer.rows} rows are in {out}; the same command continues", file=sys.stderr)
            raise


def _chosen(steps: Sequence[Step], flags: Sequence[bool]) -> list[Step]:
    return [step for step, flag in zip(steps, flags, strict=True) if flag]


def _cells(step: Step, axes: Axes, config: StudyConfig) -> int:
    return (step.last - step.first) * len(axes.link_bytes_per_s) * len(axes.values(step.eviction, config.values))


def _is_done(step: Step, axes: Axes, writer: ResultWriter, out: Path) -> bool:
    keys = (
        {"eviction": step.eviction, "prefetch": step.prefetch, "capacity_bytes": size, "link_bytes_per_s": rate}
        for size in axes.capacity_bytes[step.first : step.last]
        for rate in axes.link_bytes_per_s
    )
    return (out / CELLS / step.file).exists() and all(writer.has(key) for key in keys)


Arrays = dict[str, npt.NDArray[Any]]


def results(trace: Trace, config: StudyConfig, axes: Axes, steps: Sequence[Step]) -> Iterator[tuple[Step, Arrays]]:
    """Gives every cell of each step: arrays [capacity, link, value], and the axes."""
    replays = prepare(trace, **Setting(phase=PHASE).schedule)
    counted = counted_of(replays.schedule)
    largest = Setting(capacity=axes.capacity_bytes[-1], hardware=config.hardware, **config.host.fields)
    base, host_budget = largest.machine, largest.host_budget(trace)
    assert base is not None
    machines = [base.replace(link_bytes_per_s=rate) for rate in axes.link_bytes_per_s]
    for eviction, prefetch in dict.fromkeys((step.eviction, step.prefetch) for step in steps):
        values = axes.values(eviction, config.values)
        varied = {RANGES[eviction][0]: np.array(values)} if eviction in RANGES else {}
        setting = largest.replace(eviction=eviction, prefetch=prefetch, phase=PHASE, numbers=varied)
        began = time.perf_counter()
        mix = setting.mix(trace.top_k)
        replay = replayer(replays, mix, machines, host_budget=host_budget, **setting.options)
        mine = [step for step in steps if (step.eviction, step.prefetch) == (eviction, prefetch)]
        width = max(step.last - step.first for step in mine)
        for step in mine:
            sizes = axes.capacity_bytes[step.first : step.last]
            # a shorter step is filled up, so that it is the same program
            totals = replay([*sizes, *sizes[-1:] * (width - len(sizes))])
            if not varied:
                totals = jax.tree.map(lambda leaf: leaf[:, :, None], totals)
            found = arrays_of(counted, replays.sizes.level_bytes, totals)
            seconds, began = time.perf_counter() - began, time.perf_counter()
            yield (
                step,
                {
                    "capacity_bytes": np.array(sizes, np.int64),
                    "link_bytes_per_s": np.array(axes.link_bytes_per_s),
                    "value": np.array(values),
                    "default": np.array(default_of(eviction) if varied else float("nan")),
                    "took_s": np.array(seconds),
                    "device": np.array(f"{jax.device_count()} x {jax.devices()[0].device_kind}"),
                    "visits": np.array(replays.schedule.visits),
                    **{name: leaf[: len(sizes)] for name, leaf in found.items()},
                },
            )


def _keep(path: Path, arrays: Arrays) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def rows_of(trace: Trace, step: Step, arrays: Arrays) -> Iterator[Row]:
    """Gives the best value at each capacity and link."""
    every, values = int(trace.expert_bytes.sum()), arrays["value"]
    usual = int(np.argmin(np.abs(values - arrays["default"]))) if len(values) > 1 else 0
    for i, size in enumerate(arrays["capacity_bytes"].tolist()):
        for j, rate in enumerate(arrays["link_bytes_per_s"].tolist()):
            tpot_s = arrays["tpot_s"][i, j]
            best = int(np.argmin(tpot_s))
            yield {
                "model": trace.model,
                "contract": "event",
                "eviction": step.eviction,
                "prefetch": step.prefetch,
                "capacity_bytes": size,
                "capacity_pct": 100 * size / (trace.experts * every),
                "cycles": size / (trace.top_k * every),
                "link_bytes_per_s": rate,
                "cells": len(values),
                "number": RANGES[step.eviction][0] if len(values) > 1 else None,
                "value": float(values[best]) if len(values) > 1 else None,
                "tpot_s": float(tpot_s[best]),
                "tpot_default_s": float(tpot_s[usual]),
                "tpot_worst_s": float(tpot_s.max()),
                "hit_rate": float(arrays["hits"][i, j, best] / max(arrays["demand"][i, j, best], 1)),
                "stall_s": float(arrays["stall_s"][i, j, best]),
                "link_bytes": int(arrays["link_bytes"][i, j, best]),
                "evidence": "simulated",
            }
