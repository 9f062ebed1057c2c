"""Decides residency by the simulator's own step, one visit at a time: a running model asks it before it copies.

A `Decider` feeds `specmd_jax.replay.step.step` the visits of a model as they happen, so a runtime that obeys it has,
event for event, what `specmd_jax.engines.scan.simulate` finds on the recorded trace. It runs on the host's CPU whatever
the accelerator; `decide` is the same step, to be traced inside a model's own program. No clock runs here: prefetching
is limited by the number of experts that the selection asks for.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.runtime.policy import Policy, numbers_of, slots_of
from specmd_jax.policies.choice import Choice, Mix
from specmd_jax.replay import totals
from specmd_jax.replay.routing import Chosen, choose
from specmd_jax.replay.state import Numbers, Setup, State, Visit, begin
from specmd_jax.replay.step import step
from specmd_jax.types import NEVER

_SCALARS = ("index", "layer", "pass_id", "tokens", "decode")


class GateOutput(NamedTuple):
    """Routing of one pass at one MoE layer, on the host."""

    ids: npt.NDArray[np.int32]  # [N, K] by falling gate
    gates: npt.NDArray[np.float32]  # [N, K]
    ahead: npt.NDArray[np.float32] | None = None  # [N, E] probabilities of the next layer's gate; None: not computed
    logits: npt.NDArray[np.float32] | None = None  # [N, E] of the router; None: not read back


class Decision(NamedTuple):
    """What the step decided at one visit (numpy; traced inside the step)."""

    level: Any  # int8 [L, E] resident after the visit at this precision, 1 the fewest bits; 0: not resident
    outcome: Any  # int8 [E] a constant of `specmd_jax.replay.totals`
    collision: Any  # bool [E]
    evictions: Any  # int32 [L]
    prefetched: Any  # int32 [H, E] 1, 2, ... in the order in which the copies start; 0: none
    row: Any  # int8 [E] the visited layer's levels when its experts run: behind the copies, before anything leaves
    instead: Any  # int32 [E] the expert that runs in this one's place; -1: none


class Decider:
    """The cache's state over the visits of a run; see the module. Not for several threads."""

    def __init__(self, policy: Policy):
        self.policy, self._logits = policy, policy.policies.miss.needs_logits
        self._cpu = jax.local_devices(backend="cpu")[0]
        # committed to the CPU, and with them every step: an accelerator would take longer to start than to decide
        self._numbers = jax.device_put(numbers_of(policy), self._cpu)
        self._traced = jax.device_put(policy.visits.traced(), self._cpu)
        self._routing = jax.device_put(policy.mix.traced().routing, self._cpu)
        self.reset()

    @property
    def slots(self) -> int:
        """Experts at the highest precision that the budget holds, over all layers."""
        return slots_of(self.policy, self._numbers)

    def reset(self) -> None:
        """Empties the cache and the policies' memory, for a run of its own."""
        self._state = begin_state(self.policy.setup, self._numbers, self._traced)
        self._memory = jax.device_put(begin_routing(self.policy.setup.layers, self._routing), self._cpu)
        self._index = 0

    def choose(
        self, layer: int, logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Chooses the experts of the next visit by its router's logits [N, E] and by what is resident, under a policy
        that reroutes: ids and gates [N, K], which `visit` or `start` is then to be told."""
        given = self.policy.setup.top_k, self._routing, self._memory, np.int32(layer), logits
        self._memory, chosen = _choose(*given, self._state.cache.level)
        return np.asarray(chosen.ids), np.asarray(chosen.gates)

    def visit(self, layer: int, pass_id: int, decode: bool, gate: GateOutput) -> Decision:
        """Decides one visit and moves on: passes count from 0, and each visits the MoE layers in order."""
        return read(self.start(layer, pass_id, decode, gate))

    def start(self, layer: int, pass_id: int, decode: bool, gate: GateOutput) -> Decision:
        """Does the same without waiting: gives arrays of the CPU's device, which may still be at work; `read` waits."""
        whole, real = columns(gate, self.policy.setup.experts, self._logits)
        whole[: len(_SCALARS)] = (self._index, layer, pass_id, gate.ids.shape[0], decode)
        self._index += 1
        self._state, decision = _step(self.policy.setup, self._numbers, self._traced, self._state, whole, real)
        return decision


def begin_routing(layers: int, routing: Choice) -> Any:
    """Gives what a routing policy remembers before the first visit; nothing where the router routes."""
    policy = routing.build()
    return () if policy is None else policy.init(layers)


@functools.partial(jax.jit, static_argnums=0)
def _choose(
    top_k: int, routing: Choice, memory: Any, layer: jax.Array, logits: jax.Array, level: jax.Array
) -> tuple[Any, Chosen]:
    return choose(routing.build(), memory, layer, logits, level[layer] > 0, top_k)


def read(decision: Decision) -> Decision:
    """Gives a decision in numpy."""
    return Decision(*map(np.asarray, decision))


def columns(
    gate: GateOutput, experts: int, logits: bool = False
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The columns that the schedule of the recorded trace will have for this visit (rules: CONTRACT.md section 1)."""
    whole, real = np.zeros(len(_SCALARS) + 2 * experts, np.int32), np.zeros(2 * experts, np.float32)
    count, rank = whole[len(_SCALARS) : -experts], whole[-experts:]
    mass, ahead = real[:experts], real[experts:]
    ids = gate.ids.reshape(-1)
    rank[:] = -1
    if gate.ids.shape[0] == 1:  # the same in fewer steps: a token's choices differ
        count[ids], mass[ids], rank[ids] = 1, gate.gates[0], np.arange(ids.size)
    else:
        np.add.at(count, ids, 1)
        np.add.at(mass, ids, gate.gates.reshape(-1))  # one after the other in token order, in float32
        last = np.full(experts, -1)
        last[ids] = np.arange(ids.size)  # the last of equal ids stays
        by_last = np.argsort(last, kind="stable")
        demanded = by_last[last[by_last] >= 0]
        rank[demanded] = np.arange(demanded.size)
    if gate.ahead is not None:
        for row in gate.ahead:
            ahead += row
    if not logits:
        return whole, real
    assert gate.logits is not None
    return whole, np.concatenate([real, gate.logits[0]])  # rules read those of a pass of one token only


@functools.partial(jax.jit, static_argnums=0)
def begin_state(setup: Setup, numbers: Numbers, mix: Mix) -> State:
    """Gives the state before the first visit."""
    return begin(setup, mix.build(), numbers)


class Seen(NamedTuple):
    """A visit as the step sees it: what the schedule of the recorded trace will have (CONTRACT.md section 1)."""

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layer: jax.Array
    pass_id: jax.Array
    tokens: jax.Array
    decode: jax.Array  # 0 or 1
    count: jax.Array  # [E]  # pyright: ignore[reportIncompatibleMethodOverride]
    mass: jax.Array  # [E]
    rank: jax.Array  # [E]
    ahead: jax.Array  # [E]
    logits: jax.Array | None = None  # [E] of a pass of one token, for miss rules that read them


def decide(setup: Setup, numbers: Numbers, mix: Mix, state: State, seen: Seen) -> tuple[State, Decision]:
    """Takes one step of the simulator, to be traced: on the host by a `Decider`, or inside a model's own program. Its
    routing is standard: the demand that it sees was chosen before (`replay.routing.choose`)."""
    experts, levels, yes = setup.experts, numbers.units.shape[0] - 1, jnp.asarray(True)
    policies = mix.build()
    if policies.miss.fetches_all:  # nothing reads the order of the demand
        by_mass = jnp.full(experts, -1, jnp.int32)
    else:
        by_mass = jnp.argsort(jnp.where(seen.count > 0, -seen.mass, jnp.inf), stable=True).astype(jnp.int32)
        by_mass = jnp.where(seen.count[by_mass] > 0, by_mass, -1)
    visit = Visit(
        index=seen.index,
        layer=seen.layer,
        pass_id=seen.pass_id,
        tokens=seen.tokens,
        decode=seen.decode > 0,
        starts_pass=seen.layer == 0,
        ends_layer=yes,
        reset=~yes,
        counted=yes,
        count=seen.count,
        mass=seen.mass,
        rank=seen.rank,
        next_use=jnp.full(experts, NEVER, jnp.int32),
        by_mass=by_mass,
        ahead=seen.ahead,
        logits=None if seen.logits is None else seen.logits[None],
    )
    state, _, events = step(setup, policies, numbers, state, totals.nothing(setup.layers, levels), visit)
    prefetched = jnp.zeros((setup.horizon, experts), jnp.int32) if events.prefetched is None else events.prefetched
    assert events.level is not None
    return state, Decision(
        events.level, events.outcome, events.collision, events.evictions, prefetched, events.row, events.instead
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    setup: Setup,
    numbers: Numbers,
    mix: Mix,
    state: State,
    whole: jax.Array,
    real: jax.Array,
) -> tuple[State, Decision]:
    n, experts = len(_SCALARS), setup.experts
    scalars = dict(zip(_SCALARS, whole[:n], strict=True))
    seen = Seen(
        **scalars,
        count=whole[n : n + experts],
        mass=real[:experts],
        rank=whole[n + experts :],
        ahead=real[experts : 2 * experts],
        logits=real[2 * experts :] if real.shape[0] > 2 * experts else None,
    )
    return decide(setup, numbers, mix, state, seen)
