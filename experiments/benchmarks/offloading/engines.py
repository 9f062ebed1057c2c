"""The engines: equal to the resident model, beside each other, and beside what was predicted."""

from __future__ import annotations

import time
import traceback
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.offloading.bench import Bench, Result, line
from experiments.benchmarks.offloading.hardware import loop_rate
from specmd_jax import moe
from specmd_jax.moe.layerwise.engine import Offloaded
from specmd_jax.moe.measure import predict
from specmd_jax.moe.runtime.decider import GateOutput
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import FETCHED
from specmd_jax.setting import Setting
from specmd_jax.types import DECODE, PREFILL


def equality(bench: Bench) -> Result:
    """Compares offloaded with resident on this machine: tokens and all router logits."""
    cfg, prompts, steps = bench.cfg, bench.prompts(1), 8
    whole = moe.generate(cfg, bench.params, bench.stacks, prompts[0][None], steps)
    expected = np.concatenate(
        [np.asarray(whole.prefill.logits)[:, 0].swapaxes(0, 1), np.asarray(whole.decode.logits)[:, :, 0, 0]]
    )
    found: Result = {}
    for name, capacity in (("layerwise", "10%"), ("layerwise", "100%"), ("fused", "10%")):
        run = bench.engine(name, capacity, "none", keep_logits=True).generate(prompts, steps)
        assert run.trace.logits is not None
        found[f"{name}_tokens_equal_{capacity}"] = bool(np.array_equal(run.tokens, whole.tokens))
        found[f"{name}_router_logits_equal_{capacity}"] = bool(np.array_equal(run.trace.logits, expected))
        found[f"{name}_router_logits_max_difference_{capacity}"] = float(np.abs(run.trace.logits - expected).max())
    return found


def fused_beside_layerwise(bench: Bench) -> Result:
    """Times the same requests by both engines: all resident, and with a quarter of the experts."""
    trace, prompts = bench.trace(3), bench.prompts()
    found: Result = {"rows": []}
    bench.result["engines"] = found
    found["loop_GB_per_s"] = link = loop_rate(bench)
    for capacity, prefetch in (("25%", "none"), ("100%", "none"), ("25%", "gate_ahead")):
        for name in ("fused", "layerwise"):
            # programs of their own for prefetching: not at the price of the steps that follow
            if bench.left_s < (5 if bench.toy else 40 if prefetch == "none" else 120):
                return found | {"stopped": "out of time"}
            begin = time.perf_counter()
            try:
                engine = bench.engine(name, capacity, prefetch)
                run = engine.generate(prompts, bench.steps, trace)
            except Exception as error:  # the other engine's numbers are worth having
                found["rows"].append({"engine": name, "capacity": capacity, "failed": line(error)})
                bench.save()
                traceback.print_exc()
                continue
            ttft_s, tpot_s = predict.measured(run, 1)
            copied = copies_a_pass(engine, run)
            found["rows"].append(
                {
                    "engine": name,
                    "eviction": "lru",
                    "capacity": capacity,
                    "prefetch": prefetch,
                    "events_equal": copied.events_equal,
                    "copies_per_token": copied.per_token,
                    "ttft_s": ttft_s,
                    "tpot_s": tpot_s,
                    "link_bound_s": copied.per_token * bench.expert_bytes / (link * 1e9),
                    "with_compiling_s": time.perf_counter() - begin,
                    "host_us_a_layer": host_us(run),
                }
            )
            bench.save()
    return found


