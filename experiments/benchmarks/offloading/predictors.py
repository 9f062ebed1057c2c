"""Whether predicting who is used again pays on this machine: recorded routing, each policy's own work included."""

from __future__ import annotations

import time
import traceback
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.offloading.bench import Bench, Result, line, random_prompts, routing
from experiments.benchmarks.offloading.engines import copies_a_pass
from experiments.benchmarks.offloading.streaming import Subject, mxfp4_subject
from specmd_jax.learn.splits import split
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.measure import predict
from specmd_jax.moe.runtime.run import Run
from specmd_jax.trace import select_requests
from specmd_jax.trace.bundled import bundled
from specmd_jax.types import Trace

EVICTIONS = ("lru", "adaptive", "lfu_decay", "learned", "online")
CAPACITIES = ("25%", "12.5%", "50%")
LINKS_GB_PER_S = (1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0)
TOKENS = 160  # decoded tokens of a request
REQUESTS = 5  # the first compiles and fills the cache


class Cell(NamedTuple):
    """A setting of the engine."""

    eviction: str
    capacity: str
    prefetch: str = "none"


def predictors(bench: Bench) -> Result:
    """Times predicting policies beside classics: gpt-oss-20b's shape in MXFP4 with its recorded routing.

    The requests are of categories that the package's trained predictor has not seen. Everything on the device is run
    under each policy, too: what it takes more than `lru` there is the policy's own work.
    """
    own = mxfp4_subject(bench)
    trace = _recorded(bench, own)
    found: Result = {
        "model": own.name,
        "requests": trace.requests,
        "decoded_tokens": int(trace.lengths.min()),
        "expert_bytes": own.store.expert_bytes,
        "link_GB_per_s": own.link_bytes_per_s / 1e9,
        "rows": [],
    }
    bench.result["predictors"] = found
    cells = [
        *(Cell(eviction, capacity) for capacity in ("100%", "25%") for eviction in EVICTIONS),
        Cell("lru", "25%", "adaptive"),
        Cell("lru", "100%", "adaptive"),
        *(Cell(eviction, capacity) for capacity in CAPACITIES[1:] for eviction in EVICTIONS[:4]),
    ]
    for cell in cells[:7:5] + cells[1:7:5] if bench.toy else cells:
        if bench.left_s < (5 if bench.toy else 40):
            found["stopped"] = "out of time"
            break
        found["rows"].append(cell._asdict() | _measured(own, cell, trace))
        bench.save()
    return found | charged(found["rows"]) | {"links": at_links(found["rows"], own.link_bytes_per_s)}


def _recorded(bench: Bench, own: Subject) -> Trace:
    """Gives what is fed to the model in place of its own routing."""
    if bench.toy:
        return routing(own.cfg, own.store.expert_bytes, 3, 1, bench.steps, seed=3)
    whole = bundled(own.name)
    test = split(whole, "category").test
    long = test[whole.lengths[test] >= TOKENS][:REQUESTS]
    return select_requests(whole, long)


def _measured(own: Subject, cell: Cell, trace: Trace) -> Result:
    """Runs a cell, each request from its first decoded token; the faster of two runs."""
    begin = time.perf_counter()
    try:
        engine = Fused(own.cfg, own.params, own.store, name=own.name, **cell._asdict())
        prompts, steps = random_prompts(own.cfg, trace.requests, 1), min(int(trace.lengths.min()), TOKENS)
        runs = [engine.generate(prompts, steps, trace) for _ in range(2)]
    except Exception as error:  # the other cells' numbers are worth having
        traceback.print_exc()
        return {"failed": line(error)}
    run = min(runs, key=lambda run: predict.measured(run, 1)[1])
    copied = copies_a_pass(engine, run)
    return {
        "events_equal": copied.events_equal,
        "copies_per_token": copied.per_token,
        "tpot_s": predict.measured(run, 1)[1],
        "slower_tpot_s": max(predict.measured(run, 1)[1] for run in runs),
        "copy_s": _copy_s(run, copied.per_token),
        "xla": ", ".join(sorted(engine.reasons)),
        "with_compiling_s": time.perf_counter() - begin,
    }


def _copy_s(run: Run, copies: float) -> float | None:
    """Gives what one copy more adds to a pass, in this run; None: its passes copy alike."""
    if copies == 0:
        return None
    rates = predict.fit_alike([run])
    return rates.copy_s or None


def charged(rows: list[Result]) -> Result:
    """Gives the seconds that a token takes more than under `lru` alone, with everything on the device."""
    return {f"own_work_s_per_token_{' and '.join(name)}": seconds for name, seconds in _own_work_s(rows).items()}


def _own_work_s(rows: list[Result]) -> dict[tuple[str, str], float]:
    resident = {(row["eviction"], row["prefetch"]): row["tpot_s"] for row in _good(rows) if row["capacity"] == "100%"}
    usual = resident.get(("lru", "none"))
    return {} if usual is None else {name: tpot_s - usual for name, tpot_s in resident.items()}


def at_links(rows: list[Result], link_bytes_per_s: float) -> dict[str, Any]:
    """Estimates TPOT against `lru`'s at the same capacity on other links, from what was measured on this one: a pass
    under `lru` beside its copies, what a copy adds, how many there are, and the policy's own work.

    Also from which link on a policy no longer gains: there, the copies that it saves take as long as its own work.
    """
    own_s = _own_work_s(rows)
    good = [row for row in _good(rows) if row["capacity"] != "100%" and row["prefetch"] == "none"]
    slopes = [row["copy_s"] for row in good if row["copy_s"]]
    if not slopes:
        return {}
    copy_s, found = float(np.median(slopes)), {}
    base = {row["capacity"]: row for row in good if row["eviction"] == "lru"}
    for row in good:
        lru, work_s = base.get(row["capacity"]), own_s.get((row["eviction"], "none"))
        if lru is None or row is lru or work_s is None:
            continue
        beside_s = lru["tpot_s"] - lru["copies_per_token"] * copy_s
        saved = lru["copies_per_token"] - row["copies_per_token"]
        estimates = {}
        for link in LINKS_GB_PER_S:
            scaled_s = copy_s * link_bytes_per_s / (link * 1e9)
            own, other = row["copies_per_token"] * scaled_s + work_s, lru["copies_per_token"] * scaled_s
            estimates[f"{link:g} GB/s"] = (beside_s + own) / (beside_s + other)
        gains_up_to = copy_s * saved * link_bytes_per_s / work_s / 1e9 if saved > 0 and work_s > 0 else None
        found[f"{row['eviction']}, {row['capacity']}"] = {
            "measured": row["tpot_s"] / lru["tpot_s"],
            "gains_up_to_GB_per_s": gains_up_to,
            **estimates,
        }
    return found


def _good(rows: list[Result]) -> list[Result]:
    return [row for row in rows if "failed" not in row]
