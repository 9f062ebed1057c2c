"""From a trace and plain settings to what an engine takes: units, work, columns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.policies import EVICTION, MISS, NEEDS_LOGITS, NEEDS_PRECISIONS, PREFETCH, ROUTING, SELECTION
from specmd_jax.replay.step import Numbers, Policies, Setup, Visit
from specmd_jax.replay.timing import Costs, Work, costs
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.demand import Demand, pack
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.specs.models import MODELS
from specmd_jax.types import DECODE, NEVER, Schedule, Trace

TABLES: dict[str, Mapping[str, Any]] = {
    "eviction": EVICTION,
    "prefetch": PREFETCH,
    "selection": SELECTION,
    "miss": MISS,
    "routing": ROUTING,
}


class Choice(NamedTuple):
    """One row of an axis: the name and its non-numeric settings are static, its numbers are traced."""

    axis: str
    name: str
    static: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Mix:
    """One policy an axis, with numbers (`numbers[axis]` are keyword arguments of that axis' policy)."""

    eviction: str = "lru"
    prefetch: str = "none"
    selection: str = "topk"
    miss: str = "fetch"
    routing: str = "standard"
    numbers: Mapping[str, Mapping[str, Any]] | None = None

    def choices(self) -> tuple[Choice, ...]:
        """The static part, hashable. Raises SpecmdError for unknown names, with the nearest known one."""
        found = []
        for axis, table in TABLES.items():
            name = getattr(self, axis)
            if name not in table:
                raise unknown(f"{axis} policy" if axis != "selection" else "prefetch selection", name, table)
            texts = tuple(sorted((k, v) for k, v in (self.numbers or {}).get(axis, {}).items() if isinstance(v, str)))
            found.append(Choice(axis, name, texts))
        return tuple(found)

    def traced(self) -> dict[str, dict[str, jax.Array]]:
        """The numbers, as arrays."""
        return {
            axis: {k: jnp.asarray(v) for k, v in (self.numbers or {}).get(axis, {}).items() if not isinstance(v, str)}
            for axis in TABLES
        }


def needs_logits(choices: tuple[Choice, ...]) -> bool:
    """Whether a policy reads the router's full logits."""
    names = {choice.axis: choice.name for choice in choices}
    return names["routing"] != "standard" or names["miss"] in NEEDS_LOGITS


def numbers_of(axis: str, name: str) -> tuple[str, ...]:
    """Names of the settings that a policy takes."""
    factory = TABLES[axis][name]
    return () if factory is None else tuple(inspect.signature(factory).parameters)


def policies(choices: tuple[Choice, ...], numbers: Mapping[str, Mapping[str, Any]]) -> Policies:
    """Builds the policies; an unknown number of a policy is a SpecmdError."""
    built: dict[str, Any] = {}
    for axis, name, static in choices:
        factory = TABLES[axis][name]
        given = {**dict(static), **numbers.get(axis, {})}
        if factory is None:
            built[axis] = None
            continue
        unwanted = sorted(given.keys() - set(numbers_of(axis, name)))
        if unwanted:
            takes = ", ".join(numbers_of(axis, name)) or "none"
            raise SpecmdError(f"{axis} {name!r} has no number {unwanted[0]!r}; it takes: {takes}")
        built[axis] = factory(**given)
    if built["prefetch"] is None:
        built["selection"] = None  # nothing to select from
    return Policies(**built)


class Sizes(NamedTuple):
    """Expert sizes in whole units, the largest size that divides all of them, so that budgets are exact in int32."""

    unit_bytes: int
    units: npt.NDArray[np.int32]  # [Q + 1, L], row 0 is 0
    level_bytes: npt.NDArray[np.int64]  # [Q, L]

    def budget(self, budget: Budget) -> npt.NDArray[np.int32]:
        """Whole units of a budget in bytes; more than everything is everything."""
        most = int(self.units[-1].max()) * self.units.shape[1] << 12
        return np.minimum(np.asarray(budget, np.int64) // self.unit_bytes, min(most, 2**30)).astype(np.int32)


def sizes(
    expert_bytes: npt.NDArray[np.int64], experts: int, precisions: tuple[float, ...] | None, native_bits: float
) -> Sizes:
    """Sizes of experts stored at `precisions` (ascending bits), or as the trace says when None."""
    if precisions is None:
        levels = [[int(b) for b in expert_bytes]]
    else:
        ascending = list(precisions) == sorted(set(precisions)) and len(precisions) > 0
        if not ascending or not all(0 < bits < math.inf for bits in precisions):
            raise SpecmdError(f"precisions {precisions}: expected ascending bits, such as (4, 8)")
        levels = [[math.ceil(int(b) * bits / native_bits) for b in expert_bytes] for bits in precisions]
    unit = math.gcd(*(b for row in levels for b in row))
    if sum(max(levels[-1]) // unit for _ in expert_bytes) * experts >= 2**30:
        raise SpecmdError(
            f"expert_bytes have no common unit (greatest common divisor {unit} bytes): expected multiples of, say, 4096"
        )
    units = np.array([[0] * len(expert_bytes)] + [[b // unit for b in row] for row in levels], np.int32)
    return Sizes(unit, units, np.array(levels, np.int64))


def work(trace: Trace, level_bytes: npt.NDArray[np.int64], native_bits: float) -> Work:
    """What each layer asks of the hardware.

    A model that `MODELS` knows brings its dense part and head. Else the trace's meta may (`dense_bytes`, one or one
    a layer); without it, the dense part costs a launch.
    """
    spec = MODELS.get(trace.model)
    if spec is not None:
        flops, dense_flops = float(spec.expert_flops_per_token), float(spec.dense_flops_per_token)
        dense_bytes, head = float(spec.dense_bytes), (float(spec.head_bytes), float(spec.head_flops_per_token))
    else:
        flops = 2.0 * float(trace.expert_bytes.mean()) * 8 / native_bits
        dense_flops, dense_bytes, head = 0.0, 0.0, (0.0, 0.0)
    by_layer = np.full(trace.layers, dense_bytes)
    if "dense_bytes" in trace.meta:
        by_layer = np.broadcast_to(np.asarray(trace.meta["dense_bytes"], np.float64), (trace.layers,)).copy()
    dense_flops_by_layer = np.full(trace.layers, dense_flops if spec is not None else 0.0)
    if spec is None:
        dense_flops_by_layer = 2.0 * by_layer * 8 / native_bits
    by_layer[-1] += head[0]
    dense_flops_by_layer[-1] += head[1]
    return Work(
        expert_bytes=jnp.asarray(level_bytes, jnp.float32),
        expert_flops=jnp.full(trace.layers, flops, jnp.float32),
        dense_bytes=jnp.asarray(by_layer, jnp.float32),
        dense_flops=jnp.asarray(dense_flops_by_layer, jnp.float32),
    )


def native_bits(trace: Trace) -> float:
    """Bits an expert weight takes in the trace's `expert_bytes`: of the trace's meta, else of the preset, else 16."""
    if "weights_bits" in trace.meta:
        return float(trace.meta["weights_bits"])
    spec = MODELS.get(trace.model)
    if spec is None:
        return 16.0
    return 8.0 * float(trace.expert_bytes.mean()) / spec.expert_params


@dataclass(frozen=True)
class Replays:
    """A trace under one schedule, ready to be replayed by any mix, budget and hardware."""

    trace: Trace
    schedule: Schedule
    sizes: Sizes
    work: Work

    @cached_property
    def first_use(self) -> npt.NDArray[np.int32]:
        """[L, E]: the first visit that demands each expert."""
        first = np.full((self.schedule.layers, self.schedule.experts), NEVER, np.int32)
        visit, expert = np.nonzero(self.schedule.count)
        np.minimum.at(first, (self.schedule.layer[visit], expert), visit.astype(np.int32))
        return first

    @cached_property
    def demand(self) -> Demand:
        """The demand as the curves read it."""
        return pack(self.schedule)

    def numbers(self, budget: Budget, hardware: Hardware | None) -> Numbers:
        """Traced numbers of one cell."""
        return Numbers(
            budget=jnp.asarray(self.sizes.budget(budget)),
            units=jnp.asarray(self.sizes.units),
            first_use=jnp.asarray(self.first_use),
            costs=self.costs(hardware),
        )

    def costs(self, hardware: Hardware | None) -> Costs | None:
        if hardware is None:
            return None
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), costs(hardware, self.work))

    def setup(self, choices: tuple[Choice, ...], hardware: Hardware | None, **options: Any) -> Setup:
        """Static choices; checks that they make sense for this trace."""
        mix = {choice.axis: choice.name for choice in choices}
        horizon = options.get("horizon", 1)
        if not 1 <= horizon < max(2, self.schedule.layers):
            raise SpecmdError(
                f"horizon is {horizon}, expected 1..{max(1, self.schedule.layers - 1)}: a layer is not ahead of itself"
            )
        if mix["prefetch"] == "gate_ahead":
            if self.trace.ahead is None:
                raise SpecmdError("prefetch 'gate_ahead' needs a trace with `ahead` scores, and this one has none")
            if horizon != 1:
                raise SpecmdError(f"prefetch 'gate_ahead' looks one layer ahead, not horizon {horizon}")
        if needs_logits(choices):
            name = mix["routing"] if mix["routing"] != "standard" else mix["miss"]
            if self.trace.logits is None:
                raise SpecmdError(f"{name!r} needs a trace with the router's full logits, and this one has none")
            if self.schedule.logits is None:
                raise SpecmdError(f"{name!r} needs the router's full logits: prepare the trace with logits=True")
        if mix["miss"] in NEEDS_PRECISIONS and len(self.sizes.level_bytes) < 2:
            raise SpecmdError(
                f"miss {mix['miss']!r} copies some experts at a lower precision, and that precision is not stored: "
                "expected at least two precisions, such as (4, 16)"
            )
        if mix["routing"] != "standard" and policies(choices, {}).eviction.oracle:
            raise SpecmdError(
                f"eviction {mix['eviction']!r} knows the recorded routing, which routing {mix['routing']!r} changes"
            )
        return Setup(
            layers=self.schedule.layers,
            experts=self.schedule.experts,
            top_k=self.trace.top_k,
            timed=hardware is not None,
            resets=bool(self.schedule.reset.any()),
            **options,
        )

    def visits(self, setup: Setup, choices: tuple[Choice, ...]) -> Visit:
        """Every column the scan reads (numpy), padded at the end so that traces of similar length share a compile."""
        visits = self.columns(setup, choices, self.schedule.most)
        count = self.schedule.visits
        block = 1 << max(6, (count - 1).bit_length() - 3)
        return _pad(visits, -count % block)

    def columns(
        self,
        setup: Setup,
        choices: tuple[Choice, ...],
        most: int,
        ahead: tuple[npt.NDArray[np.float32], bool] | None = None,
    ) -> Visit:
        """The same without padding, for visits that demand at most `most` experts; `ahead` as for `future_mass`."""
        s = self.schedule
        predictor = next(PREFETCH[c.name] for c in choices if c.axis == "prefetch")
        needs = predictor().needs if predictor is not None else None
        future = None
        if needs in ("future", "shuffled"):
            future = future_mass(s, setup.horizon, ahead)
            if needs == "shuffled":
                future = wrong_pass(s, future)
        logits = s.logits if needs_logits(choices) else None
        columns: dict[str, Any] = dict(
            index=np.arange(s.first_visit, s.first_visit + s.visits, dtype=np.int32),
            layer=s.layer,
            pass_id=s.pass_id,
            tokens=s.tokens,
            decode=s.phase == DECODE,
            starts_pass=s.starts_pass,
            ends_layer=s.ends_layer,
            reset=s.reset,
            counted=s.counted,
            count=s.count,
            mass=s.mass,
            rank=s.rank,
            next_use=s.next_use,
            by_mass=_widen(s.by_mass, min(s.experts, room(most))),
            ahead=s.ahead if needs == "ahead" else None,
            future=future,
            logits=logits,
        )
        return Visit(**columns)


def room(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def _widen(by_mass: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.int32]:
    """Pads the list of demanded experts, so that schedules of similar demand share a compile."""
    return np.pad(by_mass, ((0, 0), (0, width - by_mass.shape[1])), constant_values=-1)


def _pad(visits: Visit, rows: int) -> Visit:
    """Adds visits that demand nothing, end nothing and count for nothing."""
    fill = {"rank": -1, "by_mass": -1, "next_use": NEVER, "logits": np.nan}

    def pad(name: str, column: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        if column is None:
            return None
        return np.concatenate([column, np.full((rows, *column.shape[1:]), fill.get(name, 0), column.dtype)])

    return Visit(**{name: pad(name, column) for name, column in visits._asdict().items()})  # pyright: ignore[reportArgumentType]


def future_mass(
    schedule: Schedule, horizon: int, ahead: tuple[npt.NDArray[np.float32], bool] | None = None
) -> npt.NDArray[np.float32]:
    """[V, H, E]: gate mass of the next `horizon` layers after each layer's last visit, 0 past the end or a reset.

    `ahead`, for a stretch of a longer schedule: gate mass [L, E] of the first pass behind it, and whether that one
    begins with a reset.
    """
    mass, ends = layer_mass(schedule), np.flatnonzero(schedule.ends_layer)
    epoch = np.cumsum(schedule.reset)[ends]
    if ahead is not None:
        mass = np.concatenate([mass, ahead[0][:horizon]])
        epoch = np.concatenate([epoch, np.full(len(mass) - len(ends), epoch[-1] + ahead[1])])
    future = np.zeros((schedule.visits, horizon, schedule.experts), np.float32)
    for distance in range(1, horizon + 1):
        count = max(0, min(len(ends), len(mass) - distance))
        there = slice(distance, distance + count)
        same = epoch[there] == epoch[:count]
        future[ends[:count], distance - 1] = np.where(same[:, None], mass[there], 0)
    return future


def layer_mass(schedule: Schedule) -> npt.NDArray[np.float32]:
    """[P * L, E]: gate mass of each layer of each pass, over its visits."""
    group = np.concatenate([[0], np.cumsum(schedule.ends_layer)[:-1]])  # [V] which (pass, layer) a visit belongs to
    mass = np.zeros((int(schedule.ends_layer.sum()), schedule.experts), np.float32)
    np.add.at(mass, group, schedule.mass)
    return mass


def wrong_pass(schedule: Schedule, future: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The same column with every layer's rows dealt to other passes (fixed key), phases kept apart."""
    rng = np.random.Generator(np.random.PCG64(20260203))
    wrong = future.copy()
    for layer in range(schedule.layers):
        for phase in np.unique(schedule.phase):
            rows = np.flatnonzero((schedule.layer == layer) & (schedule.phase == phase) & schedule.ends_layer)
            # one random cycle through all rows: nobody keeps its own
            order = rng.permutation(rows)
            wrong[order] = future[np.roll(order, 1)]
    return wrong


def prepare(
    trace: Trace,
    *,
    precisions: tuple[float, ...] | None = None,
    logits: bool = False,
    **schedule: Any,
) -> Replays:
    """Builds the schedule (options of `build_schedule`) and everything that does not depend on the policies."""
    bits = native_bits(trace)
    found = sizes(trace.expert_bytes, trace.experts, precisions, bits)
    built = build_schedule(
        trace, with_logits=logits and trace.logits is not None, with_ahead=trace.ahead is not None, **schedule
    )
    return Replays(trace, built, found, work(trace, found.level_bytes, bits))
