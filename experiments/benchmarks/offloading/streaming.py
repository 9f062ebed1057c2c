"""The fused engine at one precision: its times beside what link and memory allow, and beside what is predicted."""

from __future__ import annotations

import functools
import time
import traceback
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks.offloading.bench import Bench, Result, line, random_prompts, routing
from experiments.benchmarks.offloading.engines import copies_a_pass
from experiments.benchmarks.offloading.hardware import device_rates, link_rate
from experiments.benchmarks.offloading.noise import noisy_layers
from experiments.offloading.measured import made_of
from specmd_jax import moe
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.measure import predict
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import Params, init_cache
from specmd_jax.moe.model.quant import tree_bytes
from specmd_jax.moe.runtime.run import Run
from specmd_jax.moe.runtime.store import StackedStore, stack

EVICTIONS = ("lru", "least_stale", "lfu", "slru")
CAPACITIES = ("25%", "50%", "12.5%", "75%")
FITTED = ("100%", "30%")
"""Capacities of the runs that rates are fitted to, with other routing."""
LONG = 1024
"""Tokens of the longer prompts."""


class Subject(NamedTuple):
    """A model with experts of one precision in host memory, and what the machine allows it."""

    name: str
    cfg: MoEConfig
    params: Params
    store: StackedStore
    precision: str
    link_bytes_per_s: float
    memory_bytes_per_s: float


class Cell(NamedTuple):
    """A setting of the engine and a request's shape."""

    eviction: str
    capacity: str
    prefetch: str
    prompt: int
    steps: int


def bfloat16(bench: Bench) -> Result:
    """OLMoE's shape in bf16: every policy and capacity, with and without prefetch."""
    return _table(
        bench, subject(bench, bench.name, bench.cfg, "bfloat16"), EVICTIONS, CAPACITIES, ("none", "gate_ahead")
    )


def int4(bench: Bench) -> Result:
    """OLMoE's shape with int4 experts."""
    return _table(bench, subject(bench, bench.name, bench.cfg, "int4"), EVICTIONS, CAPACITIES, ("none",))


def mxfp4(bench: Bench) -> Result:
    """gpt-oss-20b's shape in MXFP4, as it is published."""
    return _table(bench, mxfp4_subject(bench), EVICTIONS[:2], CAPACITIES[:2], ("none",))


def mxfp4_subject(bench: Bench) -> Subject:
    """Makes gpt-oss-20b's shape in MXFP4."""
    if bench.toy:
        cfg = moe.tiny("gpt_oss", "bfloat16", hidden_size=64, intermediate_size=64)
        return subject(bench, "tiny", cfg, "mxfp4")
    return subject(bench, "gpt-oss-20b", moe.published("gpt-oss-20b"), "mxfp4")


def subject(bench: Bench, name: str, cfg: MoEConfig, precision: str) -> Subject:
    """Makes the model and measures the machine."""
    if precision == cfg.dtype:
        params, store = bench.params, bench.stacked
    else:
        params = jax.jit(moe.random_params, static_argnums=0)(cfg, jax.random.key(0))
        store = stack(cfg, noisy_layers(cfg, precision), precision, available_bytes=bench.host_bytes)
    memory = device_rates(bench)["device_GB_per_s"] * 1e9
    return Subject(name, cfg, params, store, precision, link_rate(bench) * 1e9, memory)


def _table(
    bench: Bench, own: Subject, evictions: tuple[str, ...], capacities: tuple[str, ...], prefetches: tuple[str, ...]
) -> Result:
    """Times all cells, what says most first: time may end. Every row is kept as it comes."""
    if bench.toy:
        evictions, capacities, prefetches = evictions[:1], capacities[:1], prefetches[:1]
    rows = _Rows(bench, own)
    usual = functools.partial(Cell, prompt=bench.prompt, steps=bench.steps)
    for prefetch in prefetches:
        rows.begin(usual("lru", "100%", prefetch))
        if prefetch == "none":
            for capacity in ("25%",) if bench.toy else ("25%", "5%", "50%"):
                rows.add(usual("lru", capacity, prefetch))
            rows.add_long(2 * bench.prompt if bench.toy else LONG)
            rows.found |= same_bits(bench, own)
            bench.save()
        for eviction in evictions:
            for capacity in capacities:
                rows.add(usual(eviction, capacity, prefetch))
    return rows.found | errors(rows.found["rows"])


