"""Residency decided by the simulator's own step, one visit at a time: what a running model asks before it copies.

A `Keeper` feeds `specmd_jax.simulate.step` the visits of a model as they happen, so a runtime that obeys it has, event
for event, what `specmd_jax.simulate.simulate` finds on the recorded trace. The step runs on the host's CPU whatever the
accelerator, and keeps no seconds: prefetching is limited by the number of experts that the selection asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax import tally
from specmd_jax.api import make_mix, parse, replay_options
from specmd_jax.capacity import Budget
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.config import MoEConfig
from specmd_jax.plan import Choice, Mix, Replays, policies, prepare, replay_many
from specmd_jax.policies import PREFETCH
from specmd_jax.simulate import Events, Numbers, Setup, State, Visit, begin, step
from specmd_jax.types import NEVER, Trace

_SCALARS = ("index", "layer", "pass_id", "tokens", "decode")


class Gate(NamedTuple):
    """Routing of one pass at one MoE layer, on the host."""

    ids: npt.NDArray[np.int32]  # [N, K] by falling gate
    gates: npt.NDArray[np.float32]  # [N, K]
    ahead: npt.NDArray[np.float32] | None = None  # [N, E] probabilities of the next layer's gate; None: not computed


class Decision(NamedTuple):
    """What the step decided at one visit (numpy; traced inside the step)."""

    level: Any  # int8 [L, E] > 0: resident after the visit
    outcome: Any  # int8 [E] a constant of `specmd_jax.tally`
    collision: Any  # bool [E]
    evictions: Any  # int32 [L]
    prefetched: Any  # int32 [H, E] 1, 2, ... in the order in which the copies start; 0: none


class Policy(NamedTuple):
    """A cache policy with its numbers, checked for a model."""

    mix: Mix
    setup: Setup
    budget: Budget
    options: dict[str, Any]

    @property
    def horizon(self) -> int:
        return self.setup.horizon

    @property
    def needs_ahead(self) -> bool:
        return self.mix.prefetch == "gate_ahead"

    def replay(self, trace: Trace, **schedule: Any) -> tuple[Replays, Events]:
        """`simulate` on a recorded trace under this policy: the untimed events, one row a visit."""
        replays = prepare(trace, **schedule)
        choices = self.mix.choices()
        setup = replays.setup(choices, None, **self.options)._replace(detail="full")
        visits, numbers = replays.visits(setup, choices), replays.numbers(self.budget, None)
        _, events = replay_many(setup, choices, (), numbers, self.mix.traced(), visits)
        assert events is not None
        return replays, jax.tree.map(lambda x: np.asarray(x)[: replays.schedule.visits], events)


def make_policy(
    cfg: MoEConfig,
    expert_bytes: int,
    eviction: str = "lru",
    capacity: str | int = "25%",
    *,
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

    Raises:
        SpecmdError: what `run` refuses; an oracle (a running model has no future to look into); a capacity that does
            not hold one expert.
    """
    blank = Trace(
        expert_ids=np.broadcast_to(np.arange(cfg.top_k, dtype=np.int32), (1, len(cfg.moe_layers), cfg.top_k)),
        lengths=np.ones(1, np.int32),
        prompt_lengths=np.zeros(1, np.int32),
        experts=cfg.experts,
        expert_bytes=np.full(len(cfg.moe_layers), expert_bytes, np.int64),
        ahead=np.zeros((1, len(cfg.moe_layers), cfg.experts), np.float32),
        meta={"model": cfg.family},
    )
    mix = make_mix(
        blank, eviction=eviction, prefetch=prefetch, selection=selection, overfetch=overfetch, percentile=percentile,
        numbers=numbers,
    )  # fmt: skip
    predictor = PREFETCH[prefetch]
    if policies(mix.choices(), mix.traced()).eviction.oracle:
        raise SpecmdError(f"eviction {eviction!r} looks into the future, which a running model does not have")
    if predictor is not None and predictor().needs not in (None, "ahead"):
        raise SpecmdError(f"prefetch {prefetch!r} looks into the future, which a running model does not have")
    options = replay_options(horizon=horizon, may_evict=may_evict)
    replays = prepare(blank)
    setup = replays.setup(mix.choices(), None, **options)._replace(detail="full")
    return Policy(mix, setup, parse(blank, capacity, scope), options)


