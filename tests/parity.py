"""Runs a mix through the engine and through the reference, and compares everything either of them reports."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import reference

from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.engines.visits import padded, widened
from specmd_jax.policies.choice import AXES, Choice, Mix, choose
from specmd_jax.policies.pins import SHARE
from specmd_jax.replay.state import Visit
from specmd_jax.replay.totals import READ_S, STORAGE_S, Events, Totals
from specmd_jax.specs.hardware import Hardware
from specmd_jax.trace import synthesize
from specmd_jax.types import Trace

LINK = Hardware(
    link_bytes_per_s=1.37e9,
    link_latency_s=1.3e-5,
    peak_flops_per_s=3.1e12,
    memory_bytes_per_s=0.97e12,
    launch_s=7.7e-6,
    host_flops_per_s=2.3e10,
    host_bytes_per_s=1.9e9,
    host_moe_bytes_per_s=1.1e9,
    handover_s=4.3e-6,
    sync_s=1.7e-6,
    layer_s=3.9e-6,
)
"""A link about as fast as the computation, so that copies are early, late and dropped; no two times are equal by
chance.
"""

OPTIMIZED = jax.jit(
    getattr(replay_many, "__wrapped__"),  # noqa: B009 (jit's types do not have it)
    static_argnames=("setup", "axes"),
    compiler_options={"xla_backend_optimization_level": 3}
    | (
        {"xla_cpu_use_fusion_emitters": True}
        if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")
        else {}
    ),
)
"""`replay_many` compiled as it is outside the tests, whatever `conftest.py` asks for."""


def small_trace(seed: int, **changes: Any) -> Trace:
    """Two requests, 4 layers of 8 experts of unequal size, top-2."""
    settings: dict[str, Any] = {
        "layers": 4,
        "experts": 8,
        "top_k": 2,
        "tokens": 24,
        "requests": 2,
        "prompt_tokens": 5,
        "seed": seed,
        "expert_bytes": [40960, 36864, 40960, 45056],
        "skew": 1.0,
        "stickiness": 0.5,
        "drift": 0.01,
        "topics": 4,
        "with_logits": False,
        "with_ahead": True,
    }
    return synthesize(**{**settings, **changes})


def costs(replays: Prepared, hardware: Hardware) -> reference.Costs:
    """The reference's costs in float64."""
    work = jax.tree.map(lambda x: np.asarray(x, np.float64), replays.work)
    return reference.Costs(
        link_bytes_per_s=float(hardware.link_bytes_per_s),
        link_latency_s=float(hardware.link_latency_s),
        expert_flops=work.expert_flops,
        expert_mem_s=work.expert_bytes / hardware.memory_bytes_per_s,
        peak_flops_per_s=float(hardware.peak_flops_per_s),
        launch_s=float(hardware.launch_s),
        dense_flops=work.dense_flops,
        dense_mem_s=work.dense_bytes / hardware.memory_bytes_per_s,
        host_expert_flop_s=work.expert_flops / hardware.host_flops_per_s,
        host_expert_mem_s=work.expert_bytes[-1] / min(hardware.host_moe_bytes_per_s, hardware.host_bytes_per_s),
        context_flops=work.context_flops,
        context_mem_s=None if work.context_bytes is None else work.context_bytes / hardware.memory_bytes_per_s,
        host_bytes_per_s=float(hardware.host_bytes_per_s),
        handover_s=float(hardware.handover_s),
        sync_s=float(hardware.sync_s),
        layer_s=float(hardware.layer_s),
        overlaps=float(hardware.overlaps),
        storage_bytes_per_s=float(hardware.storage_bytes_per_s),
        storage_latency_s=float(hardware.storage_latency_s),
    )


def engine(
    replays: Prepared,
    mix: Mix,
    budget: Any,
    hardware: Hardware | None,
    host_budget: Any = None,
    program: Callable[..., Any] = replay_many,
    **options: Any,
) -> tuple[Totals, Events, Visit]:
    """One cell with everything it reports, padding cut off."""
    setup = replays.setup(mix, hardware, detail="full", **options)
    visits = _of_one_size(replays.visits(setup, mix))
    numbers = replays.numbers(budget, hardware, host_budget)
    (_, totals), events = program(setup, (), numbers, mix.traced(), visits)
    assert events is not None
    cut = jax.tree.map(lambda x: np.asarray(x)[: replays.schedule.visits], (events, visits))
    return jax.tree.map(np.asarray, totals), *cut


