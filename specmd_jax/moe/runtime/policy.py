"""Residency decided by the simulator's own step, one visit at a time: what a running model asks before it copies.

A `Keeper` feeds `specmd_jax.replay.step.step` the visits of a model as they happen, so a runtime that obeys it has,
event for event, what `specmd_jax.engines.scan.simulate` finds on the recorded trace. The step runs on the host's CPU
whatever the accelerator, and keeps no seconds: prefetching is limited by the number of experts that the selection asks
for.

Experts stored at several precisions weigh what they take: the simulator derives a precision's bytes from its bits, a
`Policy` has those of the store, scales included.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.api import make_mix, parse, replay_options
from specmd_jax.engines.prepared import (
    Choice,
    Mix,
    Replays,
    Sizes,
    native_bits,
    needs_logits,
    policies,
    prepare,
    work,
)
from specmd_jax.engines.scan import replay_many
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.policies import PREFETCH
from specmd_jax.replay import totals as tally
from specmd_jax.replay.step import Numbers, Setup, State, Visit, begin, step
from specmd_jax.replay.totals import Events
from specmd_jax.specs.capacity import Budget
from specmd_jax.types import NEVER, Trace

_SCALARS = ("index", "layer", "pass_id", "tokens", "decode")


class Gate(NamedTuple):
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


class Policy(NamedTuple):
    """A cache policy with its numbers, checked for a model."""

    mix: Mix
    setup: Setup
    budget: Budget
    sizes: Sizes
    options: dict[str, Any]

    @property
    def horizon(self) -> int:
        return self.setup.horizon

    @property
    def needs_ahead(self) -> bool:
        return self.mix.prefetch == "gate_ahead"

    @property
    def needs_logits(self) -> bool:
        return needs_logits(self.mix.choices())

    def replay(self, trace: Trace, **schedule: Any) -> tuple[Replays, Events]:
        """`simulate` on a recorded trace under this policy: the untimed events, one row a visit."""
        replays = _with_sizes(prepare(trace, logits=self.needs_logits, **schedule), self.sizes)
        choices = self.mix.choices()
        setup = replays.setup(choices, None, **self.options)._replace(detail="full")
        visits, numbers = replays.visits(setup, choices), replays.numbers(self.budget, None)
        _, events = replay_many(setup, choices, (), numbers, self.mix.traced(), visits)
        assert events is not None
        return replays, jax.tree.map(lambda x: np.asarray(x)[: replays.schedule.visits], events)


def stored_sizes(level_bytes: Sequence[int], layers: int) -> Sizes:
    """Sizes of experts that take ``level_bytes`` [Q] in each of L layers, by rising precision."""
    unit, rising = math.gcd(*level_bytes), [0, *level_bytes]
    if any(a >= b for a, b in itertools.pairwise(rising)):
        raise SpecmdError(f"an expert takes {list(level_bytes)} bytes at its precisions, expected rising numbers")
    units = np.repeat(np.array(rising, np.int64)[:, None] // unit, layers, axis=1).astype(np.int32)
    return Sizes(unit, units, np.repeat(np.array(level_bytes, np.int64)[:, None], layers, axis=1))


def _with_sizes(replays: Replays, sizes: Sizes) -> Replays:
    """The same with experts that take what the store says."""
    trace = replays.trace
    return dataclasses.replace(replays, sizes=sizes, work=work(trace, sizes.level_bytes, native_bits(trace)))


def make_policy(
    cfg: MoEConfig,
    expert_bytes: int | Sequence[int],
    eviction: str = "lru",
    capacity: str | int = "25%",
    *,
    miss: str = "fetch",
    scope: str = "global",
    prefetch: str = "none",
    selection: str = "topk",
    overfetch: float = 1.0,
    percentile: float = 80.0,
    horizon: int = 1,
    may_evict: bool = True,
    numbers: Mapping[str, Any] | None = None,
) -> Policy:
    """Names and numbers as those of `specmd_jax.run`.

    Args:
        expert_bytes: of one expert; at several precisions, by rising bits. Capacities count experts at the highest.
    Raises:
        SpecmdError: what `run` refuses, a miss rule without the precisions that it needs among it; an oracle (a running
            model has no future to look into); a capacity that does not hold one expert.
    """
    level_bytes = (expert_bytes,) if isinstance(expert_bytes, int) else tuple(expert_bytes)
    layers, seen = len(cfg.moe_layers), np.zeros((1, len(cfg.moe_layers), cfg.experts), np.float32)
    blank = Trace(
        expert_ids=np.broadcast_to(np.arange(cfg.top_k, dtype=np.int32), (1, layers, cfg.top_k)),
        lengths=np.ones(1, np.int32),
        prompt_lengths=np.zeros(1, np.int32),
        experts=cfg.experts,
        expert_bytes=np.full(layers, level_bytes[-1], np.int64),
        ahead=seen,
        logits=seen,
        meta={"model": cfg.family},
    )
    mix = make_mix(
        blank, eviction=eviction, prefetch=prefetch, selection=selection, miss=miss, overfetch=overfetch,
        percentile=percentile, numbers=numbers,
    )  # fmt: skip
    predictor = PREFETCH[prefetch]
    if policies(mix.choices(), mix.traced()).eviction.oracle:
        raise SpecmdError(f"eviction {eviction!r} looks into the future, which a running model does not have")
    if predictor is not None and predictor().needs not in (None, "ahead"):
        raise SpecmdError(f"prefetch {prefetch!r} looks into the future, which a running model does not have")
    options = replay_options(horizon=horizon, may_evict=may_evict)
    sizes = stored_sizes(level_bytes, layers)
    replays = _with_sizes(prepare(blank, logits=needs_logits(mix.choices())), sizes)
    setup = replays.setup(mix.choices(), None, **options)._replace(detail="full")
    return Policy(mix, setup, parse(blank, capacity, scope), sizes, options)


class Keeper:
    """The cache's state over the visits of a run; see the module. Not for several threads."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self._cpu = jax.local_devices(backend="cpu")[0]
        # committed to the CPU, and with them every step: an accelerator would take longer to start than to decide
        self._numbers = jax.device_put(numbers_of(policy), self._cpu)
        self._traced = jax.device_put(policy.mix.traced(), self._cpu)
        self._choices = policy.mix.choices()
        self.reset()

    @property
    def slots(self) -> int:
        """Experts at the highest precision that the budget holds, over all layers."""
        return slots_of(self.policy, self._numbers)

    def reset(self) -> None:
        """Empties the cache and the policies' memory, for a run of its own."""
        self._state = begin_state(self.policy.setup, self._choices, self._numbers, self._traced)
        self._index = 0

    def visit(self, layer: int, pass_id: int, decode: bool, gate: Gate) -> Decision:
        """Decides one visit and moves on: passes count from 0, and each visits the MoE layers in order."""
        return read(self.start(layer, pass_id, decode, gate))

    def start(self, layer: int, pass_id: int, decode: bool, gate: Gate) -> Decision:
        """The same without waiting: arrays of the CPU's device, which may still be at work; `read` waits."""
        whole, real = _columns(gate, self.policy.setup.experts, self.policy.needs_logits)
        whole[: len(_SCALARS)] = (self._index, layer, pass_id, gate.ids.shape[0], decode)
        self._index += 1
        self._state, decision = _step(
            self.policy.setup, self._choices, self._numbers, self._traced, self._state, whole, real
        )
        return decision


