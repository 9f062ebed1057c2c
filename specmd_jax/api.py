"""One call for one replay, one for a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specmd_jax.engines.curves import CURVES, CurveTotals, curves
from specmd_jax.engines.devices import devices, everywhere, replay_spread, share
from specmd_jax.engines.gpu import MOST_AHEAD, serves
from specmd_jax.engines.gpu_columns import tape
from specmd_jax.engines.prepared import TABLES, Mix, Replays, native_bits, needs_logits, numbers_of, policies, prepare
from specmd_jax.engines.stream import Streamed, prepare_stream, stream_curves, stream_totals
from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.policies import check_numbers
from specmd_jax.replay.metrics import Metrics, counted_of, metrics_of
from specmd_jax.replay.totals import Totals, nothing
from specmd_jax.specs.capacity import Budget, Capacity, describe_capacity, parse_capacity
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.hardware import hardware as find_hardware
from specmd_jax.trace.stream import TraceFile
from specmd_jax.types import Trace

ENGINES = ("auto", "scan", "curves", "kernel")
OVERSIZE = ("stream", "hold")
SCOPES = ("global", "layer")


def run(
    trace: Trace | TraceFile,
    eviction: str = "lru",
    capacity: Capacity = "25%",
    scope: str = "global",
    contract: str = "event",
    hardware: str | Hardware | None = "pcie4-x16",
    batch: int = 1,
    reset_per_request: bool = False,
    phase: str = "all",
    warmup_tokens: int = 0,
    *,
    prefetch: str = "none",
    selection: str = "topk",
    overfetch: float = 1.0,
    percentile: float = 80.0,
    horizon: int = 1,
    may_evict: bool = True,
    miss: str = "fetch",
    routing: str = "standard",
    precisions: Sequence[float] | None = None,
    oversize: str = "stream",
    prefill_chunk: int | None = None,
    **policy_numbers: Any,
) -> Metrics:
    """Replays `trace` through one cache.

    Args:
      trace: in memory, or an opened file (`trace.stream.open_trace`), which is then read a stretch at a time, twice;
        that takes batch 1, and gives the same numbers.
      eviction, prefetch, selection, miss, routing: names in the tables of `specmd_jax.policies`.
      capacity: bytes, or text such as "4000MiB", "25%", "51 slots", "12 slots/layer", "1.5 cycles".
      scope: "global" (one pool) or "layer" (a quota each).
      contract: "event", "sequential" or "sequential-id" (CONTRACT.md section 1).
      hardware: a preset's name, a preset file, a `Hardware`, or None for no seconds.
      batch, prefill_chunk, reset_per_request: the schedule. phase, warmup_tokens: what of it is counted.
      overfetch: `topk` asks for K x overfetch experts a layer. percentile: `percentile` asks for all above it.
      horizon: layers ahead, 1..L-1. may_evict: whether a prefetch may push something out.
      precisions: stored precisions of every expert in ascending bits; None: as the trace says.
      oversize: a demand larger than the cache passes through ("stream") or stays until the next visit ("hold").
      policy_numbers: numbers of any of the policies by name, such as `decay=0.95`, `reading="literal"`, `strength=0.3`.

    Raises:
      SpecmdError: a name, number or combination that makes no sense, with what was expected.
    """
    head = trace.head if isinstance(trace, TraceFile) else trace
    mix = make_mix(
        head, eviction=eviction, prefetch=prefetch, selection=selection, miss=miss, routing=routing,
        overfetch=overfetch, percentile=percentile, numbers=policy_numbers,
    )  # fmt: skip
    budgets = [parse(head, capacity, scope)]
    machine = None if hardware is None else find_hardware(hardware)
    options = replay_options(oversize, horizon, may_evict)
    grid_of = _prepared(
        trace, {eviction: mix}, budgets, [machine], options, precisions=_precisions(precisions), contract=contract,
        batch=batch, reset_per_request=reset_per_request, phase=phase, warmup_tokens=warmup_tokens,
        prefill_chunk=prefill_chunk,
    )  # fmt: skip
    return grid_of(eviction)[0][0]


Grid = list[list[Metrics]]  # [budget][machine]


def _prepared(
    trace: Trace | TraceFile,
    mixes: Mapping[str, Mix],
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
    options: Mapping[str, Any],
    **schedule: Any,
) -> Callable[[str], Grid]:
    """Checks everything there is to check, and returns what replays one of the mixes."""
    logits = any(needs_logits(mix.choices()) for mix in mixes.values())
    if isinstance(trace, Trace):
        replays = prepare(trace, logits=logits, **schedule)
        for mix in mixes.values():
            replays.setup(mix.choices(), machines[0], **options)
        return lambda name: replay_grid(replays, mixes[name], budgets, machines, **options)

    scores = any(mix.prefetch == "gate_ahead" for mix in mixes.values())
    streamed = prepare_stream(trace, logits=logits, ahead_scores=scores, **schedule)
    for mix in mixes.values():
        streamed.setup(mix.choices(), machines[0], **options)
    found: dict[str, Grid] = {}

    def grid_of(name: str) -> Grid:
        if name not in found:
            found.update(stream_grids(streamed, name, mixes, budgets, machines, **options))
        return found[name]

    return grid_of


def make_mix(
    trace: Trace,
    *,
    eviction: str,
    prefetch: str = "none",
    selection: str = "topk",
    miss: str = "fetch",
    routing: str = "standard",
    overfetch: float = 1.0,
    percentile: float = 80.0,
    numbers: Mapping[str, Any] | None = None,
) -> Mix:
    """A `Mix` from names and numbers in one bag: each goes to the policies that take it, or is an error."""
    if not overfetch > 0:
        raise SpecmdError(f"overfetch is {overfetch}, expected above 0")
    if not 0 <= percentile < 100:
        raise SpecmdError(f"percentile is {percentile}, expected 0 up to, but not including, 100")
    given: dict[str, dict[str, Any]] = {
        "selection": {"count": trace.top_k * overfetch} if selection == "topk" else {"percentile": percentile}
    }
    names: dict[str, Any] = {
        "eviction": eviction,
        "prefetch": prefetch,
        "selection": selection,
        "miss": miss,
        "routing": routing,
    }
    Mix(**names).choices()  # names first: an unknown policy has no numbers
    taken: set[str] = set()
    for axis, name in names.items():
        accepted = numbers_of(axis, name)
        mine = {k: v for k, v in (numbers or {}).items() if k in accepted}
        taken |= mine.keys()
        given[axis] = {**given.get(axis, {}), **mine}
        check_numbers(f"{axis} {name!r}", TABLES[axis][name], given[axis])
    for name in (numbers or {}).keys() - taken:
        every = {n for axis, chosen in names.items() for n in numbers_of(axis, chosen)}
        raise unknown("policy number", name, every or {"none of these policies takes a number"})
    mix = Mix(**names, numbers=given)
    policies(mix.choices(), mix.traced())  # a name among the settings may be unknown to its policy
    return mix


def parse(trace: Trace, capacity: Capacity, scope: str) -> Budget:
    """A capacity as a budget for this trace."""
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    return parse_capacity(
        capacity, expert_bytes=trace.expert_bytes, experts=trace.experts, top_k=trace.top_k, scope=scope
    )


def replay_options(oversize: str = "stream", horizon: int = 1, may_evict: bool = True) -> dict[str, Any]:
    """Options of `Setup` from those of `run`."""
    if oversize not in OVERSIZE:
        raise unknown("oversize", oversize, OVERSIZE)
    return {"hold": oversize == "hold", "horizon": horizon, "may_evict": may_evict}


def _precisions(precisions: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if precisions is None else tuple(float(b) for b in precisions)


def replay_grid(
    replays: Replays,
    mix: Mix,
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
    engine: str = "auto",
    **options: Any,
) -> list[list[Metrics]]:
    """[budget][machine] metrics of one mix (`options` are those of `Setup`).

    The "scan" serves everything, in one compiled program. "curves" serves demand-only mixes without seconds, at all
    capacities in one pass where it can, and equals the scan. "kernel" is the scan as a GPU program (a CPU interprets
    it, slowly), and serves most mixes (`kernel.serves`). "auto" takes curves where they serve, else the kernel where it
    serves and there is a GPU, else the scan.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    served = machines[0] is None and _has_curves(replays, mix)
    measure = partial(metrics_of, counted_of(replays.schedule), replays.sizes.level_bytes)
    if engine == "curves" and not served:
        raise SpecmdError("engine 'curves' serves only demand-only mixes of one precision, without hardware")
    if served and engine in ("auto", "curves"):
        setup = replays.setup(mix.choices(), machines[0], **options)
        numbers = (mix.numbers or {}).get("eviction", {})

        def draw(sizes: Sequence[Any]) -> Sequence[CurveTotals]:
            return curves(
                replays.schedule, replays.sizes.units[1], sizes, mix.eviction, numbers, hold=setup.hold,
                demand=replays.demand,
            )  # fmt: skip

        found = share([replays.sizes.budget(budget) for budget in budgets], draw)
        return [[measure(_as_totals(curve), _bits(replays), timed=False)] for curve in found]
    totals = replayer(replays, mix, machines, engine, **options)(budgets)
    return _grid(measure, totals, _bits(replays), budgets, machines)