def _of_one_size(visits: Visit) -> Visit:
    """The same visits padded to shapes that contracts and schedules of one trace have in common: one compile."""
    visits = visits._replace(by_mass=widened(np.asarray(visits.by_mass), visits.count.shape[1]))
    return padded(visits, -len(visits.index) % 1024)


def compare(
    trace: Trace,
    mix: Mix,
    budget: Any,
    *,
    hardware: Hardware | None = LINK,
    precisions: tuple[float, ...] | None = None,
    schedule: dict[str, Any] | None = None,
    host_budget: Any = None,
    program: Callable[..., Any] = replay_many,
    **options: Any,
) -> reference.Replay:
    """Asserts that engine and reference agree visit by visit; `options` are those of `Setup`, `program` is a
    `replay_many`.
    """
    replays = prepare(trace, precisions=precisions, logits=True, **(schedule or {}))
    totals, events, visits = engine(replays, mix, budget, hardware, host_budget, program, **options)
    horizon, given = options.get("horizon", 1), {choice.axis: settings_of(choice) for choice in mix}
    pins = mix.eviction.build().pins
    host: dict[str, Any] = {}
    tier = options.get("tier")
    if tier is not None:
        host["host_budget"] = host_budget if np.ndim(host_budget) == 0 else [int(b) for b in host_budget]
        host |= {"host_eviction": mix.host_eviction.name, "host_numbers": given["host_eviction"]}
        host["host_hears"] = "uses" if tier.uses else "misses"
        host["inclusion"] = "exclusive" if tier.exclusive else "inclusive"
        host["prefetch_to"] = "host" if tier.to_host else "device"
    slow = reference.replay(
        replays.schedule,
        eviction=unpinned(mix.eviction.name),
        numbers=given["eviction"],
        budget=budget if np.ndim(budget) == 0 else [int(b) for b in budget],
        level_bytes=replays.sizes.level_bytes.tolist(),
        oversize="hold" if options.get("hold") else "stream",
        prefetch=mix.prefetch.name,
        prefetch_numbers=given["prefetch"],
        selection=mix.selection.name,
        select_numbers=given["selection"],
        horizon=horizon,
        may_evict=options.get("may_evict", True),
        miss=mix.miss.name,
        miss_numbers=given["miss"],
        routing=mix.routing.name,
        routing_numbers=given["routing"],
        admission=mix.admission.name,
        admission_numbers=given["admission"],
        warm_start=options["warm_start"].counts.tolist() if "warm_start" in options else None,
        pins=None if pins is None else (float(pins.share), pins.profile.counts.tolist()),
        costs=costs(replays, hardware) if hardware else None,
        draft_s=drafts.draft_s if (drafts := (schedule or {}).get("drafts")) else 0.0,
        first_use=replays.first_use,
        future=None if visits.future is None else np.asarray(visits.future),
        **host,
    )
    np.testing.assert_array_equal(events.outcome, slow.outcome, "outcome [visit, expert]")
    np.testing.assert_array_equal(events.collision, slow.collision, "collision [visit, expert]")
    np.testing.assert_array_equal(events.level, slow.resident, "residency [visit, layer, expert]")
    np.testing.assert_array_equal(events.evictions.sum(axis=0), slow.evictions, "evictions [layer]")
    if events.prefetched is not None:
        assert [_order(events, v, replays) for v in range(replays.schedule.visits)] == slow.prefetched
        assert totals.experts.prefetch_used.sum() == slow.prefetch_used
        assert totals.prefetched.sum() - totals.experts.prefetch_used.sum() == slow.prefetch_wasted
    if hardware:
        stalls = slow.stall_late_s, slow.stall_miss_s, slow.stall_link_busy_s
        for column, times in enumerate((slow.visit_s, *stalls, slow.link_s, slow.host_s)):
            scale = slow.visit_s.max()
            np.testing.assert_allclose(events.seconds[:, column], times, rtol=1e-6, atol=1e-6 * scale)
            np.testing.assert_allclose(totals.seconds.sum(axis=0)[column], times.sum(), rtol=1e-6, atol=1e-6 * scale)
    if totals.admitted is not None:
        assert totals.admitted.sum() == slow.admitted
    if tier is not None:
        compare_tiers(replays, totals, events, slow, timed=hardware is not None)
    level = replays.sizes.level_bytes
    assert (totals.fetched_at.astype(np.int64) * level).sum() == slow.demand_bytes.sum()
    assert (totals.prefetched.astype(np.int64) * level[-1]).sum() == slow.prefetch_bytes.sum()
    return slow


