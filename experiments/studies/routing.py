"""The work of `experiments.routing`: everything that is counted on each trace."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.routing import RoutingConfig
from experiments.common.train import read_card
from experiments.offloading.reading import held_out_texts, read_texts
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.evaluation import Interval, held_out, hits_by_request, ratio, recall_by_request
from specmd_jax.learn.splits import groups
from specmd_jax.learn.training import fingerprint
from specmd_jax.policies import EVICTION, PREFETCH
from specmd_jax.policies.trained import DATA, HEADS
from specmd_jax.reference import REFERENCE
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.routing.table import COLUMNS, DONE, TABLE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.setting import Setting
from specmd_jax.specs.capacity import describe_capacity
from specmd_jax.trace import as_trace, measures, select_requests
from specmd_jax.trace.prompts import clip_requests, without_prompts
from specmd_jax.types import Trace

MEASURED, SIMULATED = "measured", "simulated"
LOW, HIGH = "lru", "belady"  # the ends of the gap
FEW = 5  # requests below which a bootstrap over them says nothing


class Subject(NamedTuple):
    """A trace, and the part of it that no learned policy of the package has seen."""

    name: str
    trace: Trace
    judged: Trace


def run(config: RoutingConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Adds what the table in `out` lacks, part by part."""
    if missing := {LOW, HIGH} - set(config.evictions):
        raise SpecmdError(f"evictions lacks {' and '.join(sorted(missing))}, the ends of the gap")
    subjects = [subject(name, config) for name in config.traces]
    digest = hashlib.sha256("".join(fingerprint(it.trace) for it in subjects).encode()).hexdigest()
    config = replace(config, traces=tuple(it.name for it in subjects))
    parts: dict[str, Callable[[Subject, RoutingConfig], Iterator[Row]]] = {
        "sizes": sizes, "reuse": reuse, "overlap": overlap, "evenness": evenness, "domains": domains,
        "recall": recall, "gap": gap,
    }  # fmt: skip
    with ResultWriter(out, asdict(config), TABLE, overwrite, resume, digest) as writer:
        for it in subjects:
            began = time.perf_counter()
            for part, rows in parts.items():
                done = _row(it, DONE, domain=part, value=1.0)
                if writer.has(done):
                    continue
                for row in rows(it, config):
                    writer.write(row)
                writer.write(done)
            print(f"{it.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def subject(name: str, config: RoutingConfig) -> Subject:
    """Gives a trace by its name, without prompts and cut as the settings say, and what is new to learned policies."""
    if name == REFERENCE and config.texts:
        whole = read_texts(
            held_out_texts(range(config.texts), config.tokens or 512), "held-out text of its corpus"
        ).trace
    else:
        whole = as_trace(name)
    digest, kept = fingerprint(whole), set(range(whole.requests))
    for head in HEADS:
        kept &= set(held_out(whole, read_card(DATA / f"{head}.npz"), digest).requests.tolist())
    if not kept:
        raise SpecmdError(f"{name}: the learned policies of the package have seen every request")

    def cut(trace: Trace) -> Trace:
        decoded = without_prompts(trace)
        return clip_requests(decoded, config.tokens) if config.tokens else decoded

    return Subject(Path(name).name, cut(whole), cut(select_requests(whole, sorted(kept))))


def sizes(it: Subject, config: RoutingConfig) -> Iterator[Row]:
    """Says how much there is, and how large the caches are."""
    for name, trace in (("", it.trace), ("judged ", it.judged)):
        for measure in ("requests", "tokens"):
            yield _row(it, f"{name}{measure}", value=float(getattr(trace, measure)))
    for measure in ("layers", "experts", "top_k"):
        yield _row(it, measure, value=float(getattr(it.trace, measure)))
    for capacity, budget in _budgets(it.judged, config).items():
        told = describe_capacity(
            budget, expert_bytes=it.judged.expert_bytes, experts=it.judged.experts, top_k=it.judged.top_k
        )
        yield _row(it, "cycles", capacity=capacity, value=float(told["cycles"]), evidence=SIMULATED)


def reuse(it: Subject, config: RoutingConfig) -> Iterator[Row]:
    """Gives how far back the last use of an expert lies."""
    far = measures.reuse(it.trace)
    uses, again = it.trace.expert_ids >= 0, far.experts != measures.NEW
    yield _row(it, "first uses", value=float(1 - again.sum() / uses.sum()))
    for reach in config.reaches:
        near = (again & (far.experts <= reach * it.trace.experts)).sum() / uses.sum()
        yield _row(it, "reuse within", place=reach, value=float(near))
    for measure, distances in (("reuse, experts", far.experts), ("reuse, tokens", far.tokens)):
        for quantile in config.quantiles:
            yield _row(it, measure, place=quantile, value=float(np.quantile(distances[again], quantile)))
    for layer in range(it.trace.layers):
        if again[:, layer].any():
            middle = np.median(far.experts[:, layer][again[:, layer]])
            yield _row(it, "reuse, experts", layer=layer, place=0.5, value=float(middle))


def overlap(it: Subject, config: RoutingConfig) -> Iterator[Row]:
    """Gives how many experts tokens share, by how far they are apart, and what chance would give."""
    for lag in config.lags:
        if lag < it.trace.lengths.max():
            yield from _by_layer(it, "overlap", measures.overlap(it.trace, lag), place=float(lag), layers=lag == 1)
    yield from _by_layer(it, "overlap by chance", measures.chance_overlap(it.trace))


def evenness(it: Subject, config: RoutingConfig) -> Iterator[Row]:
    """Gives the entropy of use as a share of what uniform choices would have: of the whole, and of a few tokens."""
    yield from _by_layer(it, "evenness", measures.evenness(it.trace))
    places = measures.evenness_in_time(it.trace, config.window)
    for place, found in enumerate(places):
        yield from _by_layer(it, "evenness in time", found, place=float(place * config.window), layers=False)
    if len(places):
        yield from _by_layer(it, "evenness of a few tokens", _mean(places, axis=0))


def domains(it: Subject, config: RoutingConfig) -> Iterator[Row]:
    """Gives what each expert is used for, where the requests have domains."""
    try:
        found = measures.domains(it.trace, groups(it.trace, config.unit))
    except SpecmdError as error:
        print(f"{it.name}: no domains: {error}", file=sys.stderr)
        return
    yield _row(it, "domains", value=float(len(found.names)))
    yield from _by_layer(it, "domain bits", found.bits)
    yield from _by_layer(it, "domain bits by chance", found.chance_bits)
    # 1: an expert says all about the domain; 0: no more than texts that are dealt at random
    above = (found.bits - found.chance_bits) / (np.log2(len(found.names)) - found.chance_bits)
    yield from _by_layer(it, "specialisation", above)
    for layer, expert, at in np.ndindex(*found.shares.shape):
        share = float(found.shares[layer, expert, at])
        if not np.isnan(share):
            yield _row(it, "domain share", layer=layer, expert=expert, domain=found.names[at], value=share)


def recall(it: Subject, config: RoutingConfig) -> Iterator[Row]:
    """Gives how many of the next layer's experts each predictor names, but for the first layer's."""
    trace = it.judged
    counts = [min(trace.experts, int(trace.top_k * count + 0.5)) for count in config.counts]
    for name in config.predictors:
        make = PREFETCH[name]
        if make is None or (make().needs == "ahead" and trace.ahead is None):
            continue
        each = recall_by_request(trace, name, counts)[:, :, 1:]
        for count, right in zip(config.counts, each, strict=False):
            found = _interval(trace, ratio(right.sum(axis=1), each[-1].sum(axis=1)))
            yield _row(it, "recall", policy=name, place=count, evidence=SIMULATED, **found)
            for layer in range(1, trace.layers):
                whole = each[-1][:, layer - 1].sum()
                if whole and count == config.counts[0]:
                    share = float(right[:, layer - 1].sum() / whole)
                    yield _row(it, "recall", policy=name, place=count, layer=layer, evidence=SIMULATED, value=share)


def gap(it: Subject, config: RoutingConfig) -> Iterator[Row]:
    """Gives the hits of each eviction policy, nothing copied early, every request from an empty cache."""
    trace, budgets = it.judged, _budgets(it.judged, config)
    demand = measures.used(trace).sum(axis=(1, 2))
    asked = np.add.reduceat(demand, measures.starts_of(trace)[:-1])
    hits = {name: hits_by_request(trace, name, list(budgets.values())) for name in config.evictions if name in EVICTION}
    for name, of_policy in hits.items():
        for at, capacity in enumerate(budgets):
            low, high = hits[LOW][at], hits[HIGH][at]
            shared = {"policy": name, "capacity": capacity, "evidence": SIMULATED}
            yield _row(it, "hit rate", **shared, **_interval(trace, ratio(of_policy[at], asked)))
            if (high - low).sum() > 0:  # else nothing is evicted, and there is no gap
                yield _row(it, "gap closed", **shared, **_interval(trace, ratio(of_policy[at] - low, high - low)))


def _budgets(trace: Trace, config: RoutingConfig) -> dict[str, Any]:
    """Gives the cache sizes of a trace; one that is no other size than an earlier one is left out."""
    found: dict[str, Any] = {}
    for text in config.capacities:
        budget = Setting(capacity=text, scope=config.scope).budget(trace)
        if not any(np.array_equal(budget, other) for other in found.values()):
            found[text] = budget
    return found


def _by_layer(it: Subject, measure: str, values: Any, *, layers: bool = True, **given: Any) -> Iterator[Row]:
    """Gives the mean of [L] values, and each of them; what is NaN is left out."""
    if not np.isnan(values).all():
        yield _row(it, measure, value=float(np.nanmean(values)), **given)
    for layer, one in enumerate(values if layers else ()):
        if not np.isnan(one):
            yield _row(it, measure, layer=layer, value=float(one), **given)


def _mean(values: Any, axis: int) -> Any:
    """Gives the mean without NaN; NaN where there is nothing else."""
    there = ~np.isnan(values)
    return np.where(there.any(axis=axis), np.nansum(values, axis=axis) / np.maximum(there.sum(axis=axis), 1), np.nan)


def _interval(trace: Trace, found: Interval) -> Row:
    if trace.requests < FEW:
        return {"value": found.value}
    return dict(found._asdict())


def _row(it: Subject, measure: str, **given: Any) -> Row:
    told = {"trace": it.name, "model": it.trace.model, "measure": measure, "evidence": MEASURED}
    return dict.fromkeys(COLUMNS) | told | given
