"""Times of what takes microseconds: many of it inside one program, as the fused engine runs it.

A launch takes the host longer than some kernels take the device, so nothing is timed launch by launch. A loop's state
goes from iteration to iteration, and from program to program: nothing can be left out or be done before its turn. Its
arrays are given away, as the engine's are. What starting a program takes is shared out among `CALLS` times the
iterations of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.common.timing import median_s
from specmd_jax.moe.fused.program import GRAPHS
from specmd_jax.moe.runtime.store import DEVICE, sharding

CALLS = 4
"""Programs in a row whose end is waited for."""

OTHERS = 8
"""Slots between those of a layer's expert in one round over the layers and the next."""

# a program of few launches, too, is one graph, as a pass of many is
COMPILED = GRAPHS | {"xla_gpu_graph_min_graph_size": "1"}

Step = Callable[[Any, Any, "Place"], Any]
"""(what it reads, state, place) -> state"""


class Place(NamedTuple):
    """Where an iteration is, as the engine's loop over layers knows it."""

    number: jax.Array  # [] int32, of the iteration
    layer: jax.Array  # [] int32
    slot: jax.Array  # [E] int32 of the layer's experts, other ones in each round over the layers


class Loop:
    """A program of ``times`` steps over the layers in turn. What the step reads may change from call to call.

    Attributes:
        steps: of all programs in a row.
        state: what they left, for other loops to go on with.
    """

    def __init__(self, step: Step, state: Any, times: int, layers: int, experts: int):
        def place(number: jax.Array) -> Place:
            layer, expert = number % layers, jnp.arange(experts, dtype=jnp.int32)
            # others in the next round: what was read a moment ago would come out of the device's cache
            return Place(number, layer, layer * experts + (expert + number // layers * OTHERS) % experts)

        def program(given: Any, state: Any) -> Any:
            # as in the engine: a number of iterations that the compiler knows, and host arrays that it follows inside
            return lax.fori_loop(
                jnp.int32(0), jnp.int32(times), lambda number, state: step(given, state, place(number)), state
            )

        self._program, self.steps = (
            jax.jit(program, donate_argnums=1, compiler_options=COMPILED),
            CALLS * times,
        )
        self.state = jax.device_put(state, sharding(DEVICE))  # as what a program leaves, so that it is compiled once

    def seconds(self, given: Any, repeats: int) -> float:
        """Gives the median seconds of one step."""
        return median_s(lambda: self.run(given), repeats, unmeasured=2) / self.steps

    def run(self, given: Any) -> Any:
        """Starts `steps` steps and gives the state that they will leave."""
        for _ in range(CALLS):
            self.state = self._program(given, self.state)
        return self.state

    def kernels(self, given: Any) -> int:
        """Counts the Pallas kernels of one step."""
        return _count(self._program.trace(given, self.state).jaxpr.jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(
        1 if eqn.primitive.name == "pallas_call" else sum(map(_count, _inside(list(eqn.params.values()))))
        for eqn in jaxpr.eqns
    )


def _inside(values: list[Any]) -> Iterator[Any]:
    """Gives the programs among the parameters of an operation."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _inside(list(value))
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