class Keeper:
    """The cache's state over the visits of a run; see the module. Not for several threads."""

    def __init__(self, policy: Policy, expert_bytes: int):
        self.policy = policy
        self._cpu = jax.local_devices(backend="cpu")[0]
        # committed to the CPU, and with them every step: an accelerator would take longer to start than to decide
        self._numbers = jax.device_put(numbers_of(policy, expert_bytes), self._cpu)
        self._traced = jax.device_put(policy.mix.traced(), self._cpu)
        self._choices = policy.mix.choices()
        self.reset()

    @property
    def slots(self) -> int:
        """Experts that the budget holds, over all layers."""
        return slots_of(self.policy, self._numbers)

    def reset(self) -> None:
        """Empties the cache and the policies' memory, for a run of its own."""
        self._state = begin_state(self.policy.setup, self._choices, self._numbers, self._traced)
        self._index = 0

    def visit(self, layer: int, pass_id: int, decode: bool, gate: Gate) -> Decision:
        """Decides one visit and moves on: passes count from 0, and each visits the MoE layers in order."""
        whole, real = _columns(gate, self.policy.setup.experts)
        whole[: len(_SCALARS)] = (self._index, layer, pass_id, gate.ids.shape[0], decode)
        self._index += 1
        self._state, decision = _step(
            self.policy.setup, self._choices, self._numbers, self._traced, self._state, whole, real
        )
        return jax.tree.map(np.asarray, decision)


def _columns(gate: Gate, experts: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The columns that the schedule of the recorded trace will have for this visit (rules: CONTRACT.md section 1)."""
    whole, real = np.zeros(len(_SCALARS) + 2 * experts, np.int32), np.zeros(2 * experts, np.float32)
    count, rank = whole[len(_SCALARS) : -experts], whole[-experts:]
    mass, ahead = real[:experts], real[experts:]
    ids = gate.ids.reshape(-1)
    np.add.at(count, ids, 1)
    np.add.at(mass, ids, gate.gates.reshape(-1))  # one after the other in token order, in float32
    last = np.full(experts, -1)
    last[ids] = np.arange(ids.size)  # the last of equal ids stays
    by_last = np.argsort(last, kind="stable")
    demanded = by_last[last[by_last] >= 0]
    rank[:] = -1
    rank[demanded] = np.arange(demanded.size)
    if gate.ahead is not None:
        for row in gate.ahead:
            ahead += row
    return whole, real


def numbers_of(policy: Policy, expert_bytes: int) -> Numbers:
    """What the step reads beside the policies' numbers (numpy): an expert is one unit."""
    layers = policy.setup.layers
    budget: Any = np.minimum(np.asarray(policy.budget, np.int64) // expert_bytes, 2**30).astype(np.int32)
    units: Any = np.array([[0] * layers, [1] * layers], np.int32)
    never: Any = np.full((layers, policy.setup.experts), NEVER, np.int32)
    return Numbers(budget, units, never)


def slots_of(policy: Policy, numbers: Numbers) -> int:
    """Experts that the budget holds, over all layers."""
    budget = np.asarray(numbers.budget)
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


def decide(
    setup: Setup, choices: tuple[Choice, ...], numbers: Numbers, traced: Any, state: State, seen: Seen
) -> tuple[State, Decision]:
    """One step of the simulator, to be traced: on the host by a `Keeper`, or inside a model's own program."""
    experts, yes = setup.experts, jnp.asarray(True)
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
        # the order of copies: only rules and clocks that are not used read it
        by_mass=jnp.full(experts, -1, jnp.int32),
        ahead=seen.ahead,
    )
    totals = tally.nothing(setup.layers, 1)
    state, _, events = step(setup, policies(choices, traced), numbers, state, totals, visit)
    prefetched = jnp.zeros((setup.horizon, experts), jnp.int32) if events.prefetched is None else events.prefetched
    assert events.level is not None
    return state, Decision(events.level, events.outcome, events.collision, events.evictions, prefetched)


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
        ahead=real[experts:],
    )
    return decide(setup, choices, numbers, traced, state, seen)
