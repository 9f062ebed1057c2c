"""The cells of a grid over every device there is: the cores of a laptop, the GPUs of a host, all hosts of a cluster.

Cells do not talk to each other, so the program of `specmd_jax.engines.scan` runs on each device with its share of
them (`jax.shard_map` over a mesh of one axis) and nothing is exchanged until the totals are gathered, once, by
everybody. A cell's result does not depend on where it ran.

With several processes (`jax.distributed.initialize`), all of them make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specmd_jax.engines.gpu import replay_columns
from specmd_jax.engines.gpu_columns import Columns
from specmd_jax.engines.scan import replay_many
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.state import Numbers, Setup, Visit
from specmd_jax.replay.totals import Totals

CELLS = "cells"
Job = TypeVar("Job")
Tuple = TypeVar("Tuple", bound=NamedTuple)


def devices(first: int | None = None) -> Mesh:
    """Gives all devices of all processes, or the first so many, in one row."""
    return Mesh(np.array(jax.devices()[:first]), (CELLS,))


def _engine(visits: Visit | Columns, mesh: Mesh) -> Callable[..., Totals]:
    """Gives what replays them, by the arguments of `scan.replay_many`."""
    if isinstance(visits, Columns):
        return partial(replay_columns, interpret=mesh.devices.flat[0].platform != "gpu")
    return lambda *arguments: replay_many(*arguments)[0][1]


@partial(jax.jit, static_argnames=("mesh", "setup", "axes"))
def _replay(
    mesh: Mesh,
    setup: Setup,
    axes: tuple[str, ...],
    numbers: Numbers,
    mix: Mix,
    visits: Visit | Columns,
) -> Totals:
    def share(budget: jax.Array, numbers: Numbers, mix: Mix, visits: Visit | Columns) -> Totals:
        numbers = numbers._replace(budget=budget)
        return _engine(visits, mesh)(setup, axes, numbers, mix, visits)

    whole, split = PartitionSpec(), PartitionSpec(CELLS)
    program = jax.shard_map(share, mesh=mesh, in_specs=(split, whole, whole, whole), out_specs=split, check_vma=False)
    return program(numbers.budget, numbers._replace(budget=jax.numpy.zeros(0)), mix, visits)


def replay_spread(
    setup: Setup,
    axes: tuple[str, ...],
    numbers: Numbers,
    mix: Mix,
    visits: Visit | Columns,
    mesh: Mesh | None = None,
) -> Totals:
    """Gives `scan.replay_many`'s totals (numpy), its budgets (the outermost of `axes`) dealt to the devices of `mesh`.

    The scan replays visits, the GPU program `gpu_columns.Columns`; it has to serve the mix. The last budget is
    replayed again where their number is no multiple of the devices'.
    """
    assert axes[0] == "budget"
    if mesh is None:
        mesh = devices()
    count = len(numbers.budget)
    if mesh.size == 1:
        totals = _engine(visits, mesh)(setup, axes, numbers, mix, visits)
        return jax.tree.map(np.asarray, totals)
    budget = np.asarray(numbers.budget)
    budget = np.concatenate([budget, np.repeat(budget[-1:], -count % mesh.size, axis=0)])
    # neighbours mostly ask for as many evictions: the scan goes at the pace of the slowest of a device, so they stay
    # together; the GPU's programs each have their own pace, and every device gets some of all
    order = np.arange(len(budget))
    if isinstance(visits, Columns):
        order = order.reshape(-1, mesh.size).T.reshape(-1)
    rest = everywhere((numbers._replace(budget=np.zeros(0)), mix, visits), mesh)
    placed = rest[0]._replace(budget=_place(NamedSharding(mesh, PartitionSpec(CELLS)), budget[order]))
    totals = gathered(_replay(mesh, setup, axes, placed, *rest[1:]))
    back = np.argsort(order)[:count]
    return jax.tree.map(lambda leaf: np.asarray(leaf)[back], totals)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Places arrays with a copy on each device."""
    return jax.tree.map(partial(_place, NamedSharding(mesh, PartitionSpec())), tree)


def _place(sharding: NamedSharding, array: Any) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def gathered(tree: Any) -> Any:
    """Gathers arrays that are spread over processes, whole in each of them."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def first_says(flags: Sequence[bool]) -> list[bool]:
    """Gives what the first process says, in all of them: the one that has seen the files."""
    if jax.process_count() == 1:
        return list(flags)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(flags, bool))).tolist()


def share(jobs: Sequence[Job], work: Callable[[Sequence[Job]], Sequence[Tuple]]) -> list[Tuple]:
    """Shares `work(jobs)`, a named tuple of numpy arrays for each, among all processes: each takes a stretch.

    The last job is done again where their number is no multiple of the processes'.
    """
    processes = jax.process_count()
    if processes == 1:
        return list(work(jobs))
    each = -(-len(jobs) // processes)
    start = each * jax.process_index()
    done = work([jobs[min(at, len(jobs) - 1)] for at in range(start, start + each)])
    # as bytes: JAX would cut 64-bit numbers
    columns = [np.stack(column) for column in zip(*done, strict=True)]
    whole = [gathered(column.view(np.uint8)).view(column.dtype) for column in columns]
    rebuilt = cast("Callable[..., Tuple]", type(done[0]))
    return [rebuilt(*row) for row in list(zip(*whole, strict=True))[: len(jobs)]]
