"""The work of `experiments.offload`: runs of a model, and what the simulator predicts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.offload import OffloadConfig
from experiments.common.command_line import output_paths
from experiments.common.timelines import write_timelines
from experiments.offloading.measured import Rates, copied, engine_name, made_of, predicted, stacked
from experiments.offloading.model import Engine, Model, source
from specmd_jax.moe.measure import predict, quality
from specmd_jax.moe.measure.timelines import run_timelines
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.routing import check_weighs
from specmd_jax.moe.runtime.policy import Policy
from specmd_jax.moe.runtime.run import Run
from specmd_jax.policies import choose
from specmd_jax.replay.totals import HOST
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.offload import TABLE
from specmd_jax.report.reader import MANIFEST, ROWS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.trace import save_trace
from specmd_jax.types import DECODE

TRACE = "trace.npz"


def run(config: OffloadConfig, out: Path, *, overwrite: bool, timeline: Path | None, passes: int) -> None:
    """Runs every setting, and draws the first of them over time where a `timeline` is asked for."""
    _, _, trace_path = output_paths(out, overwrite, ROWS, MANIFEST, TRACE)
    weights = source(config.model, config.weights)
    if choose("routing", config.routing).build() is not None:
        check_weighs(weights.cfg)
    model = weights.open(config.engine, precisions=config.precisions)

    def drawn(engine: Engine, run: Run, rates: Rates) -> None:
        if timeline is not None and writer.rows == 0:
            print(write_timelines(timeline, *run_timelines(engine.policy, run, rates, passes=passes, first_request=1)))

    with ResultWriter(out, asdict(config), TABLE, overwrite) as writer:
        for row, run in results(model, config, drawn):
            writer.write(row)
            if writer.rows == 1:
                save_trace(run.trace, trace_path, overwrite=True)


def results(
    model: Model, config: OffloadConfig, heard: Callable[[Engine, Run, Rates], None]
) -> Iterator[tuple[Row, Run]]:
    """Gives one row for each policy, capacity and prefetcher; each run is ``heard`` of before its row."""
    numbers = dict(config.miss_numbers + config.routing_numbers)
    base = Setting(miss=config.miss, routing=config.routing, numbers=numbers, batch=config.batch)
    # every setting before the first run: a wrong name costs no time
    cells = [
        (setting, model.engine(setting))
        for prefetch in config.prefetches
        for eviction in config.evictions
        for capacity in config.capacities
        for setting in [base.replace(prefetch=prefetch, eviction=eviction, capacity=capacity)]
    ]
    prompts, others = _prompts(model.cfg, config, 1), _prompts(model.cfg, config, 2)
    rates: dict[tuple[str, ...], Rates] = {}
    resident: Run | None = None
    for setting, engine in cells:
        changes_text, made = not engine.policy.policies.keeps_text, made_of(engine)
        if made not in rates:
            rates[made] = calibrate(model, config, setting, made, others)
        run = timed(engine, prompts, config.steps)
        heard(engine, run, rates[made])
        measured = row(model, engine, run, rates[made]) | {"capacity": str(setting.capacity)}
        if changes_text:
            if resident is None:
                whole = model.engine(Setting(capacity="100%"))
                resident = whole.generate(prompts, config.steps, keep_logits=True)
            measured |= lossy(engine, run, prompts, resident)
        yield measured, run


def timed(engine: Engine, prompts: list[Any], steps: int) -> Run:
    """Runs with all that it needs compiled before."""
    # which precisions meet in a token shows only as it runs
    engine.generate(prompts[:1] if engine.policy.policies.keeps_text else prompts, steps)
    return engine.generate(prompts, steps)


def calibrate(
    model: Model, config: OffloadConfig, setting: Setting, made: tuple[str, ...], prompts: list[Any]
) -> Rates:
    """Gives the rates of the engine under this setting's prefetcher, miss rule and routing, from runs of `lru`, or of
    its own policy if passes under `lru` are not ``made`` (`made_of`) as the setting's are."""
    usual = setting.replace(eviction="lru")
    if made_of(model.engine(usual)) != made:
        usual = setting

    def run(capacity: str, **changes: Any) -> tuple[Policy, Run]:
        engine = model.engine(usual.replace(capacity=capacity, **changes))
        return engine.policy, timed(engine, prompts, config.steps)

    little, fetch = config.calibration_capacity, {"miss": "fetch", "routing": "standard", "numbers": {}}
    if config.engine == "fused":
        if not setting.mix(model.cfg.top_k).build().miss.fetches_all:  # it would hold all at few bits, and miss none
            smallest, largest = model.experts.level_bytes[0], model.experts.level_bytes[-1]
            slots = model.engine(usual.replace(capacity=little)).capacity_slots * smallest // largest
            little = f"{max(slots, 1)} slots"
        return predict.fit_passes(run("100%")[1], run(little)[1])
    policies, plain = setting.mix(model.cfg.top_k).build(), {**fetch, "prefetch": "none"}
    rates = predict.fit(run("100%", **plain)[1], run(little, **plain)[1])
    if policies.prefetch is not None:
        rates = predict.fit_prefetch(rates, run("100%", **fetch)[1], *run(little, **fetch))
    return rates if policies.keeps_text else predict.fit_rule(rates, *run(little))