def replayer(
    replays: Replays,
    mix: Mix,
    machines: Sequence[Hardware | None],
    engine: str = "auto",
    values: Mapping[str, Sequence[float]] | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[Sequence[Budget]], Totals]:
    """What replays one mix at any budgets: totals with leading axes [budget], then [machine] if there is hardware, then
    [value] if there are `values`, which are numbers of the eviction policy, all of one length.

    Everything that no budget decides is worked out once, here. `engine` and `options` as for `replay_grid`, curves
    aside; `mesh` as for `replay_spread`.
    """
    choices = mix.choices()
    setup = replays.setup(choices, machines[0], **options)
    by_kernel = engine == "kernel" or (engine == "auto" and jax.default_backend() == "gpu")
    by_kernel = by_kernel and serves(setup, choices, len(replays.sizes.level_bytes), own_numbers=bool(values))
    if engine == "kernel" and not by_kernel:
        raise SpecmdError(
            "engine 'kernel' serves misses that are fetched at one precision, the recorded routing, eviction policies "
            f"that change one layer at a time and horizons up to {MOST_AHEAD}; this is eviction {mix.eviction!r}, miss "
            f"{mix.miss!r}, routing {mix.routing!r}, {len(replays.sizes.level_bytes)} precision(s) and horizon "
            f"{setup.horizon}"
        )
    given = mix.traced()
    visits = tape(replays, setup, choices, given) if by_kernel else replays.visits(setup, choices)
    costs, axes = None, ("budget",)
    if machines[0] is not None:
        each = [replays.costs(machine) for machine in machines]
        costs, axes = jax.tree.map(lambda *x: jnp.stack(x), *each), ("budget", "hardware")
    if values:
        count = len(next(iter(values.values())))
        given = jax.tree.map(lambda number: jnp.broadcast_to(number, (count,)), given)
        given["eviction"] |= {name: jnp.asarray(numbers, jnp.float32) for name, numbers in values.items()}
        axes = (*axes, "policy")
    mesh = mesh or devices()
    placed, shared = everywhere(visits, mesh), replays.numbers(0, None)._replace(costs=costs)

    def replay(budgets: Sequence[Budget]) -> Totals:
        sizes = np.stack([replays.sizes.budget(b) for b in budgets])
        numbers = shared._replace(budget=jnp.asarray(sizes))
        return replay_spread(setup, choices, axes, numbers, given, placed, mesh)

    return replay


