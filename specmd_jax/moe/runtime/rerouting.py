"""What a run demanded where the cache had a say in its routing: a trace has only what the router would have chosen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.policies.choice import Choice
from specmd_jax.replay.routing import Demanded, choose, demanded
from specmd_jax.types import Schedule


class _Visit(NamedTuple):
    """One visit, or a row for each of V."""

    layer: Any  # int32
    reset: Any  # bool: everything is forgotten before
    logits: Any  # [t, E]
    resident: Any  # [E] bool


def as_routed(schedule: Schedule, routing: Choice, top_k: int, level: npt.NDArray[np.int8]) -> Schedule:
    """Gives a schedule whose demand is what a routing policy made of it; `next_use` stays that of the router's own.

    Args:
        schedule: of the recorded trace, with logits.
        level: [V, L, E] residency behind each visit of the replay.
    """
    before = np.concatenate([np.zeros_like(level[:1]), level[:-1]])
    before[schedule.reset] = 0
    resident = before[np.arange(schedule.visits), schedule.layer] > 0
    visits = _Visit(schedule.layer, schedule.reset, schedule.logits, resident)
    count, mass, rank = map(np.asarray, _demands(top_k, schedule.layers, jax.tree.map(jnp.asarray, routing), visits))
    most = (count > 0).sum(axis=1)
    by_mass = np.argsort(np.where(count > 0, -mass, np.inf), axis=1, kind="stable").astype(np.int32)
    return dataclasses.replace(
        schedule,
        most=schedule.experts,
        clock=(np.cumsum(most + 1) - most - 1 + schedule.clock[0]).astype(np.int32),
        count=count,
        mass=mass,
        rank=rank,
        by_mass=np.where(np.take_along_axis(count, by_mass, axis=1) > 0, by_mass, -1),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _demands(top_k: int, layers: int, routing: Choice, visits: _Visit) -> Demanded:
    """Gives the demand of visits one after the other, leaves [V, E]."""
    policy, experts = routing.build(), visits.resident.shape[-1]

    def visit(memory: Any, row: _Visit) -> tuple[Any, Demanded]:
        memory = jax.tree.map(lambda new, old: jnp.where(row.reset, new, old), policy.init(layers), memory)
        memory, chosen = choose(policy, memory, row.layer, row.logits, row.resident, top_k)
        return memory, demanded(chosen.ids, chosen.gates, experts)

    return jax.lax.scan(visit, policy.init(layers), visits)[1]
