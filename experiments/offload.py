"""A model with its experts in host memory, timed, and the simulator's prediction beside it.

    python -m experiments.offload                                   # a tiny model, on any machine
    python -m experiments.offload --smoke
    python -m experiments.offload --engine fused                    # one program per pass; default: layer by layer
    python -m experiments.offload --model OLMoE-1B-7B               # a published shape in bf16, made-up weights
    python -m experiments.offload --checkpoint DIR                  # config.json and safetensors
    python -m experiments.offload --miss cascade --precisions int4,int8,native
    python -m experiments.offload --miss drop --miss-numbers keep=1

Runs every eviction policy at every capacity, with and without prefetching, on the same prompts. Rates come from runs of
other prompts on the spot (`specmd_jax.moe.measure.predict`); each run's recorded routing is then replayed by the
simulator under the run's policy, which must find the same events, and gives the predicted times. Weights that are made
up route without locality: times and predictions are real, hit rates mean nothing.

A miss rule that changes what is computed is also compared with the all-resident model: both read the resident model's
text, and the table says how often the next token differs, the KL divergence, and the text's perplexity under each (of
made-up weights they show that it is measured, not what a rule costs).

Writes rows.csv, manifest.json and one trace (trace.npz) to results/offload, and prints a table. Prompts are random
token ids. The first request of a run fills the cache and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.offload import OffloadConfig
from experiments.calibrate import model_config
from experiments.common.command_line import main_guard, output_paths, parser, results_folder
from experiments.common.options import options_of, settings_of
from specmd_jax import moe
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.checkpoint.folder import Checkpoint, load_config
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict, quality
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params
from specmd_jax.moe.runtime import store
from specmd_jax.moe.runtime.policy import Policy
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import FETCHED, HOST
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.offload import TABLE, draw
from specmd_jax.report.reader import MANIFEST, ROWS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.trace import save_trace
from specmd_jax.types import DECODE

TRACE = "trace.npz"

Engine = Offloaded | Fused
Rates = predict.Rates | predict.PassRates


@dataclass(frozen=True)
class Model:
    """What is run. The kind of store says by which engine."""

    name: str
    cfg: MoEConfig
    params: Params
    experts: store.PinnedStore | store.StackedStore

    def engine(self, setting: Setting) -> Engine:
        if isinstance(self.experts, store.StackedStore):
            return Fused(self.cfg, self.params, self.experts, setting, name=self.name)
        return Offloaded(self.cfg, self.params, self.experts, setting, name=self.name)

    @property
    def precisions(self) -> str:
        pinned = self.experts
        return self.cfg.dtype if isinstance(pinned, store.StackedStore) else "+".join(pinned.precisions)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "offload")
    options_of(options, OffloadConfig())
    args = options.parse_args(argv)
    config = settings_of(args, OffloadConfig())
    out = results_folder(options, args)
    _, _, trace_path = output_paths(out, args.overwrite, ROWS, MANIFEST, TRACE)
    model = open_model(config)
    with ResultWriter(out, asdict(config), TABLE, args.overwrite) as writer:
        for row, run in results(model, config):
            writer.write(row)
            if writer.rows == 1:
                save_trace(run.trace, trace_path, overwrite=True)
    print(draw(out))


def open_model(config: OffloadConfig) -> Model:
    """Gives the checkpoint, or made-up weights."""
    if config.checkpoint is not None:
        cfg = load_config(config.checkpoint)
        checkpoint = Checkpoint(config.checkpoint)
        weights.verify(checkpoint, cfg)
        params = weights.load_dense(checkpoint, cfg, check_finite=True)
        if config.engine == "fused":
            return Model(Path(config.checkpoint).name, cfg, params, store.stack_checkpoint(checkpoint, cfg))
        held = store.pin_checkpoint(checkpoint, cfg, precisions=config.precisions)
        return Model(Path(config.checkpoint).name, cfg, params, held)
    cfg, key = model_config(config.model), jax.random.key(0)
    if config.engine == "fused":
        return Model(config.model, cfg, moe.random_params(cfg, key), store.stack_random(cfg, key))
    pinned = store.pin_random(cfg, key, precisions=config.precisions)
    return Model(config.model, cfg, moe.random_params(cfg, key), pinned)


def results(model: Model, config: OffloadConfig) -> Iterator[tuple[Row, Run]]:
    """Gives one row for each policy, capacity and prefetcher."""
    base = Setting(miss=config.miss, numbers=dict(config.miss_numbers))
    # every setting before the first run: a wrong name costs no time
    cells = [
        (setting, model.engine(setting))
        for prefetch in config.prefetches
        for eviction in config.evictions
        for capacity in config.capacities
        for setting in [base.replace(prefetch=prefetch, eviction=eviction, capacity=capacity)]
    ]
    prompts, others = _prompts(model.cfg, config, 1), _prompts(model.cfg, config, 2)
    rates: dict[str, Rates] = {}
    resident: Run | None = None
    for setting, engine in cells:
        prefetch, changes_text = engine.policy.mix.prefetch.name, not engine.policy.policies.miss.fetches_all
        if prefetch not in rates:
            rates[prefetch] = calibrate(model, config, setting, others)
        run = timed(engine, prompts, config.steps)
        measured = row(model, engine, run, rates[prefetch]) | {"capacity": str(setting.capacity)}
        if isinstance(engine, Offloaded) and changes_text:
            if resident is None:
                whole = model.engine(Setting(capacity="100%"))
                resident = whole.generate(prompts, config.steps, keep_logits=True)
            measured |= lossy(engine, run, prompts, resident)
        yield measured, run


def timed(engine: Engine, prompts: list[Any], steps: int) -> Run:
    """Runs with all that it needs compiled before."""
    if not engine.policy.policies.miss.fetches_all:  # which precisions meet in a token shows only as it runs
        engine.generate(prompts, steps)
    return engine.generate(prompts, steps)


def calibrate(model: Model, config: OffloadConfig, setting: Setting, prompts: list[Any]) -> Rates:
    """Gives the rates of the engine under this setting's prefetcher and miss rule, from runs of `lru`."""

    def run(capacity: str, **changes: Any) -> tuple[Policy, Run]:
        engine = model.engine(setting.replace(eviction="lru", capacity=capacity, **changes))
        return engine.policy, timed(engine, prompts, config.steps)

    little, fetch = config.calibration_capacity, {"miss": "fetch", "numbers": {}}
    if config.engine == "fused":
        return predict.fit_passes(run("100%")[1], run(little)[1])
    policies, plain = setting.mix(model.cfg.top_k).build(), {**fetch, "prefetch": "none"}
    rates = predict.fit(run("100%", **plain)[1], run(little, **plain)[1])
    if policies.prefetch is not None:
        rates = predict.fit_prefetch(rates, run("100%", **fetch)[1], *run(little, **fetch))
    return rates if policies.miss.fetches_all else predict.fit_rule(rates, *run(little))