def lossy(engine: Engine, run: Run, prompts: list[Any], resident: Run) -> dict[str, Any]:
    """Says what a miss rule or routing changed in a run, and how far it is off the resident model on that model's
    text."""
    schedule = engine.policy.replay(run.trace)[0].schedule
    decode = np.flatnonzero((schedule.phase == DECODE) & (schedule.request > 0))
    outcome = np.stack([run.decisions[v].outcome for v in decode])
    dropped, moved = quality.lost_share(run, schedule.mass, decode)
    text = resident.tokens
    read = engine.generate(prompts, text.shape[1], keep_logits=True, text=text)
    found = quality.compare(read, resident, text)
    return {
        "dropped_share": dropped,
        "moved_share": moved,
        "host_share": float((outcome == HOST).sum() / max(int((outcome > 0).sum()), 1)),
        "changed_tokens": found.changed,
        "kl_nats": found.kl_nats,
        "perplexity": found.perplexity,
        "resident_perplexity": found.resident_perplexity,
    }


def row(model: Model, engine: Engine, run: Run, rates: Rates) -> Row:
    """Gives what was measured against what was predicted, without the capacity as it was asked for."""
    ttft_s, tpot_s = predict.measured(run, 1)
    guess = predicted(engine, run, rates, 1)
    replays, events = engine.policy.replay(run.trace)
    decode = copied(engine, replays.schedule, stacked(run), 1)
    mix = engine.policy.mix
    return {
        "model": model.name,
        "engine": engine_name(engine),
        "eviction": mix.eviction.name,
        "prefetch": mix.prefetch.name,
        "miss": mix.miss.name,
        "routing": mix.routing.name,
        "precisions": model.precisions,
        "batch": run.batch,
        "capacity_slots": engine.capacity_slots,
        "most_resident": run.most_resident,
        "hit_rate": decode.hit_rate,
        "copies_per_token": decode.copies_per_token,
        "copy_bytes_per_token": decode.bytes_per_token,
        "events_equal": run.events_equal(events),
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "tokens_per_s": run.tokens_per_s,
        "predicted_ttft_s": guess.ttft_s,
        "predicted_tpot_s": guess.tpot_s,
        "ttft_error": guess.ttft_s / ttft_s - 1,
        "tpot_error": guess.tpot_s / tpot_s - 1,
        "dropped_share": None,
        "moved_share": None,
        "host_share": None,
        "changed_tokens": None,
        "kl_nats": None,
        "perplexity": None,
        "resident_perplexity": None,
        "evidence": "measured",
    }


def _prompts(cfg: MoEConfig, config: OffloadConfig, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, cfg.vocabulary, config.prompt_tokens) for _ in range(config.requests)]
