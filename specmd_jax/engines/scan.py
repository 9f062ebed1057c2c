"""The scan over visits: the engine that serves every policy and schedule; one program for each static choice."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from specmd_jax.engines.prepared import Choice, policies
from specmd_jax.replay.step import Numbers, Policies, Setup, State, Visit, begin, empty, step
from specmd_jax.replay.timing import Costs
from specmd_jax.replay.totals import Events, Totals, nothing


def simulate(
    setup: Setup, policies: Policies, numbers: Numbers, visits: Visit, carry: tuple[State, Totals] | None = None
) -> tuple[tuple[State, Totals], Events | None]:
    """Replays `visits` (leading axis V) from `carry`, or from an empty cache: a schedule may be cut into stretches
    anywhere.
    """
    if carry is None:
        carry = begin(setup, policies, numbers), nothing(setup.layers, numbers.units.shape[0] - 1)

    def body(carry: tuple[State, Totals], visit: Visit) -> tuple[tuple[State, Totals], Events | None]:
        state, totals = carry
        if setup.resets:
            state = jax.lax.cond(visit.reset, lambda old: empty(setup, policies, numbers, old), lambda old: old, state)
        state, totals, events = step(setup, policies, numbers, state, totals, visit)
        return (state, totals), None if setup.detail == "totals" else events

    return jax.lax.scan(body, carry, visits)


@partial(jax.jit, static_argnames=("setup", "choices", "axes"))
def replay_many(
    setup: Setup,
    choices: tuple[Choice, ...],
    axes: tuple[str, ...],
    numbers: Numbers,
    policy_numbers: dict[str, dict[str, jax.Array]],
    visits: Visit,
) -> tuple[tuple[State, Totals], Events | None]:
    """The compiled program of a static choice, vmapped over `axes`, outermost first.

    An axis is "budget" (`numbers.budget`), "hardware" (`numbers.costs`) or "policy" (all policy numbers). What does not
    depend on an axis is not repeated along it inside.
    """

    def one(budget: jax.Array, costs: Costs | None, given: dict[str, dict[str, jax.Array]]) -> Any:
        return simulate(setup, policies(choices, given), numbers._replace(budget=budget, costs=costs), visits)

    places = {"budget": 0, "hardware": 1, "policy": 2}
    program = one
    for axis in reversed(axes):
        program = jax.vmap(program, in_axes=tuple(0 if places[axis] == i else None for i in range(3)))
    (state, totals), events = program(numbers.budget, numbers.costs, policy_numbers)
    return (state, totals), events
