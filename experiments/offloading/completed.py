"""`experiments.offload` with a prompt: completes it within a memory, prints it as it comes, says how fast it was."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from configs.completion import Completion
from configs.offload import check_rule
from configs.options import size as size_of
from experiments.common.command_line import output_paths
from experiments.common.timelines import write_timelines
from experiments.offloading.measured import copied, engine_name, stacked
from experiments.offloading.model import Engine, Source, source
from experiments.offloading.prompt import Printer, Prompt, read_prompt
from specmd_jax.api import run as replay
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.fused import engine as fused
from specmd_jax.moe.fused import pages
from specmd_jax.moe.layerwise import engine as layerwise
from specmd_jax.moe.measure import predict
from specmd_jax.moe.measure.timelines import run_timelines
from specmd_jax.moe.model.experts import expert_bytes, expert_spec
from specmd_jax.moe.model.forward import check_prompt
from specmd_jax.moe.runtime.memory import Beside, device_bytes, slots_for
from specmd_jax.moe.runtime.packing import lay_out
from specmd_jax.moe.runtime.policy import make_policy, numbers_of, slots_of
from specmd_jax.moe.runtime.run import Run
from specmd_jax.moe.runtime.store import level_names
from specmd_jax.progress import heartbeat
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.completion import TABLE, block
from specmd_jax.report.reader import MANIFEST, ROWS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.timelines.parts import Timeline
from specmd_jax.timelines.record import timeline as drawn_timeline
from specmd_jax.trace import save_trace
from specmd_jax.units import MIB

TRACE = "trace.npz"
CAPACITY = "25%"  # where neither a memory is given nor the device says what it has
WARM_TOKENS = 3  # of a run that compiles
RATES_TOKENS = 32  # of each run that rates are fitted to


class Plan(NamedTuple):
    """What a completion will do, known before any weight is read."""

    config: Completion
    weights: Source
    prompt: Prompt
    engine: str
    precision: str | None
    setting: Setting
    memory_bytes: int | None  # to be divided; None: the size of the cache is given
    expert_bytes: int  # at the highest precision
    place_bytes: int  # what it takes on the device
    beside: Beside


class Simulated(NamedTuple):
    """Times that the simulator has for a run, and where its rates come from."""

    ttft_s: float | None
    tpot_s: float | None
    rates: str
    fitted: predict.PassRates | None  # None: a machine's rates


def complete(config: Completion, out: Path | None, overwrite: bool, timeline: Path | None, passes: int) -> None:
    """Completes the prompt of the settings; see the module. Files are written into ``out``, if there is one, and so
    many passes are drawn in the file ``timeline``."""
    trace_path = None if out is None else output_paths(out, overwrite, ROWS, MANIFEST, TRACE)[-1]
    plan = make_plan(config)
    with heartbeat("reading weights"):
        model = plan.weights.open(plan.engine, plan.precision, config.precisions)
        engine = model.engine(plan.setting)
    with heartbeat("compiling"):
        run_others(plan, engine, 0, WARM_TOKENS)
    printer = Printer(plan.prompt)
    run = engine.generate([np.array(plan.prompt.ids)], config.steps, on_token=printer)
    printer.finish()
    with heartbeat("simulating"):
        simulated = simulate(plan, engine, run)
        row = _row(plan, engine, run, printer.ended, simulated) | {"precisions": model.precisions}
    print("\n" + "\n".join(block(row)), flush=True)
    if timeline is not None:
        print(write_timelines(timeline, *_timelines(plan, engine, run, simulated, passes)))
    if out is not None and trace_path is not None:
        with ResultWriter(out, asdict(config), TABLE, overwrite) as writer:
            writer.write(row)
            save_trace(run.trace, trace_path, overwrite=True)


def make_plan(config: Completion) -> Plan:
    """Checks everything that can be checked without reading a weight, and divides the memory.

    Raises `SpecmdError` for a checkpoint, a prompt, a policy or a memory that will not do.
    """
    precision = None if config.precision == "native" else config.precision
    weights = source(config.model, config.weights, precision)
    cfg, prompt = weights.cfg, read_prompt(config, weights.cfg.vocabulary)
    check_prompt(cfg, np.array([prompt.ids]), config.steps)
    engine = config.engine or ("layerwise" if jax.default_backend() == "cpu" else "fused")
    check_rule(config.miss, config.precisions, engine)
    names = level_names(cfg, precision or cfg.dtype, config.precisions)
    sizes = tuple(expert_bytes(cfg, name) for name in names)
    kind, place = (fused if engine == "fused" else layerwise), sizes[-1]
    beside, device = kind.beside(cfg, len(prompt.ids), config.steps), device_bytes()
    if engine == "fused" and len(names) > 1:
        layout = lay_out([expert_spec(cfg, name) for name in names])
        beside, place = pages.beside(beside, cfg, layout), pages.place_bytes(layout, sizes)
    memory = None if config.capacity is not None else device
    if config.memory is not None:
        memory = size_of(config.memory)
        if device is not None and memory > device:
            raise SpecmdError(f"--memory {config.memory}: the device has {device / MIB:.1f} MiB, expected no more")
    capacity = config.capacity or CAPACITY
    if memory is not None:
        capacity = f"{slots_for(memory, beside, place, len(cfg.moe_layers) * cfg.experts)} slots"
    setting = Setting(
        eviction=config.eviction, prefetch=config.prefetch, capacity=capacity, miss=config.miss,
        numbers=dict(config.miss_numbers),
    )  # fmt: skip
    policy = make_policy(cfg, sizes, setting)
    total_mib = (beside.bytes(place) + slots_of(policy, numbers_of(policy)) * place) / MIB
    if device is not None and total_mib > device / MIB:
        raise SpecmdError(
            f"--capacity {capacity} takes {total_mib:.1f} MiB with all else, the device has {device / MIB:.1f} MiB"
        )
    return Plan(config, weights, prompt, engine, precision, setting, memory, sizes[-1], place, beside)


def run_others(plan: Plan, engine: Engine, seed: int, count: int) -> Run:
    """Completes a prompt of as many random tokens, up to ``count`` new ones: what it compiles serves the real one."""
    cfg = plan.weights.cfg
    prompt = np.random.default_rng(seed).integers(0, cfg.vocabulary, len(plan.prompt.ids))
    return engine.generate([prompt], plan.config.steps, on_token=lambda request, step, token: step + 1 >= count)


def simulate(plan: Plan, engine: Engine, run: Run) -> Simulated:
    """Gives the simulator's times for a run: by a machine's rates, or by this engine's on other tokens."""
    machine = plan.config.hardware
    if machine is not None:
        found = replay(run.trace, plan.setting.replace(hardware=machine))
        return Simulated(found.ttft_s, found.tpot_s, f"times of the simulator's clock with hardware {machine}", None)
    others = [run_others(plan, engine, seed, RATES_TOKENS) for seed in (1, 2)]
    fitted = predict.fit_alike(others)
    times = predict.predict_passes(engine.policy, run.trace, fitted)
    return Simulated(
        times.ttft_s,
        None if np.isnan(times.tpot_s) else times.tpot_s,
        f"times by rates of this engine, from two runs of random tokens ({RATES_TOKENS} new ones at most)",
        fitted,
    )


