"""Replays that also say what each request took: intervals over requests need more than one total.

The scan alone does this. Its totals are those of `specmd_jax.engines.table`; the visits' seconds and misses are summed
by group inside the same program.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Int32

from specmd_jax.engines.devices import CELLS, devices, everywhere, gathered
from specmd_jax.engines.prepared import Prepared
from specmd_jax.engines.scan import simulate
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.metrics import Metrics, metrics_of
from specmd_jax.replay.state import Numbers, Setup, Visit
from specmd_jax.replay.totals import FETCHED, VISIT_S, Totals
from specmd_jax.schedule.counted import counted_of
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.types import DECODE

SHARED = 16
"""Schedules whose groups, rounded up to a multiple of this, are as many share a compile."""


class Spent(NamedTuple):
    """What groups of counted passes took: [G] each."""

    decode_s: npt.NDArray[np.float64]  # all decode passes of the group
    decodes: npt.NDArray[Any]  # how many; with drafts, the tokens that they keep of a request (float64)
    prefill_s: npt.NDArray[np.float64]
    misses: npt.NDArray[np.int64]  # of both


def groups_of(prepared: Prepared, blocks: int = 8) -> npt.NDArray[np.int32]:
    """Gives the group of each visit, -1 if it is not counted: its request; where requests are decoded together, or one
    alone is counted, one of `blocks` stretches of equally many passes. Groups count from 0.
    """
    schedule = prepared.schedule
    together = bool((schedule.tokens[schedule.phase == DECODE] > 1).any())
    place = schedule.request
    if together or len(np.unique(place[schedule.counted])) == 1:
        _, place = np.unique(np.where(schedule.counted, schedule.pass_id, -1), return_inverse=True)
        place = place.reshape(-1) * blocks // (place.max() + 1)
    group = np.full(schedule.visits, -1, np.int32)
    group[schedule.counted] = np.unique(place[schedule.counted], return_inverse=True)[1].reshape(-1)
    return group


def replay_requests(
    prepared: Prepared,
    mix: Mix,
    budgets: Sequence[Budget],
    machine: Hardware,
    mesh: Mesh | None = None,
    host_budget: Budget | None = None,
    **options: Any,
) -> list[tuple[Metrics, Spent]]:
    """Gives the metrics of each budget and what the groups of `groups_of` spent.

    Args:
      mix: its numbers are scalars.
      mesh: the devices that budgets are dealt to; None: all there are.
      host_budget: of host memory; None: it holds everything.
      options: the rest of `Setup`.
    """
    setup = prepared.setup(mix, machine, **options)._replace(detail="events")
    visits, group, mesh = prepared.visits(setup, mix), groups_of(prepared), mesh or devices()
    schedule, count = prepared.schedule, int(group.max()) + 1
    room = 2 * (count + -count % SHARED)
    place = np.full(len(visits.index), room, np.int32)  # of padding and what is not counted: behind the rest
    place[: schedule.visits] = np.where(group < 0, room, 2 * group + (schedule.phase == DECODE))
    spare = -len(budgets) % mesh.size  # the last budget is replayed again where their number is no multiple
    sizes = np.stack([prepared.sizes.budget(budget) for budget in [*budgets, *[budgets[-1]] * spare]])
    numbers = prepared.numbers(budgets[0], machine, host_budget)._replace(budget=jnp.asarray(sizes))
    shared = everywhere((numbers._replace(budget=jnp.zeros(0)), mix.traced(), visits, place), mesh)
    totals, sums = gathered(_replay(mesh, setup, room + 1, numbers.budget, *shared))
    begins = schedule.starts_pass & (schedule.phase == DECODE) & (group >= 0)
    kept = None if schedule.kept is None else schedule.kept[begins] / schedule.served[begins]
    decodes = np.bincount(group[begins], kept, count)
    seconds = np.asarray(sums[0], np.float64)[:, : 2 * count].reshape(-1, count, 2)
    misses = np.asarray(sums[1], np.int64)[:, : 2 * count].reshape(-1, count, 2).sum(axis=-1)
    measure = partial(metrics_of, counted_of(schedule), prepared.sizes.level_bytes)
    return [
        (
            measure(jax.tree.map(lambda x, at=at: np.asarray(x)[at], totals), prepared.bits, True),
            Spent(seconds[at, :, 1], decodes, seconds[at, :, 0], misses[at]),
        )
        for at in range(len(budgets))
    ]


@partial(jax.jit, static_argnames=("mesh", "setup", "groups"))
def _replay(
    mesh: Mesh,
    setup: Setup,
    groups: int,
    budgets: Int32[Array, " *cells"],
    numbers: Numbers,
    mix: Mix,
    visits: Visit,
    place: Int32[Array, " V"],
) -> tuple[Totals, tuple[Float32[Array, "B G"], Int32[Array, "B G"]]]:
    def share(budgets: Any, numbers: Numbers, mix: Mix, visits: Visit, place: Any) -> Any:
        def one(budget: Any) -> Any:
            (_, totals), events = simulate(setup, mix.build(), numbers._replace(budget=budget), visits)
            assert events is not None
            misses = jnp.sum(events.outcome >= FETCHED, axis=1, dtype=jnp.int32)
            added = jax.ops.segment_sum(events.seconds[:, VISIT_S], place, groups)
            return totals, (added, jax.ops.segment_sum(misses, place, groups))

        return jax.vmap(one)(budgets)

    if mesh.size == 1:
        return share(budgets, numbers, mix, visits, place)
    whole, split = PartitionSpec(), PartitionSpec(CELLS)
    program = jax.shard_map(
        share, mesh=mesh, in_specs=(split, whole, whole, whole, whole), out_specs=split, check_vma=False
    )
    return program(budgets, numbers, mix, visits, place)
