"""What the fused engine does beside one request at one precision: batches, several precisions, routing by the cache."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.offloading.bench import Bench, Result, line, random_prompts, routing
from experiments.benchmarks.offloading.engines import copies_a_pass
from experiments.calibration.subject import few_layers
from specmd_jax import moe
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.measure import predict
from specmd_jax.moe.model.random_weights import random_experts
from specmd_jax.moe.runtime.run import Run
from specmd_jax.moe.runtime.store import stack
from specmd_jax.types import Trace

RULES = ("fetch", "fetch_priority", "cascade", "fetch_lowest_bit")
STRENGTHS = (0.0, 0.1, 0.3, 1.0)
ENCODED_LAYERS = 2
"""Layers of the model with several precisions: encoding an expert takes the host a good second."""


def batches(bench: Bench) -> Result:
    """Times requests decoded together; each first request of a place fills the cache and compiles."""
    sizes = (1, 2) if bench.toy else (1, 2, 4, 8, 16)
    found: Result = {"rows": []}
    bench.result["batches"] = found
    for capacity in ("25%",) if bench.toy else ("100%", "25%"):
        alone: Run | None = None
        for batch in sizes:
            requests = max(sizes)
            if _late(bench, found):
                return found
            engine = Fused(bench.cfg, bench.params, bench.stacked, capacity=capacity, batch=batch, name=bench.name)
            prompts = random_prompts(bench.cfg, requests, bench.prompt)
            trace = routing(bench.cfg, bench.expert_bytes, requests, bench.prompt, bench.steps, seed=3)
            row = {"capacity": capacity, "batch": batch, "requests": requests}
            run = _timed(bench, found, row, engine, prompts, trace)
            if run is not None:
                alone = alone or run
                found["rows"][-1] |= {
                    "tokens_per_s": run.tokens_per_s,
                    "of_one_by_one": run.tokens_per_s / alone.tokens_per_s,
                    "tokens_equal": float(np.mean(run.tokens == alone.tokens)),
                }
                bench.save()
    return found


def precisions(bench: Bench) -> Result:
    """Times the rules that choose among several precisions, and says what they do to the text."""
    cfg = few_layers(bench.cfg, ENCODED_LAYERS)
    key = jax.random.key(0)
    params = jax.jit(moe.random_params, static_argnums=0)(cfg, key)
    begin = time.perf_counter()
    layers = (random_experts(cfg, key, layer) for layer in range(len(cfg.moe_layers)))
    store = stack(cfg, layers, precisions=("int4", "int8", "native"), available_bytes=bench.host_bytes)
    found: Result = {"layers": len(cfg.moe_layers), "made_s": time.perf_counter() - begin, "rows": []}
    bench.result["precisions"] = found
    prompts = random_prompts(cfg, bench.requests, bench.prompt)
    trace = routing(cfg, store.expert_bytes, bench.requests, bench.prompt, bench.steps, seed=3)
    resident: Run | None = None
    rules = ("cascade",) if bench.toy else RULES
    for rule, capacity in (("fetch", "100%"), *((rule, "25%") for rule in rules)):
        if _late(bench, found):
            return found
        engine = Fused(cfg, params, store, miss=rule, capacity=capacity, name=bench.name)
        run = _timed(bench, found, {"miss": rule, "capacity": capacity}, engine, prompts, trace, keep_logits=True)
        if run is not None:
            resident = resident or run
            found["rows"][-1] |= {"most_bytes": run.most_bytes} | _text(resident, run)
            bench.save()
    return found


def by_cache(bench: Bench) -> Result:
    """Times cache-aware routing at several strengths; 0 is standard routing."""
    found: Result = {"rows": []}
    bench.result["by_cache"] = found
    prompts = random_prompts(bench.cfg, bench.requests, bench.prompt)
    trace = routing(bench.cfg, bench.expert_bytes, bench.requests, bench.prompt, bench.steps, seed=3, logits=True)
    for strength in STRENGTHS[:2] if bench.toy else STRENGTHS:
        if _late(bench, found):
            return found
        engine = Fused(
            bench.cfg, bench.params, bench.stacked,
            capacity="25%", routing="cache_aware", strength=strength, name=bench.name,
        )  # fmt: skip
        _timed(bench, found, {"strength": strength}, engine, prompts, trace)
    return found


def _timed(
    bench: Bench, found: Result, row: Result, engine: Fused, prompts: Iterable[Any], trace: Trace, **options: Any
) -> Run | None:
    """Adds a row of the faster of two runs, or of why there is none."""
    begin, prompts = time.perf_counter(), list(prompts)
    try:
        runs = [engine.generate(prompts, bench.steps, trace, **options) for _ in range(2)]
    except Exception as error:  # the other rows are worth having
        traceback.print_exc()
        found["rows"].append(row | {"failed": line(error)})
        bench.save()
        return None
    run = max(runs, key=lambda run: run.tokens_per_s)
    copied = copies_a_pass(engine, run)
    ttft_s, tpot_s = predict.measured(run, min(engine.policy.batch, len(prompts) - 1))
    found["rows"].append(
        row
        | {
            "events_equal": copied.events_equal,
            "copies_per_pass": copied.per_token,
            "tpot_s": tpot_s,
            "ttft_s": ttft_s,
            "with_compiling_s": time.perf_counter() - begin,
            "xla": ", ".join(sorted(engine.reasons)),
        }
    )
    bench.save()
    return run


def _text(resident: Run, run: Run) -> Result:
    """How far a run's next tokens are from those of everything on the device, where both made the same text so far."""
    assert resident.logits is not None and run.logits is not None
    return {
        "tokens_equal": float(np.mean(run.tokens == resident.tokens)),
        "logits_equal": bool(np.array_equal(run.logits, resident.logits)),
    }


def _late(bench: Bench, found: Result) -> bool:
    if bench.left_s < (5 if bench.toy else 40):
        found["stopped"] = "out of time"
        return True
    return False
