"""The scan as a GPU program: each configuration is one program, and a whole grid is one launch.

XLA launches dozens of kernels for each visit, however few numbers each has to change; this program goes through all
visits by itself. It replays what `scan.simulate` does, visit for visit and victim for victim, with the policies' own
code: a `Column` and a `keep` are elementwise, so they serve a row that a program has read as well as a whole table.
What no configuration decides (predictions, scores from routing alone) comes ready in the `Columns`.

A program is one warp with a table row across its lanes. Its tables lie in device memory and mostly in the caches; what
it asks for at every visit (what each layer holds, and who would leave it first) stays in registers.

It is written for Pallas' Triton backend: array sizes are powers of two, and there are no gathers, sorts or slices of
values. (JAX means to drop that backend some day; the scan then still serves a GPU, much more slowly.) On a CPU it is
interpreted, which is slow and for tests.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.engines import gpu_program as program
from specmd_jax.engines.asked import Asked, points
from specmd_jax.engines.gpu_columns import Columns
from specmd_jax.engines.gpu_program import COUNTS, MOST_EXPERTS, PHASE, Given, Program, Tables
from specmd_jax.errors import SpecmdError
from specmd_jax.loops import next_power_of_two
from specmd_jax.policies.base import Eviction, Start
from specmd_jax.policies.choice import Choice, Mix
from specmd_jax.replay import totals as tally
from specmd_jax.replay.state import Numbers, Setup
from specmd_jax.replay.totals import Totals

TABLE_BYTES = 2 << 30  # about what the programs of a launch have together
MOST_AHEAD = 8  # layers: each is a piece of the program
MOST_ALONG = 65_535  # of an axis but the first: CUDA's limit


def serves(asked: Asked) -> str | None:
    """Gives None, or the reason why the program cannot replay this."""
    setup, policies = asked.setup, asked.mix.declared()
    rows = policies.eviction.rows
    named = asked.mix.eviction.name
    if asked.streamed:
        return "a streamed trace goes from block to block with its state, which only the scan carries"
    if setup.detail != "totals":
        return "it gives totals, no events"
    if setup.tier is not None:
        return "it has one cache and one link, this has host memory in front of storage behind them"
    if asked.levels != 1:
        return f"it has one stored precision, this has {asked.levels}"
    if not policies.miss.fetches_all:
        return f"miss {asked.mix.miss.name!r}: it fetches every miss"
    if policies.routing is not None:
        return f"routing {asked.mix.routing.name!r}: it replays the recorded routing"
    if setup.warm_start is not None:
        return "warm_start: its cache begins empty"
    if policies.admission is not None:
        return f"admission {asked.mix.admission.name!r}: it lets every copy in"
    if policies.eviction.pins is not None:
        return f"eviction {named!r} keeps some experts for good, and its cache begins empty"
    if rows is None:
        return f"eviction {named!r} does not change one layer at a time (it declares no rows)"
    if asked.mix.eviction.is_built:
        return "the eviction policy is built already, with its numbers out of sight: pass the function that makes it"
    if setup.experts > MOST_EXPERTS:
        return f"{setup.experts} experts per layer, it counts up to {MOST_EXPERTS}"
    if setup.horizon > MOST_AHEAD:
        return f"horizon {setup.horizon}, it looks up to {MOST_AHEAD} layers ahead"
    others = [choice.axis for choice in asked.varied if choice.axis != "eviction"]
    if others:
        return f"numbers of the {others[0]} policy vary, and its predictions are worked out once for all configurations"
    if asked.varied and rows.scorer is not None:
        return f"numbers of eviction {named!r} vary, and its scores are worked out once for all configurations"
    return None


@partial(jax.jit, static_argnames=("setup", "axes", "interpret"))
def replay_columns(
    setup: Setup,
    axes: tuple[str, ...],
    numbers: Numbers,
    mix: Mix,
    columns: Columns,
    interpret: bool = False,
) -> Totals:
    """Gives the totals of `scan.replay_many` over the same axes.

    The caller has asked `serves`. Of the policies' numbers only those of the eviction policy may differ along an axis
    "policy"; what the others decide is in the columns. Raises SpecmdError for more hardware, or policy numbers, than a
    GPU launches.
    """
    count = points(mix) or 1  # along the axis "policy"
    eviction = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count,)), mix.eviction)
    budget = numbers.budget if "budget" in axes else numbers.budget[None]
    costs = numbers.costs
    if costs is not None and "hardware" not in axes:
        costs = jax.tree.map(lambda leaf: leaf[None], costs)
    policy: Eviction = jax.tree.map(lambda leaf: leaf[0], eviction).build()
    assert policy.rows is not None
    wide, start = ((0, 0), (0, next_power_of_two(setup.experts) - setup.experts)), Start(numbers.first_use)
    fill = {name: jnp.pad(column.fill(start), wide) for name, column in policy.rows.columns.items()}
    given = Given(budget, costs, eviction.numbers, numbers.units[1], fill)
    rest = 1 if costs is None else len(costs.launch_s), count
    if max(rest) > MOST_ALONG:
        raise SpecmdError(f"{max(rest)} machines or policy numbers at once, expected at most {MOST_ALONG}")
    launch = partial(_launch, setup, mix.eviction, policy, rest, columns, interpret=interpret)
    # budgets in as many launches as their tables take
    table_bytes = rest[0] * rest[1] * sum(leaf.dtype.itemsize * leaf.size for leaf in [*fill.values(), start.first_use])
    most = max(1, TABLE_BYTES // table_bytes)
    if len(budget) <= most:
        totals = launch(given)
    else:
        parts = -(-len(budget) // most)
        short = parts * most - len(budget)
        padded = jnp.concatenate([budget, jnp.repeat(budget[-1:], short, axis=0)]).reshape(
            parts, most, *budget.shape[1:]
        )
        totals = jax.lax.map(lambda part: launch(given._replace(budget=part)), padded)
        totals = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: len(budget) * rest[0] * rest[1]], totals)
    sizes = {"budget": len(budget), "hardware": rest[0], "policy": rest[1]}
    placed = [axis for axis in sizes if axis in axes]  # as the programs lie
    order = [placed.index(axis) for axis in axes]

    def shaped(leaf: jax.Array) -> jax.Array:
        found = leaf.reshape(*(sizes[axis] for axis in placed), *leaf.shape[1:])
        return found.transpose(*order, *range(len(placed), found.ndim))

    return jax.tree.map(shaped, totals)


def _launch(
    setup: Setup,
    eviction: Choice,
    policy: Eviction,
    rest: tuple[int, int],
    columns: Columns,
    given: Given,
    interpret: bool,
) -> Totals:
    """Gives [C, ...] totals of every budget with every hardware and policy number, which `rest` counts."""
    assert policy.rows is not None
    scored = policy.rows.scorer is not None  # then its numbers are in the scores
    count = len(given.budget), *rest
    cells = count[0] * rest[0] * rest[1]

    def table(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((cells, *shape), dtype)

    whole = setup.layers, next_power_of_two(setup.experts)
    shapes = Tables(
        state=table(whole, jnp.int8),
        evicted=table(whole, jnp.int32),
        columns={name: table(whole, leaf.dtype) for name, leaf in given.fill.items()},
        counts=table((setup.layers, COUNTS), jnp.int32),
        moved=table((2, next_power_of_two(setup.layers)), jnp.int32),
        seconds=table((2, 2 * PHASE), jnp.float32),
    )

    def body(columns: Columns, given: Given, tables: Tables) -> None:
        place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        mine = {name: leaf[place[2]] for name, leaf in given.policy.items()}
        own = policy if scored else Choice(eviction.axis, eviction.name, eviction.factory, eviction.texts, mine).build()
        Program(setup, own, count, place, columns, given, tables, interpret).run()

    call = pl.pallas_call(
        body,
        grid=count,
        out_shape=(shapes,),
        interpret=interpret,
        # one warp, whose lanes see each other's writes in order: more would need more barriers
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        name="replay",
    )
    return _totals(setup, columns, call(columns, given)[0])


def _totals(setup: Setup, columns: Columns, tables: Tables) -> Totals:
    """Gives [C, ...] totals from what the programs counted and what the columns know."""
    layers, cells = setup.layers, len(tables.counts)

    def everywhere(row: jax.Array) -> jax.Array:
        return jnp.broadcast_to(row, (cells, *row.shape))

    none = jax.tree.map(everywhere, tally.nothing(layers, 1))
    demand = everywhere(columns.demand_total)
    seconds = tables.seconds.reshape(cells, 2, 2, PHASE)[..., : none.seconds.shape[-1]]
    counts = tables.counts
    return none._replace(
        experts=none.experts._replace(
            demand=demand,
            reused=counts[..., program.REUSED],
            prefetch_hits=counts[..., program.PREFETCH_HITS],
            late=counts[..., program.LATE],
            fetched=counts[..., program.FETCHED],
            collisions=counts[..., program.COLLISIONS],
            prefetch_used=counts[..., program.PREFETCH_USED],
            predicted=everywhere(columns.predicted_total),
            predicted_right=everywhere(columns.right_total),
        ),
        fetched_at=counts[:, None, :, program.FETCHED],
        runs_at=demand[:, None],
        evictions=tables.moved[:, 0, :layers],
        prefetched=tables.moved[:, 1, :layers],
        mass=everywhere(columns.mass_total),
        seconds=seconds[:, 0],
        rounding=seconds[:, 1],
    )