def compare_tiers(replays: Prepared, totals: Totals, events: Events, slow: reference.Replay, timed: bool) -> None:
    """Asserts that the host tier did the same in both."""
    assert events.tier is not None and events.tier.level is not None and totals.tier is not None
    top = len(replays.sizes.level_bytes)
    layer, experts = replays.schedule.layer, replays.schedule.experts
    read = [(layer[v] * experts + np.flatnonzero(row)).tolist() for v, row in enumerate(events.tier.read)]
    assert read == slow.read, "misses that were read from storage"
    np.testing.assert_array_equal(events.tier.level * top, np.stack(slow.in_host), "host memory [visit, layer, expert]")
    assert events.tier.evictions.sum(axis=1).tolist() == slow.host_evictions
    for v, (ahead, expected) in enumerate(zip(events.tier.ahead, slow.read_ahead, strict=True)):
        assert _in_order(ahead, v, replays) == expected, f"reads ahead, visit {v}"
    assert totals.tier.reads.sum() == sum(map(len, slow.read))
    assert totals.tier.reads_ahead.sum() == sum(map(len, slow.read_ahead))
    early, seen = totals.tier.early, events.tier.early
    if early is not None and seen is not None:
        late = [(layer[v] * experts + np.flatnonzero(row)).tolist() for v, row in enumerate(seen.late)]
        assert late == slow.read_late, "asked for while being read ahead"
        assert seen.skipped.sum(axis=(1, 2)).tolist() == slow.skipped
        assert (early.late.sum(), early.skipped.sum()) == (sum(map(len, slow.read_late)), sum(slow.skipped))
        assert early.used.sum() == slow.reads_used
        assert totals.tier.reads_ahead.sum() - early.used.sum() == slow.reads_wasted
    if timed:
        scale = slow.visit_s.max()
        pairs = (
            (events.tier.seconds[:, STORAGE_S], slow.stall_storage_s),
            (events.tier.seconds[:, READ_S], slow.reading_s),
        )
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale)


def settings_of(choice: Choice) -> dict[str, Any]:
    """The settings of a policy that its name does not say."""
    name = unpinned(choice.name)
    row = AXES[choice.axis].table.get(name)
    named = choose(choice.axis, name).texts if row is not None else ()
    numbers = {number: value for number, value in choice.numbers.items() if number != SHARE}  # of pins
    return {**dict(set(choice.texts) - set(named)), **numbers}


def unpinned(name: str) -> str:
    """The name of the policy that has the rest of the cache."""
    return name.removeprefix("pinned(").removesuffix(")") if name.startswith("pinned(") else name


def _order(events: Events, v: int, replays: Prepared) -> list[int]:
    """Flat ids of the copies a visit started, in order."""
    assert events.prefetched is not None
    return _in_order(events.prefetched[v], v, replays)


def _in_order(started: Any, v: int, replays: Prepared) -> list[int]:
    """Flat ids of the experts of the next layers, by these numbers; 0: not among them."""
    layers, experts = replays.schedule.layers, replays.schedule.experts
    ahead, expert = np.nonzero(started)
    flat = (replays.schedule.layer[v] + 1 + ahead) % layers * experts + expert
    return [int(f) for f in flat[np.argsort(started[ahead, expert])]]