def read(decision: Decision) -> Decision:
    """A decision in numpy."""
    return Decision(*map(np.asarray, decision))


def _columns(gate: Gate, experts: int, logits: bool = False) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
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


def numbers_of(policy: Policy) -> Numbers:
    """What the step reads beside the policies' numbers (numpy); units as in `Policy.sizes`."""
    never: Any = np.full((policy.setup.layers, policy.setup.experts), NEVER, np.int32)
    budget: Any = policy.sizes.budget(policy.budget)
    units: Any = policy.sizes.units
    return Numbers(budget, units, never)


def slots_of(policy: Policy, numbers: Numbers) -> int:
    """Experts at the highest precision that the budget holds, over all layers."""
    budget = np.asarray(numbers.budget) // np.asarray(numbers.units)[-1, 0]
    return int(np.minimum(budget, policy.setup.experts).sum()) if budget.ndim else int(budget)


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin_state(setup: Setup, choices: tuple[Choice, ...], numbers: Numbers, traced: Any) -> State:
    """The state before the first visit."""
    return begin(setup, policies(choices, traced), numbers)


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


def decide(
    setup: Setup, choices: tuple[Choice, ...], numbers: Numbers, traced: Any, state: State, seen: Seen
) -> tuple[State, Decision]:
    """One step of the simulator, to be traced: on the host by a `Keeper`, or inside a model's own program."""
    experts, levels, yes = setup.experts, numbers.units.shape[0] - 1, jnp.asarray(True)
    if dict((axis, name) for axis, name, _ in choices)["miss"] == "fetch":  # nothing reads the order of the demand
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
    totals = tally.nothing(setup.layers, levels)
    state, _, events = step(setup, policies(choices, traced), numbers, state, totals, visit)
    prefetched = jnp.zeros((setup.horizon, experts), jnp.int32) if events.prefetched is None else events.prefetched
    assert events.level is not None
    return state, Decision(
        events.level, events.outcome, events.collision, events.evictions, prefetched, events.row, events.instead
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _step(
    setup: Setup,
    choices: tuple[Choice, ...],
    numbers: Numbers,
    traced: Any,
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
    return decide(setup, choices, numbers, traced, state, seen)