def host_us(run: Run) -> str:
    """Gives the median microseconds of the host in a decoded layer, by what it does."""
    if run.host_s is None:
        return "none"
    parts = np.median(run.host_s[len(run.host_s) // 3 :], axis=0)  # the first of the requests fills the cache
    return ", ".join(
        f"{name} {1e6 * p:.0f}" for name, p in zip(("wait", "choose", "start", "decide"), parts, strict=True)
    )


def layerwise(bench: Bench) -> Result:
    """Compares measured with predicted times over policies, capacities and prefetching; rates come from two runs."""
    cfg = bench.cfg
    trace, other = bench.trace(3), bench.trace(4)
    prompts = bench.prompts()

    def engine(eviction: str, capacity: str, prefetch: str) -> Offloaded:
        setting = Setting(eviction=eviction, capacity=capacity, prefetch=prefetch)
        return Offloaded(cfg, bench.params, bench.store, setting, name=bench.name)

    rates: dict[str, predict.Rates] = {}

    def other_run(capacity: str, prefetch: str) -> tuple[Any, Run]:
        own = engine("lru", capacity, prefetch)
        return own.policy, own.generate(prompts, bench.steps, other)

    everything = other_run("100%", "none")[1]
    rates["none"] = predict.fit(everything, other_run("30%", "none")[1])
    resident_tpot_s = predict.measured(everything, 1)[1]
    found: Result = {"rates": {}, "rows": []}
    found["all_resident_layerwise_tpot_s"] = resident_tpot_s
    resident_s = bench.result.get("resident", {}).get("step_in_loop_s", resident_tpot_s)
    link = (
        bench.result["copies"]["put_32_GB_per_s"] * 1e9
        if "copies" in bench.result
        else bench.expert_bytes / rates["none"].copy_s
    )
    decision_s: list[float] = []
    for prefetch in ("none", "gate_ahead"):  # what says most comes first: time may end
        for capacity in ("25%", "50%", "12.5%", "75%"):
            for eviction in ("lru", "lfu", "least_stale", "slru"):
                if bench.left_s < (5 if bench.toy else 15):
                    found["stopped"] = "out of time"
                    return found
                if prefetch not in rates:
                    runs = other_run("100%", prefetch)[1], *other_run("30%", prefetch)
                    rates[prefetch] = predict.fit_prefetch(rates["none"], *runs)
                found["rates"] = {name: row._asdict() for name, row in rates.items()}
                own = engine(eviction, capacity, prefetch)
                run = own.generate(prompts, bench.steps, trace)
                ttft_s, tpot_s = predict.measured(run, 1)
                guess = predict.predict(own.policy, run.trace, rates[prefetch], 1)
                copied = copies_a_pass(own, run)
                link_s = copied.per_token * bench.expert_bytes / link
                found["rows"].append(
                    {
                        "eviction": eviction,
                        "capacity": capacity,
                        "prefetch": prefetch,
                        "events_equal": copied.events_equal,
                        "copies_per_token": copied.per_token,
                        "ttft_s": ttft_s,
                        "tpot_s": tpot_s,
                        "predicted_ttft_s": guess.ttft_s,
                        "predicted_tpot_s": guess.tpot_s,
                        "ttft_error": guess.ttft_s / ttft_s - 1,
                        "tpot_error": guess.tpot_s / tpot_s - 1,
                        "link_bound_s": link_s,
                        "over_bound": tpot_s / max(link_s, resident_s),
                        "most_resident": run.most_resident,
                    }
                )
                bench.result["layerwise"] = found
                bench.save()
    own = engine("lru", "25%", "none")
    gate = GateOutput(trace.expert_ids[:1, 0].astype(np.int32), np.ones((1, cfg.top_k), np.float32))
    for visit in range(200):
        begin = time.perf_counter()
        own.decider.visit(visit % len(cfg.moe_layers), visit // len(cfg.moe_layers), True, gate)
        decision_s.append(time.perf_counter() - begin)
    found["decision_s"] = float(np.median(decision_s[20:]))
    return found


class Copied(NamedTuple):
    """Experts copied per pass, the first request left out, and whether all of a run's events are the simulator's."""

    per_token: float
    per_prompt: float
    events_equal: bool


def copies_a_pass(engine: Any, run: Run) -> Copied:
    """Counts what a run copied."""
    replays, events = engine.policy.replay(run.trace)
    s = replays.schedule
    copies = np.array([(d.outcome == FETCHED).sum() + (d.prefetched > 0).sum() for d in run.decisions])

    def per_pass(phase: int) -> float:
        rows = (s.phase == phase) & (s.request > 0)
        passes = int((s.starts_pass & rows).sum())
        return float(copies[rows].sum() / passes) if passes else float("nan")

    return Copied(per_pass(DECODE), per_pass(PREFILL), run.events_equal(events))
