"""My model, this much accelerator memory, this link: what do I run?

    python -m experiments.recommend --model gpt-oss-20b --memory 6GiB --hardware pcie4-x16
    python -m experiments.recommend --model OLMoE-1B-7B --memory 8GiB --hardware nvme-4 --target-tpot-ms 40
    python -m experiments.recommend --smoke                     # seconds: see that it works
    python -m experiments.recommend --timeline best.json        # and the best mix over time, for ui.perfetto.dev

Replays the model's routing (recorded where there is a trace, else synthetic of its shape) through eviction policies x
prefetchers at the cache that fits and at others, about two minutes, and ranks them by TPOT with the reason for each
place. Writes rows.csv, manifest.json and figures/pareto.png (what more memory buys) to results/recommend.

Memory is all of the accelerator's. What is left for cached experts: memory - dense layers - head - embedding - keys and
values (--kv-bytes) - the experts of one decode visit, which are copied in before older ones leave.

Expected of the first command: 27 % of the experts fit; online alone decodes a token in 18.1 ms, lfu_decay in 19.3,
least_stale + previous in 20.8, lru in 21.0; the link is busy 82 % of the time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs.options import size
from configs.recommend import BUNDLED_OF, LOSSY, TRIED, RecommendConfig
from experiments.common.cluster import split_cpu
from experiments.common.command_line import main_guard, parser, results_folder
from experiments.common.options import options_of, settings_of
from experiments.common.timelines import passes_shown, timeline_options, timeline_path, write_timelines
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.sizes import native_bits
from specmd_jax.engines.table import replay_grid
from specmd_jax.errors import SpecmdError
from specmd_jax.replay.metrics import Metrics
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.recommend.advice import rank
from specmd_jax.report.pages.recommend.page import draw
from specmd_jax.report.pages.recommend.table import TABLE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.specs.capacity import describe_capacity, parse_capacity
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.hardware import hardware as find_hardware
from specmd_jax.specs.models import ModelSpec
from specmd_jax.specs.models import model as find_model
from specmd_jax.timelines.parts import Timeline
from specmd_jax.timelines.record import timeline
from specmd_jax.trace import first_tokens, synthesize
from specmd_jax.trace.bundled import load_named
from specmd_jax.trace.prompts import PROMPT_NOTE, clip_requests, longest_requests, with_prompts
from specmd_jax.types import DECODE, PREFILL, Trace
from specmd_jax.units import GIB, MB


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "recommend", resume=True)
    options_of(options, RecommendConfig())
    timeline_options(options, "the best mix at the cache that fits")
    args = options.parse_args(argv)
    path = timeline_path(args)
    config = settings_of(args, RecommendConfig())
    split_cpu()
    out = results_folder(options, args)

    question = ask(config)
    print("\n".join(preamble(question)), end="\n\n", flush=True)
    stored = asdict(config) | {"trace": question.source, "capacity_bytes": question.budget_bytes}
    rows: list[Row] = []
    with ResultWriter(out, stored, TABLE, args.overwrite, args.resume, question.sha256) as writer:
        for row in replays(question):
            writer.write(row)
            rows.append(row)
    print(draw(out))
    if path is not None:
        print(write_timelines(path, drawn(question, rows, passes_shown(args))))


# ------------------------------------------------------------------------------------------------------ the question


@dataclass(frozen=True)
class Question:
    """A checked `RecommendConfig`."""

    config: RecommendConfig
    spec: ModelSpec
    machine: Hardware
    trace: Trace
    source: str  # where the routing comes from
    sha256: str | None  # of the trace file
    memory_bytes: int
    parts: dict[str, int]  # what of the memory is not for cached experts

    @property
    def fixed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def budget_bytes(self) -> int:
        """What is left for the cache; more than all experts is all of them."""
        return min(self.memory_bytes - self.fixed_bytes, self.all_expert_bytes)

    @property
    def all_expert_bytes(self) -> int:
        return int(self.trace.expert_bytes.sum()) * self.trace.experts

    @property
    def evidence(self) -> str:
        made = f", {PROMPT_NOTE}" if "prompts" in self.trace.meta else ""
        return f"simulated on {self.source}{made}"

    @property
    def prefetches(self) -> tuple[str, ...]:
        wanted = self.config.prefetches or TRIED
        return tuple(
            name for name in wanted if name != "gate_ahead" or self.trace.ahead is not None or self.config.prefetches
        )


def ask(config: RecommendConfig) -> Question:
    """Raises SpecmdError if the trace is not the model's, or the memory holds not a single expert."""
    spec, machine = find_model(config.model), find_hardware(config.hardware)
    memory, kv = size(config.memory), size(config.kv_bytes)
    trace, source, sha256 = routing(config, spec)
    dense = np.asarray(trace.meta.get("dense_bytes", spec.dense_bytes), np.float64)
    demanded = min(spec.experts, config.batch * trace.top_k)
    parts = {
        "dense layers": round(float(np.broadcast_to(dense, (trace.layers,)).sum())),
        "head": round(spec.head_bytes),
        "embedding": round(spec.embed_params * spec.dense_bits / 8),
        "keys and values": kv,
        f"one visit's {demanded} experts": demanded * int(trace.expert_bytes.max()),
    }
    left, least = memory - sum(parts.values()), int(trace.expert_bytes.max())
    if left < least:
        listed = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        raise SpecmdError(
            f"memory {config.memory} is {memory / GIB:.2f} GiB, {spec.name} takes {sum(parts.values()) / GIB:.2f} GiB "
            f"before any expert is cached ({listed}): expected at least {(sum(parts.values()) + least) / GIB:.2f} GiB"
        )
    return Question(config, spec, machine, trace, source, sha256, memory, parts)