def stream_grids(
    streamed: Streamed,
    name: str,
    mixes: Mapping[str, Mix],
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
    **options: Any,
) -> dict[str, Grid]:
    """`replay_grid` of a streamed trace, for the mix `name` and for all others that one reading of the file serves."""
    first, bits = streamed.first, _bits(streamed.first)
    measure = partial(metrics_of, streamed.survey.counted, first.sizes.level_bytes)
    served = [key for key, mix in mixes.items() if machines[0] is None and _has_curves(first, mix)]
    if name not in served:
        totals = stream_totals(streamed, mixes[name], budgets, machines, **options)
        return {name: _grid(measure, totals, bits, budgets, machines)}
    wanted = [(mixes[key].eviction, (mixes[key].numbers or {}).get("eviction", {})) for key in served]
    units = [first.sizes.budget(budget) for budget in budgets]
    found = stream_curves(streamed, wanted, units, hold=options["hold"])
    return {
        key: [[measure(_as_totals(curve), bits, timed=False)] for curve in row]
        for key, row in zip(served, found, strict=True)
    }


def _grid(
    measure: Callable[..., Metrics],
    totals: Totals,
    bits: tuple[float, ...],
    budgets: Sequence[Budget],
    machines: Sequence[Hardware | None],
) -> Grid:
    """Metrics of the cells of a scan, whose totals are [budget, machine], or [budget] without hardware."""
    timed = machines[0] is not None
    cells = [[(i, j) if timed else (i,) for j in range(len(machines))] for i in range(len(budgets))]
    return [[measure(jax.tree.map(lambda x, at=at: x[at], totals), bits, timed) for at in row] for row in cells]


def _has_curves(replays: Replays, mix: Mix) -> bool:
    demand_only = (mix.prefetch, mix.miss, mix.routing) == ("none", "fetch", "standard")
    return demand_only and len(replays.sizes.units) == 2 and mix.eviction in CURVES


