"""The rows of `experiments.evaluate_learned`, study by study."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.evaluate_learned import EvaluateConfig, link_of
from experiments.common import libcachesim
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.learn import controls
from specmd_jax.learn.evaluation import HeldOut, Interval, hits_by_request, ratio, recall_by_request
from specmd_jax.learn.stall import bounds_by_request, cost, layer_time_s, seconds_by_request, with_link
from specmd_jax.policies import EVICTION
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.trained import load
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.evaluate_learned import AFTER, BEGUN, COLUMNS
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.hardware import hardware as find_hardware
from specmd_jax.trace import select_requests
from specmd_jax.trace.prompts import clip_requests
from specmd_jax.types import Trace

LEARNED = ("learned", "adaptive", "online")
CORRECTING = {"fade": 0.9, "rate": 0.05}  # of the first: slower than from nothing, as its weights know much already
NEED_PRECISIONS = ("lhu",)  # with one stored precision it is lfu
TIMED = (("lru", "none"), ("lru", "previous"), ("lru", "learned"), ("learned", "none"), ("learned", "learned"),
         ("adaptive", "none"), ("adaptive", "adaptive"), ("online", "online"))  # fmt: skip
CHARGES = ((False, "charged"), (True, "charged with launches"))


class Judged(NamedTuple):
    """What is judged, and on what."""

    whole: Trace  # with the requests that training had
    trace: Trace  # the requests that judge
    used: HeldOut
    files: dict[str, Path]  # of the weights of each head

    def numbers(self, name: str, head: str) -> dict[str, str]:
        return {"checkpoint": str(self.files[head])} if name == "learned" else {}


def study(judged: Judged, config: EvaluateConfig, writer: ResultWriter) -> None:
    """Adds the rows of every study that the table lacks."""
    parts: list[tuple[str, Callable[[Judged, EvaluateConfig], Iterator[Row]]]] = [
        ("requests", _requests),
        ("gap", _gaps),
        ("rivals", _rivals),
        ("recall", _recalls),
        ("horizon", _horizons),
        ("stall", _stalls),
    ]
    for name, rows in parts:
        if writer.has(_row(name, "done")):
            continue
        began = time.perf_counter()
        for row in rows(judged, config):
            writer.write(row)
        writer.write(_row(name, "done") | {"value": 1.0})
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _row(study: str, measure: str, **given: Any) -> Row:
    return dict.fromkeys(COLUMNS) | {"study": study, "measure": measure} | given


def _within(found: Interval) -> Row:
    return {name: None if np.isnan(value) else value for name, value in found._asdict().items()}


def _requests(judged: Judged, config: EvaluateConfig) -> Iterator[Row]:
    """Says how much is judged, and how much of it training may have seen."""
    trace, used = judged.trace, judged.used
    yield _row("requests", "requests", value=float(trace.requests))
    yield _row("requests", "tokens", value=float(trace.tokens))
    yield _row("requests", "requests learned from", value=float(len(used.trained)))
    kept = used.requests[: trace.requests]
    for tokens in config.runs:
        for layers in (trace.layers, 1):
            if len(used.trained):
                runs, shared = controls.shared_runs(judged.whole, used.trained, kept, tokens, layers)
                share = shared / runs if runs else None
                yield _row("requests", "shared runs", count=tokens, layer=layers, value=share)


def _gaps(judged: Judged, config: EvaluateConfig) -> Iterator[Row]:
    """Gives the hits of every policy without prefetch, between LRU and Belady."""
    trace = judged.trace
    for scope, capacities in config.capacities:
        if scope not in config.scopes:
            continue
        budgets = [Setting(capacity=capacity, scope=scope).budget(trace) for capacity in capacities]
        sizes = [
            describe_capacity(b, expert_bytes=trace.expert_bytes, experts=trace.experts, top_k=trace.top_k)
            for b in budgets
        ]
        demand = _demand(trace)
        low = hits_by_request(trace, "lru", budgets)
        high, bypass = (hits_by_request(trace, name, budgets) for name in ("belady", "belady_bypass"))
        few = select_requests(trace, range(min(config.control_requests, trace.requests)))

        def rows(
            name: str, hits: Any, measure: str = "gap closed", *, scope=scope, low=low, high=high
        ) -> Iterator[Row]:
            for i, capacity in enumerate(capacities):  # noqa: B023 - called within this turn
                shared = {"policy": name, "scope": scope, "capacity": capacity, "cycles": float(sizes[i]["cycles"])}  # noqa: B023
                count = hits.shape[1]
                yield _row(
                    "gap", measure, **shared, **_within(ratio(hits[i] - low[i][:count], (high - low)[i][:count]))
                )
                if measure == "gap closed":
                    gap = bypass[i] - low[i]  # noqa: B023
                    yield _row("gap", "gap to bypass closed", **shared, **_within(ratio(hits[i] - low[i], gap)))
                    yield _row("gap", "hit rate", **shared, **_within(ratio(hits[i], demand)))  # noqa: B023

        for name in EVICTION:
            if name in NEED_PRECISIONS:
                continue
            yield from rows(name, hits_by_request(trace, name, budgets, judged.numbers(name, "evictor")))
        file = str(judged.files["evictor"])
        yield from rows(BEGUN, hits_by_request(trace, "adaptive", budgets, {"checkpoint": file, **CORRECTING}))
        if len(judged.used.trained):
            ran = hits_by_request(_with_trained(judged, config), "adaptive", budgets)
            yield from rows(AFTER, ran[:, -trace.requests :])
        kinds = {"frozen at access": controls.frozen_at_access(file), "misplaced scores": controls.misplaced(file)}
        if len(judged.used.trained):
            counts = controls.uses(judged.whole, judged.used.trained)
            kinds["frozen popularity"] = controls.popularity(counts)
        for name, policy in kinds.items():
            yield from rows(name, hits_by_request(trace, policy, budgets), "control")
        fresh = (("refreshed at decision", controls.refreshed(file)), ("frozen at visit", "learned"))
        for name, policy in fresh if scope == "global" else ():  # a layer's own visits decide in the other scope
            numbers = judged.numbers("learned", "evictor") if policy == "learned" else None
            yield from rows(name, hits_by_request(few, policy, budgets, numbers), "control, few requests")
        mixed = controls.time_shuffled(trace)
        ends = [hits_by_request(mixed, name, budgets) for name in ("lru", "belady")]
        for name in ("lfu", *LEARNED):
            hits = hits_by_request(mixed, name, budgets, judged.numbers(name, "evictor"))
            yield from rows(name, hits, "control, tokens shuffled", low=ends[0], high=ends[1])


def _with_trained(judged: Judged, config: EvaluateConfig) -> Trace:
    """Gives the requests that training had, and after them those that judge."""
    used = judged.used
    both = select_requests(judged.whole, [*used.trained, *used.requests[: judged.trace.requests]])
    return clip_requests(both, config.tokens) if config.tokens else both


def _rivals(judged: Judged, config: EvaluateConfig) -> Iterator[Row]:
    """Gives the same gap in the sequential contract, beside policies that libCacheSim has and the table has not."""
    trace = judged.trace
    if not libcachesim.installed():
        print("libcachesim is not installed (pip install libcachesim): S3-FIFO, ARC and others are left out")
        return
    if np.ptp(trace.expert_bytes) > 0:
        print("libcachesim is not compared: the experts of this trace have different sizes")
        return
    for scope, capacities in config.capacities:
        if scope not in config.scopes:
            continue
        budgets = [Setting(capacity=capacity, scope=scope).budget(trace) for capacity in capacities]

        def ours(name: str, budgets: Any = budgets) -> Any:
            return hits_by_request(trace, name, budgets, judged.numbers(name, "evictor"), "sequential")

        low, high = ours("lru"), ours("belady")
        found = {name: ours(name) for name in (*LEARNED, "lfu_decay")}
        theirs = {name: libcachesim.rival_hits_by_request(trace, name, budgets) for name in libcachesim.RIVALS}
        found |= {f"libCacheSim's {name}": hits for name, hits in theirs.items()}
        for name, hits in found.items():
            for i, capacity in enumerate(capacities):
                if (hits[i] >= 0).all():
                    interval = _within(ratio(hits[i] - low[i], high[i] - low[i]))
                    yield _row("rivals", "gap closed", policy=name, scope=scope, capacity=capacity, **interval)


def _demand(trace: Trace) -> Any:
    """Gives [R] demanded experts."""
    schedule = prepare(trace, reset_per_request=True).schedule
    return np.bincount(schedule.request, (schedule.count > 0).sum(axis=1), trace.requests)


def _counts(trace: Trace, config: EvaluateConfig) -> list[int]:
    return [min(trace.experts, int(trace.top_k * count + 0.5)) for count in config.counts]


def _recalls(judged: Judged, config: EvaluateConfig) -> Iterator[Row]:
    """Gives recall one layer ahead, over all layers and by layer."""
    trace, counts = judged.trace, _counts(judged.trace, config)
    kinds: dict[str, Any] = {name: name for name in ("previous", "popular", "transition", *LEARNED)}
    found = {name: recall_by_request(trace, name, counts, judged.numbers(name, "prefetcher")) for name in kinds}
    moved = recall_by_request(trace, "learned", counts, judged.numbers("learned", "prefetcher"), shift=config.shift)
    for name, each in found.items():
        for i, count in enumerate(counts):
            whole = each[-1].sum(axis=1)
            yield _row(
                "recall", "recall", policy=name, count=count, ahead=1, **_within(ratio(each[i].sum(axis=1), whole))
            )
            for layer in range(trace.layers):
                interval = _within(ratio(each[i][:, layer], each[-1][:, layer], draws=200))
                yield _row("recall", "recall", policy=name, count=count, layer=layer, ahead=1, **interval)
    others: dict[str, Any] = {"shuffled predictions": moved}
    if len(judged.used.trained):
        policy = controls.popular(controls.uses(judged.whole, judged.used.trained))
        others["frozen popularity"] = recall_by_request(trace, policy, counts)
    for name, each in others.items():
        for i, count in enumerate(counts):
            interval = _within(ratio(each[i].sum(axis=1), each[-1].sum(axis=1)))
            yield _row("recall", "control", policy=name, count=count, ahead=1, **interval)


def _horizons(judged: Judged, config: EvaluateConfig) -> Iterator[Row]:
    """Gives recall further ahead; the next token is as many layers ahead as there are."""
    trace, counts = judged.trace, _counts(judged.trace, config)
    for layers in sorted({ahead or trace.layers for ahead in config.horizons if ahead <= trace.layers}):
        for name in ("previous", *LEARNED):
            each = recall_by_request(trace, name, counts, judged.numbers(name, "prefetcher"), ahead=layers)
            for i, count in enumerate(counts):
                interval = _within(ratio(each[i].sum(axis=1), each[-1].sum(axis=1)))
                yield _row("horizon", "recall", policy=name, count=count, ahead=layers, **interval)


def _stalls(judged: Judged, config: EvaluateConfig) -> Iterator[Row]:
    """Gives the stall of whole policies, between LRU without prefetch and what no policy can avoid."""
    trace = select_requests(judged.trace, range(min(config.stall_requests, judged.trace.requests)))
    replays = prepare(trace, reset_per_request=True)
    horizon = max(1, min(config.horizon, trace.layers - 1))
    weights = {head: load(head, str(path)) for head, path in judged.files.items()}
    spent = {
        head: cost(found, trace.layers, trace.experts, horizon if head == "prefetcher" else 1)
        for head, found in weights.items()
    }
    for link, scope in product(config.links, config.scopes):
        machine = machine_of(link, config.hardware, replays)
        budget = Setting(capacity=config.stall_capacity, scope=scope).budget(trace)
        shared = {"scope": scope, "capacity": config.stall_capacity, "link": link}
        yield _row("stall", "layer time, s", **shared, value=layer_time_s(replays, machine))
        for head, one in spent.items():
            yield _row("stall", "FLOPs a visit", policy=head, **shared, value=float(one.flops))
            for launched, measure in CHARGES:
                yield _row(
                    "stall", f"s a visit, {measure}", policy=head, **shared, value=one.seconds(machine, launched)
                )
        bounds = bounds_by_request(trace, budget, machine)
        tokens = np.asarray(trace.lengths - trace.prompt_lengths, np.float64)
        visits = np.bincount(replays.schedule.request, minlength=trace.requests)
        base = None
        for eviction, prefetch in TIMED:
            numbers = _numbers(judged, eviction, prefetch, trace.top_k * config.overfetch)
            mix = Mix.of(eviction, prefetch, numbers=numbers)
            heads = [h for h, n in zip(spent, (eviction, prefetch), strict=True) if n == "learned"]
            charges = {f"{eviction} + {prefetch}": 0.0}
            for launched, measure in CHARGES if heads else ():
                spent_s = sum(spent[head].seconds(machine, launched) for head in heads)
                charges[f"{eviction} + {prefetch}, {measure}"] = spent_s
            measured_us = zip((config.evictor_us, config.prefetcher_us), (eviction, prefetch), strict=True)
            if spent_us := sum(us for us, name in measured_us if name == "adaptive"):
                charges[f"{eviction} + {prefetch}, charged as measured"] = 1e-6 * spent_us
            for said, charge in charges.items():
                found = seconds_by_request(replays, mix, budget, machine, charge, horizon)
                stall_s = found.stall_s + charge * visits  # the predictor makes the device wait as well
                base = stall_s if base is None else base
                yield _row("stall", "stall, s a token", policy=said, **shared, **_within(ratio(stall_s, tokens)))
                closed = ratio(base - stall_s, base - bounds.lower_s)
                yield _row("stall", "stall closed", policy=said, **shared, **_within(closed))
        for name, bound in bounds._asdict().items():
            yield _row("stall", "stall, s a token", policy=name, **shared, **_within(ratio(bound, tokens)))
        distance = ratio(bounds.feasible_s - bounds.lower_s, bounds.feasible_s)
        yield _row("stall", "bounds apart", **shared, **_within(distance))


def _numbers(judged: Judged, eviction: str, prefetch: str, count: float) -> dict[str, Any]:
    return {
        "eviction": judged.numbers(eviction, "evictor"),
        "prefetch": judged.numbers(prefetch, "prefetcher"),
        "selection": {"count": count},
    }


def machine_of(text: str, hardware: str, replays: Prepared) -> Hardware:
    """Gives a machine with a link on which a copy takes so many layer times, or with a preset's link."""
    machine, link = find_hardware(hardware), link_of(text)
    if isinstance(link, str):
        link = find_hardware(link)
        return machine.replace(link_latency_s=link.link_latency_s, link_bytes_per_s=link.link_bytes_per_s)
    return with_link(machine, replays, link)
