"""The scan over visits: the engine that serves every policy and schedule; one program for each static choice."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from specmd_jax.policies.base import Policies
from specmd_jax.policies.choice import Mix
from specmd_jax.replay.state import Numbers, Setup, State, Visit, begin, empty
from specmd_jax.replay.step import step
from specmd_jax.replay.timing import Costs
from specmd_jax.replay.totals import Events, Totals, nothing


def simulate(
    setup: Setup, policies: Policies, numbers: Numbers, visits: Visit, carry: tuple[State, Totals] | None = None
) -> tuple[tuple[State, Totals], Events | None]:
    """Replays `visits` (leading axis V) from `carry`, or from the beginning: a schedule may be cut into stretches
    anywhere.
    """
    if carry is None:
        levels = numbers.units.shape[0] - 1
        totals = nothing(setup.layers, levels, policies.selective, *setup.tiers)
        carry = begin(setup, policies, numbers), totals

    def body(carry: tuple[State, Totals], visit: Visit) -> tuple[tuple[State, Totals], Events | None]:
        state, totals = carry
        if setup.resets:
            state = jax.lax.cond(visit.reset, lambda old: empty(setup, policies, numbers, old), lambda old: old, state)
        state, totals, events = step(setup, policies, numbers, state, totals, visit)
        return (state, totals), None if setup.detail == "totals" else events

    return jax.lax.scan(body, carry, visits)


@partial(jax.jit, static_argnames=("setup", "axes"))
def replay_many(
    setup: Setup, axes: tuple[str, ...], numbers: Numbers, mix: Mix, visits: Visit
) -> tuple[tuple[State, Totals], Events | None]:
    """Runs the compiled program of a static choice, vmapped over `axes`, outermost first.

    An axis is "budget" (`numbers.budget`), "hardware" (`numbers.costs`) or "policy" (the rows of values among the mix's
    numbers). What does not depend on an axis is not repeated along it inside.
    """

    def one(budget: jax.Array, costs: Costs | None, mix: Mix) -> Any:
        return simulate(setup, mix.build(), numbers._replace(budget=budget, costs=costs), visits)

    program = one
    for axis in reversed(axes):
        program = jax.vmap(program, in_axes=in_axes(axis, mix))
    (state, totals), events = program(numbers.budget, numbers.costs, mix)
    return (state, totals), events


def in_axes(axis: str, mix: Mix) -> tuple[Any, ...]:
    """Gives what of (budget, costs, mix) has an axis, for `vmap`."""
    varied = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, mix)
    return 0 if axis == "budget" else None, 0 if axis == "hardware" else None, varied if axis == "policy" else None
