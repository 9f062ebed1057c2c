"""Demand-only cache curves: exact totals at many capacities, much faster than one scan per capacity.

`scan.simulate` answers everything; this answers one question, the integer totals of an eviction policy under
plain demand (no prefetch, every miss fetched, standard routing, one precision, no seconds), with the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from specmd_jax.engines import curves_kernels as kernels
from specmd_jax.engines.asked import Asked, points
from specmd_jax.engines.curves_kernels import Code
from specmd_jax.engines.devices import share
from specmd_jax.engines.offline_scores import STRETCH, Scores
from specmd_jax.engines.prepared import Prepared
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.base import Eviction
from specmd_jax.policies.choice import Choice, Chosen, Mix, choose
from specmd_jax.replay.state import Setup
from specmd_jax.replay.totals import Totals, nothing
from specmd_jax.schedule.demand import Demand, cut, pack, widest_demand
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.types import Schedule

Ints = npt.NDArray[np.int64]
Scored = npt.NDArray[np.int32]  # [V, E] or [V, L * E], or nothing: see `curves_kernels.stack`

_GIVEN = (kernels.GIVEN, kernels.GIVEN_ALL)
_NEEDS_RESIDENCY = (kernels.LOAD, kernels.RESIDENT_COUNT, kernels.SEGMENT)  # each capacity has scores of its own


class CurveTotals(NamedTuple):
    """Sums over the counted visits at one budget, [L] int64 each. Every miss is one load."""

    demand: Ints
    hits: Ints
    misses: Ints
    collisions: Ints
    evictions: Ints


def curves(
    schedule: Schedule,
    units: npt.ArrayLike,
    budgets: Sequence[npt.ArrayLike],
    eviction: Chosen,
    settings: Mapping[str, Any] | None = None,
    *,
    hold: bool = False,
    demand: Demand | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[CurveTotals]:
    """Gives the totals of an eviction policy at each budget, equal to those of `scan.simulate` without prefetch.

    Policies whose keep-scores do not depend on who is resident have nested contents: at each visit a larger cache keeps
    what a smaller one keeps, and more (Mattson et al., "Evaluation techniques for storage hierarchies", 1970). One pass
    over a stack, in which position p holds the expert that is resident from capacity p on, then gives every capacity at
    once. That needs pools of equal experts that can hold any visit's demand. All else is replayed one budget at a time.

    Args:
      schedule: the visits.
      units: [L] int, what one expert of each layer takes of a budget.
      budgets: each an int, units of one pool for all layers, or [L] int, units of one pool per layer.
      eviction: a policy that declares a `Curve`; `settings`: its numbers by name.
      hold: `oversize="hold"` instead of "stream".
      demand: `pack(schedule)`, to save packing it again.
      progress: called with the number of budgets that have just become ready.

    Returns:
      One `CurveTotals` per budget, in order.

    Raises:
      SpecmdError: an unknown policy or setting, or units and budgets of the wrong shape or sign.
    """
    choice = choose("eviction", eviction, settings)
    packed = pack(schedule) if demand is None else demand
    shape = schedule.layers, schedule.experts
    under_way = Curves(*shape, widest_demand(packed, schedule.layers), units, budgets, choice, hold=hold)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for ready in threads.map(lambda step: step(packed, schedule.first_visit), under_way.steps):
            if progress is not None:
                progress(ready)
    return under_way.totals()


Step = Callable[[Demand, int], int]
"""Replays the visits of a demand, numbered from the given one; returns the number of budgets that it serves."""


class Curves:
    """`curves` of one policy under way, for schedules that come a stretch at a time.

    Every one of `steps` must be given every stretch in order; different ones may run in different threads. `totals`
    then are those of all stretches.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        widest: Ints,
        units: npt.ArrayLike,
        budgets: Sequence[npt.ArrayLike],
        eviction: Choice,
        *,
        hold: bool = False,
    ) -> None:
        """Arguments as for `curves`; `widest`: [L] the most experts that a visit of each layer demands, or more."""
        self._code, self._order, protected = _coded(eviction, layers)
        self._layers, self._experts = layers, experts
        sizes = _integers(units, "units", 1)
        if sizes.shape != (layers,):
            raise SpecmdError(f"units: shape {sizes.shape}, expected one number for each of {layers} layers")
        pools = [_integers(budget, f"budgets[{i}]", 0) for i, budget in enumerate(budgets)]
        for i, pool in enumerate(pools):
            if pool.shape not in ((), (layers,)):
                raise SpecmdError(
                    f"budgets[{i}]: shape {pool.shape}, expected a number or one for each of {layers} layers"
                )
        unit = int(np.gcd.reduce(sizes))  # what is left over of a budget holds nothing
        self._sizes, self._pools = sizes // unit, [pool // unit for pool in pools]
        self._demand = np.zeros(layers, np.int64)
        # (budgets, their slots [budgets, L], the pass that serves all of them)
        self._stacks: list[tuple[list[int], Ints, kernels.Stack]] = []
        self._replays: dict[int, kernels.Direct] = {}
        steps: list[Callable[[Scored, Demand, int], int]] = []
        stacked = [i for i, pool in enumerate(self._pools) if self._stackable(pool, widest)]
        for by_layer in (False, True):
            chosen = [i for i in stacked if (self._pools[i].ndim == 1) == by_layer]
            if chosen:
                slots = np.array([np.broadcast_to(self._pools[i] // self._sizes, layers) for i in chosen])
                slots = np.minimum(slots, experts * (1 if by_layer else layers))
                state = kernels.new_stack(layers, experts, by_layer, int(slots.max()))
                self._stacks.append((chosen, slots, state))
                steps.append(partial(self._stack, by_layer, len(chosen), state))
        for i in range(len(self._pools)):
            if i not in stacked:
                pool = np.array(np.broadcast_to(self._pools[i], layers), np.int64)
                shielded = np.floor(protected * pool.astype(np.float32)).astype(np.int64)
                by_layer = self._pools[i].ndim == 1
                pools = kernels.Pools(layers, experts, by_layer, self._sizes, pool, shielded, hold)
                self._replays[i] = kernels.new_direct(layers, experts, by_layer)
                steps.append(partial(self._direct, pools, self._replays[i]))
        self.steps: list[Step] = [self._count]
        if self._code.own in _GIVEN:
            everywhere = self._code.own == kernels.GIVEN_ALL
            scores = Scores(eviction, layers, experts, everywhere)
            self.steps.append(partial(self._scored, scores, steps))
        else:
            self.steps += [partial(step, kernels.NOT_GIVEN) for step in steps]

    def totals(self) -> list[CurveTotals]:
        """Gives one `CurveTotals` per budget, in order."""
        found: dict[int, CurveTotals] = {}
        for chosen, slots, state in self._stacks:
            sums = np.cumsum(state.sums, axis=2)
            for i, slot in zip(chosen, slots, strict=True):
                hits, collisions, gained = sums[:, np.arange(self._layers), slot]
                misses = self._demand - hits
                left = misses - gained  # all that came and is not there
                found[i] = CurveTotals(self._demand.copy(), hits, misses, collisions, left)
        for i, state in self._replays.items():
            found[i] = CurveTotals(*state.sums.copy())
        return [found[i] for i in range(len(self._pools))]

    def _stackable(self, pool: Ints, widest: Ints) -> bool:
        if self._code.own in _NEEDS_RESIDENCY or (pool.ndim == 0 and np.ptp(self._sizes) > 0):
            return False
        enough = pool // self._sizes >= (widest if pool.ndim else widest.max())
        return self._code.bypass or bool(enough.all())

    def _count(self, demand: Demand, first_visit: int) -> int:
        del first_visit
        counted = np.where(demand.counted, np.diff(demand.start), 0)
        self._demand += np.bincount(demand.layer, counted, self._layers).astype(np.int64)
        return 0

    @staticmethod
    def _scored(
        scores: Scores, steps: Sequence[Callable[[Scored, Demand, int], int]], demand: Demand, first_visit: int
    ) -> int:
        """Draws scores and lets every step have them, a stretch at a time."""
        served = 0
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for first in range(0, demand.layer.size, STRETCH):
                some, at = cut(demand, first, first + STRETCH), first_visit + first
                given = scores.draw(some, at)
                served = sum(threads.map(lambda step, given=given, some=some, at=at: step(given, some, at), steps))
        return served

    def _stack(
        self, by_layer: bool, budgets: int, state: kernels.Stack, given: Scored, demand: Demand, first_visit: int
    ) -> int:
        shape = self._layers, self._experts
        kernels.stack(demand, first_visit, given, *shape, by_layer, self._code, self._order, state)
        return budgets

    def _direct(
        self, pools: kernels.Pools, state: kernels.Direct, given: Scored, demand: Demand, first_visit: int
    ) -> int:
        kernels.direct(demand, first_visit, given, pools, self._code, self._order, state)
        return 1


def _integers(values: npt.ArrayLike, name: str, least: int) -> Ints:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or (array < least).any():
        raise SpecmdError(f"{name} is {values}, expected integers of at least {least}")
    return array.astype(np.int64)


def _coded(eviction: Choice, layers: int) -> tuple[Code, Ints, np.float32]:
    """Gives the kernel code, the layers' parts of the score [L, L], and the protected share."""
    policy: Eviction = eviction.build()
    curve = policy.curve
    if curve is None or curve.own not in kernels.PARTS or curve.layers not in _ORDERS:
        raise SpecmdError(f"eviction {eviction.name!r} declares {curve}, expected a Curve that these loops know")
    decay = np.float32(curve.decay)
    if not decay >= 0:
        raise SpecmdError(f"eviction {eviction.name!r}: decay is {decay}, expected at least 0")
    own, seed = kernels.PARTS.index(curve.own), int(curve.seed) & 0xFFFFFFFF
    code = Code(own, curve.marks, policy.bypass, seed, decay)
    return code, _ORDERS[curve.layers](layers) << kernels.LOW_BITS, np.float32(curve.protected)


def _by_layer(part: Callable[[Ints, Ints, int], Ints], layers: int) -> Ints:
    """Gives [L, L] from a function of (visited layer, expert's layer, L); never negative."""
    now, layer = np.mgrid[:layers, :layers].astype(np.int64)
    return part(now, layer, layers)


_ORDERS: dict[str, Callable[[int], Ints]] = {
    "none": partial(_by_layer, lambda now, layer, layers: np.zeros_like(now)),
    "cyclic": partial(_by_layer, lambda now, layer, layers: layers - 1 - (layer - now - 1) % layers),
    "absolute": partial(_by_layer, lambda now, layer, layers: layers - np.abs(layer - now)),
    "left_first": partial(_by_layer, lambda now, layer, layers: np.where(layer < now, layer, 2 * layers - layer)),
}


def serves(asked: Asked) -> str | None:
    """Gives None, or the reason why these loops cannot replay this."""
    policies = asked.mix.declared()
    if asked.setup.timed:
        return "they keep no seconds: give hardware=None"
    if asked.setup.detail != "totals":
        return "they give totals, no events"
    if asked.setup.tier is not None:
        return "they have one cache, this has host memory in front of storage behind it"
    if not policies.demand_only:
        what = "prefetch" if policies.prefetch is not None else "miss" if policies.routing is None else "routing"
        return f"{what} {getattr(asked.mix, what).name!r}: they replay the recorded demand alone, all of it copied"
    if asked.levels != 1:
        return f"they have one stored precision, this has {asked.levels}"
    if asked.setup.warm_start is not None:
        return "warm_start: their caches begin empty"
    if policies.admission is not None:
        return f"admission {asked.mix.admission.name!r}: they let every copy in"
    if policies.eviction.pins is not None:
        return f"eviction {asked.mix.eviction.name!r} keeps some experts for good, and their caches begin empty"
    if policies.eviction.curve is None:
        return f"eviction {asked.mix.eviction.name!r} declares no Curve, so they cannot score it"
    return None


def replayer(
    prepared: Prepared,
    setup: Setup,
    mix: Mix,
    machines: Sequence[Hardware | None],
    mesh: Mesh | None,
    host_budget: Budget | None,
) -> Callable[[Sequence[Budget]], Totals]:
    """Gives what replays a mix at any budgets: totals [budget], or [budget, value] if a number varies."""
    del machines, mesh, host_budget  # no seconds and no host tier; the host's cores share the work
    each = each_value(mix)

    def draw(choice: Choice, sizes: Sequence[Any]) -> Sequence[CurveTotals]:
        units = prepared.sizes.units[1]
        return curves(prepared.schedule, units, sizes, choice, hold=setup.hold, demand=prepared.demand)

    def replay(budgets: Sequence[Budget]) -> Totals:
        sizes = [prepared.sizes.budget(budget) for budget in budgets]
        found = [list(map(as_totals, share(sizes, partial(draw, choice)))) for choice in each]
        return stacked(found, points(mix) is not None)

    return replay


def each_value(mix: Mix) -> list[Choice]:
    """Gives the eviction policy with each value of the mix's varying numbers, or as it is if none varies."""
    return [mix.at(place).eviction for place in range(points(mix) or 1)]


def stacked(found: Sequence[Sequence[Totals]], varied: bool) -> Totals:
    """Gives totals [value][budget] as those of `table.Replayer`: [budget], or [budget, value] if a number varies."""
    rows = [jax.tree.map(lambda *leaves: np.stack(leaves), *row) for row in found]
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *rows) if varied else rows[0]


def as_totals(curve: CurveTotals) -> Totals:
    """Gives the totals of a demand-only replay: what is not fetched is reused."""
    totals = jax.tree.map(np.asarray, nothing(len(curve.demand), 1))
    experts = totals.experts._replace(
        demand=curve.demand, reused=curve.hits, fetched=curve.misses, collisions=curve.collisions
    )
    return totals._replace(
        experts=experts, fetched_at=curve.misses[None], runs_at=curve.demand[None], evictions=curve.evictions
    )
