"""The scan as a GPU program: one configuration a program, one launch a grid.

XLA launches some dozens of kernels a visit, however few numbers each has to change; this program goes through all
visits by itself. It replays what `simulate` does, visit for visit and victim for victim, with the policies' own code: a
`Column` and a `keep` are elementwise, so they serve a row that a program has read as well as a whole table. What no
configuration decides (predictions, scores from routing alone) comes ready on the `Tape`.

A program is one warp with a table row across its lanes. Its tables lie in device memory and mostly in the caches; what
it asks for at every visit (what each layer holds, and who would leave it first) stays in registers.

It is written for Pallas' Triton backend: array sizes are powers of two, and there are no gathers, sorts or slices of
values. (JAX means to drop that backend some day; the scan then still serves a GPU, much more slowly.) On a CPU it is
interpreted, which is slow and for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.engines import gpu_program as program
from specmd_jax.engines.gpu_columns import Tape
from specmd_jax.engines.gpu_program import COUNTS, MOST_EXPERTS, PHASE, Given, Program, Tables
from specmd_jax.engines.prepared import Choice, room
from specmd_jax.errors import SpecmdError
from specmd_jax.policies import EVICTION
from specmd_jax.policies.eviction import Eviction, Start
from specmd_jax.replay import totals as tally
from specmd_jax.replay.step import Numbers, Setup
from specmd_jax.replay.totals import Totals

TABLE_BYTES = 2 << 30  # about what the programs of a launch have together
MOST_AHEAD = 8  # layers: each is a piece of the program
MOST_ALONG = 65_535  # of an axis but the first: CUDA's limit


def serves(setup: Setup, choices: tuple[Choice, ...], levels: int, own_numbers: bool = False) -> bool:
    """Whether the program can replay this: one stored precision, misses fetched, an eviction policy by rows, and
    predictions of not too many layers.

    `own_numbers`: whether programs differ in the eviction policy's numbers; then its scores must not be on the tape.
    """
    names = {choice.axis: choice.name for choice in choices}
    plain = names["miss"] == "fetch" and names["routing"] == "standard" and setup.detail == "totals"
    rows = _eviction(choices, {}).rows
    fits = levels == 1 and setup.experts <= MOST_EXPERTS and setup.horizon <= MOST_AHEAD
    return plain and fits and rows is not None and not (rows.scored and own_numbers)


def _eviction(choices: tuple[Choice, ...], numbers: Mapping[str, Any]) -> Eviction:
    choice = next(choice for choice in choices if choice.axis == "eviction")
    return EVICTION[choice.name](**dict(choice.static), **numbers)


@partial(jax.jit, static_argnames=("setup", "choices", "axes", "interpret"))
def replay_tape(
    setup: Setup,
    choices: tuple[Choice, ...],
    axes: tuple[str, ...],
    numbers: Numbers,
    policy_numbers: dict[str, dict[str, jax.Array]],
    tape: Tape,
    interpret: bool = False,
) -> Totals:
    """The totals of `scan.replay_many` over the same axes.

    The caller has asked `serves`. Of the policies' numbers only those of the eviction policy may differ along an axis
    "policy"; the others are on the tape. Raises SpecmdError for more hardware, or policy numbers, than a GPU launches.
    """
    policy_axis = "policy" in axes
    eviction_numbers = {k: v if policy_axis else v[None] for k, v in policy_numbers["eviction"].items()}
    budget = numbers.budget if "budget" in axes else numbers.budget[None]
    costs = numbers.costs
    if costs is not None and "hardware" not in axes:
        costs = jax.tree.map(lambda leaf: leaf[None], costs)
    policy = _eviction(choices, {name: leaf[0] for name, leaf in eviction_numbers.items()})
    assert policy.rows is not None
    wide, start = ((0, 0), (0, room(setup.experts) - setup.experts)), Start(numbers.first_use)
    fill = {name: jnp.pad(column.fill(start), wide) for name, column in policy.rows.columns.items()}
    given = Given(budget, costs, eviction_numbers, numbers.units[1], fill)
    rest = (
        1 if costs is None else len(costs.launch_s),
        len(jax.tree.leaves(policy_numbers)[0]) if policy_axis else 1,
    )
    if max(rest) > MOST_ALONG:
        raise SpecmdError(f"{max(rest)} machines or policy numbers at once, expected at most {MOST_ALONG}")
    launch = partial(_launch, setup, choices, policy, rest, tape, interpret=interpret)
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
    choices: tuple[Choice, ...],
    policy: Eviction,
    rest: tuple[int, int],
    tape: Tape,
    given: Given,
    interpret: bool,
) -> Totals:
    """[C, ...] totals of every budget with every hardware and policy number, which `rest` counts."""
    assert policy.rows is not None
    scored = policy.rows.scored  # then its numbers are in the scores
    count = len(given.budget), *rest
    cells = count[0] * rest[0] * rest[1]

    def table(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((cells, *shape), dtype)

    whole = setup.layers, room(setup.experts)
    shapes = Tables(
        state=table(whole, jnp.int8),
        evicted=table(whole, jnp.int32),
        columns={name: table(whole, leaf.dtype) for name, leaf in given.fill.items()},
        counts=table((setup.layers, COUNTS), jnp.int32),
        moved=table((2, room(setup.layers)), jnp.int32),
        seconds=table((2, 2 * PHASE), jnp.float32),
    )

    def body(tape: Tape, given: Given, tables: Tables) -> None:
        place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        mine = {name: leaf[place[2]] for name, leaf in given.policy.items()}
        own = policy if scored else _eviction(choices, mine)
        Program(setup, own, count, place, tape, given, tables, interpret).run()

    call = pl.pallas_call(
        body,
        grid=count,
        out_shape=(shapes,),
        interpret=interpret,
        # one warp, whose lanes see each other's writes in order: more would need more barriers
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        name="replay",
    )
    return _totals(setup, tape, call(tape, given)[0])


def _totals(setup: Setup, tape: Tape, tables: Tables) -> Totals:
    """[C, ...] totals from what the programs counted and what the tape knows."""
    layers, cells = setup.layers, len(tables.counts)

    def everywhere(row: jax.Array) -> jax.Array:
        return jnp.broadcast_to(row, (cells, *row.shape))

    none = jax.tree.map(everywhere, tally.nothing(layers, 1))
    demand = everywhere(tape.demand_total)
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
            predicted=everywhere(tape.predicted_total),
            predicted_right=everywhere(tape.right_total),
        ),
        fetched_at=counts[:, None, :, program.FETCHED],
        runs_at=demand[:, None],
        evictions=tables.moved[:, 0, :layers],
        prefetched=tables.moved[:, 1, :layers],
        mass=everywhere(tape.mass_total),
        seconds=seconds[:, 0],
        rounding=seconds[:, 1],
    )
