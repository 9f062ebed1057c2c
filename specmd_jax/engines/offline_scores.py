"""Keep-scores by a policy's own code, without a cache: what `curves` replays for policies that it has no loop for.

That is for policies whose scores depend on the routing alone, not on who is resident, and whose keys are an int32
between -2^30 and 2^30, then the touch. Their scores are the same at every capacity, so they are computed once.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.policies.base import Eviction, Now, Start, renew, routed
from specmd_jax.policies.choice import Choice
from specmd_jax.schedule.demand import Demand
from specmd_jax.types import NEVER

STRETCH = 2048  # visits that are scored at once


class _Visits(NamedTuple):
    """Up to `STRETCH` visits, as a policy sees them."""

    visit: npt.NDArray[np.int32]  # [S]
    layer: npt.NDArray[np.int32]  # [S]
    pass_id: npt.NDArray[np.int32]  # [S]
    clock: npt.NDArray[np.int32]  # [S]
    reset: npt.NDArray[np.bool_]  # [S]
    demand: npt.NDArray[np.bool_]  # [S, E]
    mass: npt.NDArray[np.float32]  # [S, E]
    rank: npt.NDArray[np.int32]  # [S, E]


class Scores:
    """The scores of one policy under way, for demands that come a stretch at a time."""

    def __init__(self, eviction: Choice, layers: int, experts: int, everywhere: bool) -> None:
        """`everywhere`: scores of all experts at every visit, not only of those of the visited layer."""
        self._static = layers, experts, everywhere
        self._choice = jax.tree.map(np.asarray, eviction)
        with on_host():
            self._state = self._choice.build().init(_start(layers, experts))

    def draw(self, demand: Demand, first_visit: int) -> npt.NDArray[np.int32]:
        """Gives [V, E] (or [V, L * E]) scores after each of up to `STRETCH` visits that follow those drawn so far."""
        count = demand.layer.size
        visits = _padded(demand, first_visit, self._static[1])
        with on_host():
            self._state, scores = _draw(self._static, self._choice, self._state, visits, jnp.int32(count))
        return np.asarray(scores)[:count]


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Runs on the host, where small steps in a row are faster; without its backend, wherever arrays are."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _start(layers: int, experts: int) -> Start:
    return Start(jnp.full((layers, experts), NEVER, jnp.int32))  # only oracles look at it


def _padded(demand: Demand, first_visit: int, experts: int) -> _Visits:
    count, used = demand.layer.size, np.diff(demand.start)
    row = np.repeat(np.arange(count), used)
    expert = demand.flat % experts
    shape = STRETCH, experts
    visits = _Visits(
        visit=np.arange(first_visit, first_visit + STRETCH, dtype=np.int32),
        layer=np.zeros(STRETCH, np.int32),
        pass_id=np.zeros(STRETCH, np.int32),
        clock=np.zeros(STRETCH, np.int32),
        reset=np.zeros(STRETCH, np.bool_),
        demand=np.zeros(shape, np.bool_),
        mass=np.zeros(shape, np.float32),
        rank=np.full(shape, -1, np.int32),
    )
    for name in ("layer", "pass_id", "clock", "reset"):
        getattr(visits, name)[:count] = getattr(demand, name)
    visits.demand[row, expert] = True
    visits.mass[row, expert] = demand.mass
    visits.rank[row, expert] = np.arange(row.size) - demand.start[row]
    return visits


@partial(jax.jit, static_argnums=0)
def _draw(
    static: tuple[int, int, bool],
    choice: Choice,
    state: Any,
    visits: _Visits,
    count: jax.Array,
) -> tuple[Any, jax.Array]:
    layers, experts, everywhere = static
    policy: Eviction = choice.build()
    given = jax.tree.map(jnp.asarray, visits)

    def visit(i: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        state, scores = carry
        at = jax.tree.map(lambda column: column[i], given)
        now = Now(at.visit, at.layer, at.pass_id, layers)
        state = jax.lax.cond(
            at.reset, lambda old: renew(policy, old, policy.init(_start(layers, experts))), lambda old: old, state
        )
        # what residency decides is not known: a policy that reads it is not one of these
        use = routed(now, at.demand, at.mass)._replace(
            touch=at.clock + at.rank, end_touch=at.clock + jnp.sum(at.demand, dtype=jnp.int32)
        )
        state = policy.observe(state, use)

        def row(layer: jax.Array) -> jax.Array:
            score, _ = policy.keep(jax.tree.map(lambda table: table[layer], state), now, layer)
            assert score.dtype == jnp.int32, choice.name
            return score

        found = jax.vmap(row)(jnp.arange(layers)).reshape(-1) if everywhere else row(at.layer)
        return state, scores.at[i].set(found)

    width = layers * experts if everywhere else experts
    return jax.lax.fori_loop(0, count, visit, (state, jnp.zeros((STRETCH, width), jnp.int32)))