def routing(config: RecommendConfig, spec: ModelSpec) -> tuple[Trace, str, str | None]:
    """Gives the trace to replay, what to call it, and the SHA-256 of its file."""
    name = config.trace or BUNDLED_OF.get(spec.name)
    decoded = max(1, config.request_tokens - config.prompt_tokens)
    requests = max(config.batch, round(config.visits / spec.layers / (1 + decoded) * config.batch))
    if name is None:
        trace = synthesize(
            layers=spec.layers,
            experts=spec.experts,
            top_k=spec.top_k,
            tokens=config.request_tokens,
            requests=requests,
            prompt_tokens=config.prompt_tokens,
            with_ahead=True,
            expert_bytes=spec.expert_bytes,
        )
        return replace(trace, meta={"model": spec.name}), "synthetic routing", None
    trace, sha256 = load_named(name)
    if (trace.layers, trace.experts) != (spec.layers, spec.experts):
        raise SpecmdError(
            f"trace {name} has {trace.layers} layers of {trace.experts} experts, "
            f"expected the {spec.layers} of {spec.experts} of {spec.name}"
        )
    if trace.requests < config.batch:
        raise SpecmdError(
            f"trace {name} has {trace.requests} requests, expected at least the {config.batch} of a batch"
        )
    if trace.requests > 1:
        trace = clip_requests(longest_requests(trace, requests), config.request_tokens)
    else:
        trace = first_tokens(trace, int(trace.prompt_lengths[0]) + max(2, round(config.visits / spec.layers)))
    if not trace.prompt_lengths.any():
        trace = with_prompts(trace, config.prompt_tokens)
    if "gate_ahead" in config.prefetches and trace.ahead is None:
        raise SpecmdError(f"prefetch 'gate_ahead' needs a trace with `ahead` scores, and {name} has none")
    unlike = f" (top-{trace.top_k}, the model's is top-{spec.top_k})" if trace.top_k != spec.top_k else ""
    return (
        replace(trace, meta={**trace.meta, "model": spec.name}),
        f"recorded routing {Path(name).name}{unlike}",
        sha256,
    )


# -------------------------------------------------------------------------------------------------------- the answer


