"""The work of `experiments.paper`: the replays that its table lacks."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.paper import PaperConfig
from configs.quality import QualityConfig
from experiments.common.bars import bar as bar_of
from experiments.common.paper_plan import TABLE, arguments, plan
from experiments.studies import quality
from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.sizes import native_bits
from specmd_jax.engines.table import replay_grid
from specmd_jax.replay.metrics import Metrics
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.paper.page import QUALITY
from specmd_jax.report.pages.paper.points import RECORDED, SYNTHETIC, Point
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.specs.hardware import hardware
from specmd_jax.specs.models import model
from specmd_jax.trace import bundled, synthesize
from specmd_jax.types import Trace

GRAIN_BYTES = 1 << 16  # sizes of recorded traces at 16 bits are rounded to it, so that those at 2 bits are whole


@dataclass(frozen=True)
class Subject:
    """A trace to replay; its experts are of 16 bits, so that a share of its bytes is the paper's capacity."""

    name: str
    evidence: str
    trace: Trace
    repeat: float


def replay_all(
    subjects: Sequence[Subject], config: PaperConfig, out: Path, *, overwrite: bool, resume: bool, few: bool
) -> None:
    """Computes the cells that the table in `out` lacks."""
    plans = {subject.name: plan(subject.trace, config.bits, few=few) for subject in subjects}
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(s.trace.expert_ids).tobytes() for s in subjects)).hexdigest()
    settings = asdict(config) | {"few": few}
    with (
        ResultWriter(out, settings, TABLE, overwrite, resume, digest) as writer,
        bar_of(sum(map(len, plans.values())), "replay") as bar,
    ):
        for subject in subjects:
            if not sys.stderr.isatty():
                print(f"{subject.name}: {len(plans[subject.name])} mixes of policies", file=sys.stderr)
            for point in plans[subject.name]:
                bar.set_postfix_str(f"{subject.name} {point.eviction}", refresh=False)
                for row in rows(subject, point, config, writer):
                    writer.write(row)
                bar.update()


def read_all(config: PaperConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Lets trained models read held-out text: a table for each, in a folder of its own below `out`."""
    if overwrite:
        shutil.rmtree(out / QUALITY, ignore_errors=True)
    for name in config.trained:
        read = QualityConfig(model=name, hardware=config.hardware)
        quality.run(read, out / QUALITY / Path(name).resolve().name, overwrite=False, resume=resume)


def rows(subject: Subject, point: Point, config: PaperConfig, writer: ResultWriter) -> Iterator[Row]:
    """Gives the rows of one mix, per capacity one of the whole model and one per layer; none if the table has them."""
    trace = subject.trace
    cell = {
        "trace": subject.name,
        **point.columns(),
        "capacity_pct": config.capacities_pct[-1],
        "layer": trace.layers - 1,
    }
    if writer.has(cell):
        return
    whole = int(trace.expert_bytes.sum()) * trace.experts
    budgets = [int(whole * pct / 100) for pct in config.capacities_pct]
    machine = hardware(config.hardware)
    machine = machine.replace(launch_s=machine.launch_s + 1e-3 * point.software_ms)
    setting = Setting(**arguments(point), precisions=point.bits, hardware=machine)
    mix = setting.mix(trace.top_k)
    replays = prepare(trace, logits=mix.build().needs_logits, **setting.schedule)
    metrics = [row[0] for row in replay_grid(replays, mix, budgets, [setting.machine], **setting.options)]
    for pct, budget, found in zip(config.capacities_pct, budgets, metrics, strict=True):
        stored = replays.sizes.level_bytes[-1]
        size = describe_capacity(budget, expert_bytes=stored, experts=trace.experts, top_k=trace.top_k)
        shared: Row = {
            "trace": subject.name,
            "evidence": subject.evidence,
            "repeat": subject.repeat,
            **point.columns(),
            "capacity_pct": pct,
            "capacity_bytes": budget,
            "capacity_slots": int(size["slots"]),
            "cycles": float(size["cycles"]),
        }
        # What is counted of storage behind host memory has no column: the paper's host memory holds every expert.
        counted = {name: value for name, value in found.row().items() if name in TABLE.columns}
        yield shared | {"layer": None} | counted
        empty = dict.fromkeys(counted)
        for layer in range(trace.layers):
            yield shared | {"layer": layer} | empty | _of_layer(found, layer)


def _of_layer(found: Metrics, layer: int) -> Row:
    demand, hits, collisions = found.layer_demand[layer], found.layer_hits[layer], found.layer_collisions[layer]
    return {"demand": demand, "hits": hits, "misses": demand - hits, "collisions": collisions}


def synthetic(name: str, config: PaperConfig) -> Subject:
    """Makes up routing in the shape of a published model, which brings the model's sizes and computation."""
    spec = model(name)
    trace = synthesize(
        layers=spec.layers,
        experts=spec.experts,
        top_k=spec.top_k,
        tokens=config.prompt_tokens + config.decode_tokens,
        prompt_tokens=config.prompt_tokens,
        requests=config.requests,
        skew=config.skew,
        stickiness=config.stickiness,
        layer_correlation=config.layer_correlation,
        drift=config.drift,
        topics=config.topics,
        ahead_noise=config.ahead_noise,
        seed=config.seed,
        expert_bytes=spec.expert_bytes_at(16),
        with_logits=True,
        with_ahead=True,
    )
    trace = dataclasses.replace(trace, meta={**trace.meta, "model": spec.name, "weights_bits": 16})
    return Subject(spec.name, SYNTHETIC, trace, repeated(trace))


def recorded(name: str, config: PaperConfig) -> Subject:
    """Gives the first tokens of a bundled trace, its experts' sizes as they would be at 16 bits."""
    trace = bundled(name, config.trace_tokens)
    at_16 = trace.expert_bytes * 16 / native_bits(trace)
    whole = np.maximum(1, np.round(at_16 / GRAIN_BYTES)).astype(np.int64) * GRAIN_BYTES
    trace = dataclasses.replace(trace, expert_bytes=whole, meta={**trace.meta, "weights_bits": 16})
    return Subject(name, RECORDED, trace, repeated(trace))


def repeated(trace: Trace) -> float:
    """Gives the share of a token's experts that the token before it, of the same request, used at the same layer."""
    ids: Any = trace.expert_ids
    starts = np.cumsum(trace.lengths)[:-1]
    follows = np.setdiff1d(np.arange(1, trace.tokens), starts)
    if not len(follows):
        return float("nan")
    same = (ids[follows][..., :, None] == ids[follows - 1][..., None, :]).any(axis=-1) & (ids[follows] >= 0)
    return float(same.sum() / max(1, (ids[follows] >= 0).sum()))