class _Rows:
    """What is measured of one subject, row by row."""

    def __init__(self, bench: Bench, own: Subject):
        self._bench, self._own = bench, own
        self._rates: dict[tuple[str, ...], predict.PassRates] = {}
        self._resident: tuple[float, float] | None = None
        self._done: set[Cell] = set()
        self._active = active_bytes(bench, own)
        self.found: Result = {
            "model": own.name,
            "expert_bytes": own.store.expert_bytes,
            "link_GB_per_s": own.link_bytes_per_s / 1e9,
            "memory_GB_per_s": own.memory_bytes_per_s / 1e9,
            "active_bytes": self._active,
            "rates": {},
            "rows": [],
        }
        bench.result[own.precision] = self.found

    def begin(self, resident: Cell) -> None:
        """Measures what bounds the cells to come, with everything on the device."""
        if self._late():
            return
        self._resident = predict.measured(self._fit(resident), 1)
        ttft_s, tpot_s = self._resident
        self.found[f"resident_{resident.prefetch}"] = {
            "ttft_s": ttft_s,
            "tpot_s": tpot_s,
            "tpot_over_memory": tpot_s * self._own.memory_bytes_per_s / self._active,
        }
        self._bench.save()

    def add(self, cell: Cell) -> None:
        """Measures a cell beside its prediction, once. Rates hold for policies whose passes are made alike."""
        if cell in self._done or self._late():
            return
        engine = _engine(self._own, cell)
        made = made_of(engine)
        if made not in self._rates:
            self._fit(cell)
        self._keep(cell, engine, self._rates[made], self._resident)

    def add_long(self, prompt: int) -> None:
        """Measures longer prompts: everything on the device, then a quarter."""
        resident = None
        for capacity in ("100%", "25%"):
            if not self._late():
                cell = Cell("lru", capacity, "none", prompt, 4)
                run = self._keep(cell, _engine(self._own, cell), None, resident)
                resident = resident if run is None else predict.measured(run, 1)

    def _keep(
        self, cell: Cell, engine: Fused, rates: predict.PassRates | None, resident: tuple[float, float] | None
    ) -> Run | None:
        try:
            measured, run = _row(self._bench, self._own, cell, engine, rates, resident)
        except Exception as error:  # the other cells' numbers are worth having
            measured, run = {**cell._asdict(), "failed": line(error)}, None
            traceback.print_exc()
        self._done.add(cell)
        self.found["rows"].append(measured)
        self._bench.save()
        return run

    def _fit(self, cell: Cell) -> Run:
        """Fits the rates of passes made as this cell's; also the run with everything on the device."""
        cells = [cell._replace(capacity=capacity) for capacity in FITTED]
        engines = [_engine(self._own, one) for one in cells]
        resident, missing = (
            _run(self._bench, self._own, engine, one, seed=4) for engine, one in zip(engines, cells, strict=True)
        )
        self._rates[made_of(engines[0])] = rates = predict.fit_passes(resident, missing)
        self.found["rates"][f"{cell.eviction}, {cell.prefetch}"] = rates._asdict()
        return resident

    def _late(self) -> bool:
        if self._bench.left_s >= (5 if self._bench.toy else 60):
            return False
        self.found["stopped"] = "out of time"
        return True


def active_bytes(bench: Bench, own: Subject) -> int:
    """Gives what a decode step reads at least: the dense weights, one token's experts, keys and values."""
    cfg = own.cfg
    cache = tree_bytes(init_cache(cfg, 1, bench.prompt + bench.steps))
    dense = tree_bytes(own.params) - (0 if cfg.tied else tree_bytes(own.params["embed"]))
    return dense + own.store.expert_bytes * cfg.top_k * len(cfg.moe_layers) + cache