def lossy(engine: Offloaded, run: Run, prompts: list[Any], resident: Run) -> dict[str, Any]:
    """Says what a miss rule changed in a run, and how far it is off the resident model on that model's text."""
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
    if isinstance(rates, predict.PassRates):
        guess = predict.predict_passes(engine.policy, run.trace, rates, 1)
    else:
        guess = predict.predict(engine.policy, run.trace, rates, 1)
    replays, events = engine.policy.replay(run.trace)
    decode = np.flatnonzero((replays.schedule.phase == DECODE) & (replays.schedule.request > 0))
    tokens = len(decode) / len(model.cfg.moe_layers)
    outcome = np.stack([run.decisions[v].outcome for v in decode])
    copied = np.stack([run.decisions[v].row for v in decode])[outcome == FETCHED]
    ahead = sum(int((run.decisions[v].prefetched > 0).sum()) for v in decode)
    level_bytes = engine.policy.sizes.level_bytes[:, 0]
    mix = engine.policy.mix
    return {
        "model": model.name,
        "engine": "fused" if isinstance(engine, Fused) else "layerwise",
        "eviction": mix.eviction.name,
        "prefetch": mix.prefetch.name,
        "miss": mix.miss.name,
        "precisions": model.precisions,
        "capacity_slots": engine.capacity_slots,
        "most_resident": run.most_resident,
        "hit_rate": float(((outcome > 0) & (outcome < FETCHED)).sum() / max(int((outcome > 0).sum()), 1)),
        "copies_per_token": (copied.size + ahead) / tokens,
        "copy_bytes_per_token": float(level_bytes[copied - 1].sum() + ahead * level_bytes[-1]) / tokens,
        "events_equal": run.events_equal(events),
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
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
    return [rng.integers(0, cfg.vocabulary, config.prompt) for _ in range(config.requests)]


if __name__ == "__main__":
    main_guard(main)