def _as_totals(curve: CurveTotals) -> Totals:
    """Totals of a demand-only replay: what is not fetched is reused."""
    totals = jax.tree.map(np.asarray, nothing(len(curve.demand), 1))
    experts = totals.experts._replace(
        demand=curve.demand, reused=curve.hits, fetched=curve.misses, collisions=curve.collisions
    )
    return totals._replace(
        experts=experts, fetched_at=curve.misses[None], runs_at=curve.demand[None], evictions=curve.evictions
    )


def _gap(cell: Metrics, ends: Mapping[str, list[list[Metrics]]], i: int, j: int) -> float | None:
    """Share of the hits between lru and belady that a cell gains."""
    if len(ends) < 2:
        return None
    low, high = ends["lru"][i][j].hits, ends["belady"][i][j].hits
    return (cell.hits - low) / (high - low) if high > low else None


def _bits(replays: Replays) -> tuple[float, ...]:
    native = native_bits(replays.trace)
    level = replays.sizes.level_bytes.sum(axis=1) / replays.trace.expert_bytes.sum()
    return tuple(float(native * share) for share in level)


def sweep(
    trace: Trace | TraceFile,
    evictions: Sequence[str] = ("lru",),
    capacities: Sequence[Capacity] = ("25%",),
    hardware: Sequence[str | Hardware] | None = None,
    *,
    scope: str = "global",
    contract: str = "event",
    batch: int = 1,
    reset_per_request: bool = False,
    phase: str = "all",
    warmup_tokens: int = 0,
    prefill_chunk: int | None = None,
    oversize: str = "stream",
    horizon: int = 1,
    may_evict: bool = True,
    precisions: Sequence[float] | None = None,
    prefetch: str = "none",
    selection: str = "topk",
    overfetch: float = 1.0,
    percentile: float = 80.0,
    miss: str = "fetch",
    routing: str = "standard",
    numbers: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a grid: every eviction policy x capacity x hardware, one dictionary each, policy by policy.

    Arguments as in `run` (an opened file is streamed here too); `numbers` maps an eviction policy to its numbers. A row
    holds the setting, the capacity in every unit, the scalar fields of `Metrics` and `gap_closed`: the share of the
    hits between `lru` and `belady` at the same capacity that the policy gains, None where the two do not differ or are
    not in the sweep. Bad input raises SpecmdError before the first row.
    """
    for name in evictions:
        if name not in TABLES["eviction"]:
            raise unknown("eviction policy", name, TABLES["eviction"])
    head = trace.head if isinstance(trace, TraceFile) else trace
    budgets = [parse(head, capacity, scope) for capacity in capacities]
    machines = [find_hardware(h) for h in hardware] if hardware else [None]
    labels = [h if isinstance(h, str) else "custom" for h in hardware] if hardware else [None]
    mixes = {
        name: make_mix(
            head, eviction=name, prefetch=prefetch, selection=selection, miss=miss, routing=routing,
            overfetch=overfetch, percentile=percentile, numbers=(numbers or {}).get(name),
        )
        for name in evictions
    }  # fmt: skip
    options = replay_options(oversize, horizon, may_evict)
    grid_of = _prepared(
        trace, mixes, budgets, machines, options, precisions=_precisions(precisions), contract=contract, batch=batch,
        reset_per_request=reset_per_request, phase=phase, warmup_tokens=warmup_tokens, prefill_chunk=prefill_chunk,
    )  # fmt: skip
    shown = {"expert_bytes": head.expert_bytes, "experts": head.experts, "top_k": head.top_k}
    described = [describe_capacity(budget, **shown) for budget in budgets]
    setting = {"model": head.model, "scope": scope, "contract": contract, "phase": phase, "batch": batch}

    def rows() -> Iterator[dict[str, Any]]:
        bounds: dict[str, list[list[Metrics]]] = {}
        # the two that the gap is measured between come first
        ends = [name for name in ("lru", "belady") if name in mixes]
        for name in [*ends, *(n for n in mixes if n not in ends)]:
            grid = grid_of(name)
            if name in ends:
                bounds[name] = grid
            for i, size in enumerate(described):
                for j, label in enumerate(labels):
                    cell = grid[i][j]
                    yield {
                        **setting,
                        "eviction": name,
                        "hardware": label,
                        "capacity_bytes": int(size["bytes"]),
                        "capacity_pct": float(size["percent"]),
                        "capacity_slots": int(size["slots"]),
                        "capacity_slots_per_layer": float(size["slots_per_layer"]),
                        "cycles": float(size["cycles"]),
                        **cell.row(),
                        "gap_closed": _gap(cell, bounds, i, j),
                        "evidence": "simulated",
                    }

    return rows()