def _engine(own: Subject, cell: Cell, **options: Any) -> Fused:
    return Fused(
        own.cfg, own.params, own.store, eviction=cell.eviction, capacity=cell.capacity, prefetch=cell.prefetch,
        **options,
    )  # fmt: skip


def _run(bench: Bench, own: Subject, engine: Fused, cell: Cell, seed: int) -> Run:
    """Runs the bench's requests with routing that has locality, twice, and gives the faster run: a machine that is lent
    stands still now and then. The first request fills the cache and compiles."""
    prompts = random_prompts(own.cfg, bench.requests, cell.prompt)
    trace = routing(own.cfg, own.store.expert_bytes, bench.requests, cell.prompt, cell.steps, seed)
    runs = [engine.generate(prompts, cell.steps, trace) for _ in range(2)]
    return min(runs, key=lambda run: predict.measured(run, 1)[1])


def _row(
    bench: Bench,
    own: Subject,
    cell: Cell,
    engine: Fused,
    rates: predict.PassRates | None,
    resident: tuple[float, float] | None,
) -> tuple[Result, Run]:
    """Measures a cell. ``resident``: (TTFT, TPOT) with everything on the device, which bounds them as the link does."""
    begin = time.perf_counter()
    run = _run(bench, own, engine, cell, seed=3)
    ttft_s, tpot_s = predict.measured(run, 1)
    copied = copies_a_pass(engine, run)
    link_s = copied.per_token * own.store.expert_bytes / own.link_bytes_per_s
    prompt_link_s = copied.per_prompt * own.store.expert_bytes / own.link_bytes_per_s
    found: Result = cell._asdict() | {
        "events_equal": copied.events_equal,
        "copies_per_token": copied.per_token,
        "tpot_s": tpot_s,
        "link_s": link_s,
        "prompt_copies": copied.per_prompt,
        "ttft_s": ttft_s,
        "prompt_link_s": prompt_link_s,
    }
    if resident is not None:
        found |= {
            "tpot_over_bound": tpot_s / max(link_s, resident[1]),
            "ttft_over_bound": ttft_s / max(prompt_link_s, resident[0]),
        }
    if rates is not None:
        guess = predict.predict_passes(engine.policy, run.trace, rates, 1)
        found |= {
            "predicted_tpot_s": guess.tpot_s,
            "predicted_ttft_s": guess.ttft_s,
            "tpot_error": guess.tpot_s / tpot_s - 1,
            "ttft_error": guess.ttft_s / ttft_s - 1,
        }
    return found | {"with_compiling_s": time.perf_counter() - begin}, run


def same_bits(bench: Bench, own: Subject) -> Result:
    """Compares text and logits under the model's own routing with those of everything on the device."""
    prompts, steps = random_prompts(own.cfg, 1, bench.prompt, seed=2), 8
    runs = {}
    for capacity in ("100%", "25%") if bench.toy else ("100%", "25%", "5%"):
        if bench.left_s < (5 if bench.toy else 60):
            break
        engine = _engine(own, Cell("lru", capacity, "none", bench.prompt, steps))
        runs[capacity] = engine.generate(prompts, steps, keep_logits=True)
    whole, found = runs.pop("100%", None), {}
    for capacity, run in runs.items():
        assert whole is not None and whole.logits is not None and run.logits is not None
        found[f"tokens_equal_{capacity}"] = bool(np.array_equal(run.tokens, whole.tokens))
        found[f"logits_equal_{capacity}"] = bool(np.array_equal(run.logits, whole.logits))
    return found


def errors(rows: list[Result]) -> Result:
    """Counts how far predictions are off, with and without prefetch."""
    found: Result = {}
    for prefetch in dict.fromkeys(row["prefetch"] for row in rows):
        for name in ("tpot_error", "ttft_error"):
            off = np.abs([row[name] for row in rows if row["prefetch"] == prefetch and name in row])
            if off.size:
                found |= {
                    f"{name}_{prefetch}_within_5_percent": f"{int((off <= 0.05).sum())} of {off.size}",
                    f"{name}_{prefetch}_worst": float(off.max()),
                }
    return found
