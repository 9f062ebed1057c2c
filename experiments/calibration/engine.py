"""The whole beside the parts: runs of the fused engine, and what each kind of rates predicts of them."""

from __future__ import annotations

from typing import Any

from configs.calibrate import CalibrateConfig
from experiments.benchmarks.offloading.bench import random_prompts, routing
from experiments.benchmarks.offloading.engines import copies_a_pass
from experiments.calibration.subject import Subject
from specmd_jax.api import run as replay
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.measure import predict
from specmd_jax.moe.measure.predict import PassRates
from specmd_jax.moe.runtime.run import Run
from specmd_jax.specs.hardware import Hardware


def runs(own: Subject, config: CalibrateConfig, kernels: bool | None = None) -> dict[str, tuple[Fused, Run]]:
    """Runs the engine with everything on the device and with the smaller cache, by capacity. Routing is made up, with
    locality; the first request fills the cache and compiles. Of several runs the fastest counts: a machine that is
    shared stands still now and then."""
    size, prompts = own.store.expert_bytes, random_prompts(own.cfg, config.requests, config.prompt)
    trace = routing(own.cfg, size, config.requests, config.prompt, config.steps, seed=4)
    found = {}
    for capacity in ("100%", config.capacity):
        engine = Fused(
            own.cfg, own.params, own.store, eviction="lru", capacity=capacity, name=own.name, kernels=kernels
        )
        made = [engine.generate(prompts, config.steps, trace) for _ in range(config.runs)]
        found[capacity] = engine, min(made, key=_counted_s)
    return found


def _counted_s(run: Run) -> float:
    """Gives the seconds of all requests but the first, which are equally long."""
    return float(run.visit_s[run.visit_s.size // run.trace.requests :].sum())


def compared(
    found: dict[str, tuple[Fused, Run]], rates: dict[str, PassRates], machine: Hardware
) -> list[dict[str, Any]]:
    """Gives each run's times beside those that each kind of rates predicts, and beside the simulator's clock with the
    hardware file."""
    rows = []
    for capacity, (engine, run) in found.items():
        ttft_s, tpot_s = predict.measured(run, 1)
        copied, trace = copies_a_pass(engine, run), run.trace
        row: dict[str, Any] = {
            "capacity": capacity,
            "copies_per_token": copied.per_token,
            "copies_per_prompt": copied.per_prompt,
            "tpot_s": {"measured": tpot_s},
            "ttft_s": {"measured": ttft_s},
        }
        for name, own in rates.items():
            guess = predict.predict_passes(engine.policy, trace, own, 1)
            row["tpot_s"][name], row["ttft_s"][name] = guess.tpot_s, guess.ttft_s
        simulated = replay(
            trace, eviction="lru", capacity=capacity, hardware=machine, warmup_tokens=int(trace.lengths[0])
        )
        row["tpot_s"]["simulated"], row["ttft_s"]["simulated"] = simulated.tpot_s, simulated.ttft_s
        rows.append(row)
    return rows