def replays(question: Question) -> Iterator[Row]:
    """Gives the rows of every study, with a progress bar."""
    config, trace = question.config, question.trace
    shown = {"expert_bytes": trace.expert_bytes, "experts": trace.experts, "top_k": trace.top_k}
    texts = [f"{share}%" for share in config.shares_pct]
    sizes = {
        int(parse_capacity(text, **shown))
        for text in texts
        if question.all_expert_bytes * float(text[:-1]) / 100 >= trace.expert_bytes.max()
    }
    budgets = sorted(sizes | {question.budget_bytes})
    mixes = list(product(config.evictions, question.prefetches))
    event = prepare(trace, batch=config.batch)
    native = native_bits(trace)
    bits = neighbours(native, config.bits)
    steps = len(mixes) + 1 + len(config.readings) + len(bits) + (len(LOSSY) if config.lossy else 0)

    with tqdm(total=steps, unit="mix", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def cells(
            study: str,
            variant: str,
            replays: Prepared,
            eviction: str,
            prefetch: str,
            miss: str = "fetch",
            slot_bits: float = native,
            evidence: str = "",
            **numbers: Any,
        ) -> list[Row]:
            bar.set_postfix_str(f"{study}: {eviction} + {prefetch}", refresh=True)
            cell = Setting(eviction=eviction, prefetch=prefetch, miss=miss, numbers=numbers)
            grid = replay_grid(replays, cell.mix(trace.top_k), budgets, [question.machine], **cell.options)
            bar.update()
            setting: Row = {
                "study": study,
                "variant": variant,
                "model": question.spec.name,
                "hardware": config.hardware,
                "batch": config.batch,
                "eviction": eviction,
                "prefetch": prefetch,
                "miss": miss,
                "slot_bits": slot_bits,
                "fixed_bytes": question.fixed_bytes,
                "evidence": question.evidence + evidence,
            }
            return [
                setting | _sizes(question, size) | _numbers(replays, row[0])
                for size, row in zip(budgets, grid, strict=True)
            ]

        grid: list[Row] = []
        for eviction, prefetch in mixes:
            rows = cells("grid", "as asked", event, eviction, prefetch)
            grid += rows
            yield from rows
        best = min((row for row in grid if row["capacity_bytes"] == question.budget_bytes), key=rank)
        eviction, prefetch = str(best["eviction"]), str(best["prefetch"])
        sequential = prepare(trace, batch=config.batch, contract="sequential")
        yield from cells("contract", "sequential", sequential, eviction, prefetch)
        for reading in config.readings:
            yield from cells("reading", reading, event, "least_stale", prefetch, reading=reading)
        for stored in bits:
            other, note = (
                prepare(trace, precisions=(stored,), batch=config.batch),
                f", experts stored in {stored:g} bits",
            )
            yield from cells(
                "precision", f"{stored:g} bits", other, eviction, prefetch, slot_bits=stored, evidence=note
            )
        if config.lossy:
            both = prepare(trace, precisions=(native / 2, native), batch=config.batch)
            variant, note = f"{native / 2:.3g} and {native:.3g} bits", ", lossy: quality by proxies only"
            for miss in LOSSY:
                yield from cells("lossy", variant, both, eviction, prefetch, miss, evidence=note)


def drawn(question: Question, rows: Sequence[Row], passes: int) -> Timeline:
    """Gives some passes of the best mix at the cache that fits."""
    grid = (row for row in rows if (row["study"], row["capacity_bytes"]) == ("grid", question.budget_bytes))
    best = min(grid, key=rank)
    setting = Setting(
        eviction=str(best["eviction"]), prefetch=str(best["prefetch"]), capacity=question.budget_bytes,
        hardware=question.config.hardware, batch=question.config.batch,
    )  # fmt: skip
    return timeline(question.trace, setting, passes=passes)


def neighbours(native: float, bits: Sequence[float]) -> list[float]:
    """Gives the nearest precisions clearly below and clearly above `native`."""
    below = [b for b in bits if b < 0.9 * native]
    above = [b for b in bits if b > 1.1 * native]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _sizes(question: Question, size: int) -> Row:
    trace = question.trace
    shown = describe_capacity(size, expert_bytes=trace.expert_bytes, experts=trace.experts, top_k=trace.top_k)
    return {
        "capacity_bytes": size,
        "memory_bytes": question.memory_bytes if size == question.budget_bytes else size + question.fixed_bytes,
        "capacity_pct": float(shown["percent"]),
        "cycles": float(shown["cycles"]),
    }


def _numbers(replays: Prepared, cell: Metrics) -> Row:
    schedule = replays.schedule
    prompts = len(np.unique(schedule.request[schedule.starts_pass & (schedule.phase == PREFILL)]))
    decodes = int((schedule.starts_pass & (schedule.phase == DECODE)).sum())
    total_s = (cell.ttft_s or 0.0) * prompts + (cell.tpot_s or 0.0) * decodes
    copied = cell.bytes_demand + cell.bytes_prefetch_used + cell.bytes_prefetch_wasted
    same = ("ttft_s", "tpot_s", "tokens_per_s", "link_utilisation", "hit_rate", "hits_late", "misses", "collisions")
    same += ("bytes_demand", "bytes_prefetch_used", "bytes_prefetch_wasted", "lost_mass", "mean_bits", "tokens")
    return {name: getattr(cell, name) for name in same} | {
        "bytes_per_token": copied / cell.tokens,
        "stall_share": (cell.stall_s or 0.0) / total_s if total_s else 0.0,
    }


# -------------------------------------------------------------------------------------------------------- the report


def preamble(question: Question) -> list[str]:
    """Gives the arithmetic of the memory."""
    spec, trace = question.spec, question.trace
    shown = describe_capacity(
        question.budget_bytes, expert_bytes=trace.expert_bytes, experts=trace.experts, top_k=trace.top_k
    )
    lines = [
        f"{spec.name}: {spec.layers} layers of {spec.experts} experts of {trace.expert_bytes.mean() / MB:.1f} MB, "
        f"top-{trace.top_k}"
    ]
    lines += [f"  {question.memory_bytes / GIB:8.2f} GiB  accelerator memory"]
    lines += [f"- {size / GIB:8.2f} GiB  {name}" for name, size in question.parts.items()]
    left = question.memory_bytes - question.fixed_bytes
    lines.append(
        f"= {left / GIB:8.2f} GiB  for cached experts: {shown['percent']:.1f} % of them, {shown['slots']} slots, "
        f"{shown['cycles']:.2f} token cycles"
    )
    if question.parts["keys and values"] == 0:
        lines.append(
            "  keys and values count as 0 bytes: give --kv-bytes for a long context; activations are left out too"
        )
    decoded = int((trace.lengths - trace.prompt_lengths).sum())
    lines.append(
        f"every number below: {question.evidence}; "
        f"{int(trace.prompt_lengths.sum())} prompt and {decoded} decoded tokens, from an empty cache"
    )
    return lines


if __name__ == "__main__":
    main_guard(main)