def _timelines(plan: Plan, engine: Engine, run: Run, simulated: Simulated, passes: int) -> list[Timeline]:
    """Gives what was measured, and what the simulator has, as `simulate`."""
    found = [*run_timelines(engine.policy, run, simulated.fitted, passes=passes)]
    if simulated.fitted is None:
        setting = plan.setting.replace(hardware=plan.config.hardware)
        found.append(drawn_timeline(run.trace, setting, passes=passes))
    return found


def _row(plan: Plan, engine: Engine, run: Run, ended: bool, simulated: Simulated) -> Row:
    """Gives what was measured, what was simulated, and how memory is divided."""
    replays, events = engine.policy.replay(run.trace)
    own, theirs = (copied(engine, replays.schedule, found, 0) for found in (stacked(run), events))
    ttft_s, tpot_s = predict.measured(run)
    mix, beside = engine.policy.mix, plan.beside
    return {
        "model": plan.weights.name,
        "engine": engine_name(engine),
        "eviction": mix.eviction.name,
        "prefetch": mix.prefetch.name,
        "miss": mix.miss.name,
        "prompt_tokens": len(plan.prompt.ids),
        "new_tokens": run.tokens.shape[1],
        "ended": ended,
        "ttft_s": ttft_s,
        "tpot_s": None if np.isnan(tpot_s) else tpot_s,
        "hit_rate": own.hit_rate,
        "copy_bytes_per_token": own.bytes_per_token,
        "simulated_ttft_s": simulated.ttft_s,
        "simulated_tpot_s": simulated.tpot_s,
        "simulated_hit_rate": theirs.hit_rate,
        "simulated_copy_bytes_per_token": theirs.bytes_per_token,
        "rates": simulated.rates,
        "events_equal": run.events_equal(events),
        "slots": engine.capacity_slots,
        "experts": len(plan.weights.cfg.moe_layers) * plan.weights.cfg.experts,
        "most_resident": run.most_resident,
        "memory_bytes": plan.memory_bytes,
        "expert_bytes": plan.expert_bytes,
        "place_bytes": plan.place_bytes,
        "dense_bytes": beside.dense_bytes,
        "kv_bytes": beside.cache_bytes,
        "work_bytes": beside.work_bytes + beside.record_bytes,
        "staging": beside.experts,
        "evidence": "measured and simulated",
    }
