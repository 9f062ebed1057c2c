"""A cache policy with its numbers, checked for a running model, and its replay on the trace that the model records.

Experts stored at several precisions weigh what they take: the simulator derives a precision's bytes from its bits, a
`Policy` has those of the store, scales included.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.engines.sizes import Sizes, in_units, native_bits, work
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.routing import check_weighs
from specmd_jax.moe.runtime.rerouting import as_routed
from specmd_jax.policies.base import FUTURES, Policies
from specmd_jax.policies.choice import Mix, choose
from specmd_jax.replay.state import Numbers, Setup
from specmd_jax.replay.totals import Events
from specmd_jax.setting import FIELDS, Setting, make_setting
from specmd_jax.specs.capacity import Budget
from specmd_jax.types import NEVER, Trace


class Policy(NamedTuple):
    """A cache policy with its numbers, checked for a model."""

    mix: Mix
    policies: Policies  # the same, built
    setup: Setup
    budget: Budget
    sizes: Sizes
    options: dict[str, Any]
    batch: int = 1  # requests decoded together

    @property
    def needs_ahead(self) -> bool:
        """Whether the predictor reads the next layer's gate on this layer's activations."""
        predictor = self.policies.prefetch
        return predictor is not None and predictor.needs == "ahead"

    @property
    def needs_logits(self) -> bool:
        """Whether routing or the miss rule reads the router's logits."""
        return self.policies.needs_logits

    @property
    def reroutes(self) -> bool:
        """Whether the policy chooses the experts, in place of the model's router."""
        return self.policies.routing is not None

    @property
    def visits(self) -> Mix:
        """What decides a visit whose experts are chosen already: the mix with standard routing."""
        return self.mix._replace(routing=choose("routing", None))

    def replay(self, trace: Trace, **schedule: Any) -> tuple[Prepared, Events]:
        """Replays a recorded trace under this policy by the scan: the untimed events, one row per visit. Requests are
        batched as the policy says, unless the ``schedule`` does. The demand of the schedule that comes with them is
        what the visits demanded, after routing."""
        schedule = {"batch": self.batch, **schedule}
        replays = _with_sizes(prepare(trace, logits=self.needs_logits, **schedule), self.sizes)
        setup = replays.setup(self.mix, None, **self.options)._replace(detail="full")
        visits, numbers = replays.visits(setup, self.mix), replays.numbers(self.budget, None)
        _, events = replay_many(setup, (), numbers, self.mix.traced(), visits)
        assert events is not None
        events = jax.tree.map(lambda x: np.asarray(x)[: replays.schedule.visits], events)
        if self.reroutes:
            routed = as_routed(replays.schedule, self.mix.routing, trace.top_k, np.asarray(events.level))
            replays = dataclasses.replace(replays, schedule=routed)
        return replays, events


def stored_sizes(level_bytes: Sequence[int], layers: int, experts: int) -> Sizes:
    """Sizes of E experts that take ``level_bytes`` [Q] in each of L layers, by rising precision."""
    if any(a >= b for a, b in itertools.pairwise([0, *level_bytes])):
        raise SpecmdError(f"an expert takes {list(level_bytes)} bytes at its precisions, expected rising numbers")
    return in_units(np.repeat(np.array(level_bytes, np.int64)[:, None], layers, axis=1), experts)


def _with_sizes(replays: Prepared, sizes: Sizes) -> Prepared:
    """Gives the same with experts that take what the store says."""
    trace = replays.trace
    return dataclasses.replace(replays, sizes=sizes, work=work(trace, sizes.level_bytes, native_bits(trace)))


OBEYED = (
    "eviction",
    "capacity",
    "scope",
    "batch",
    "prefetch",
    "selection",
    "overfetch",
    "percentile",
    "horizon",
    "may_evict",
    "miss",
    "routing",
    "numbers",
)
"""Fields of a `Setting` that a running model obeys."""


def make_policy(
    cfg: MoEConfig, expert_bytes: int | Sequence[int], setting: Setting | None = None, /, **changes: Any
) -> Policy:
    """Makes a running model's policy of a setting.

    Args:
        expert_bytes: of one expert; at several precisions, by rising bits. Capacities count experts at the highest.
        setting, changes: as in `specmd_jax.run`. Fields in `OBEYED` count; ``hardware`` is the machine at hand.
    Raises:
        SpecmdError: what `run` refuses, a miss rule without the precisions that it needs among it; an oracle (a running
            model has no future to look into); a field that says something else than what a running model does (a
            prompt in one pass); routing by the cache where the model's router would not weigh the experts that it
            chooses (`model.routing.weigh`); a capacity that does not hold one expert.
    """
    setting = make_setting(setting, **changes)
    _check_fields(setting)
    mix = setting.mix(cfg.top_k)
    policies = mix.build()
    if policies.routing is not None:
        check_weighs(cfg)
    if policies.eviction.oracle:
        raise SpecmdError(f"eviction {mix.eviction.name!r} looks into the future, which a running model does not have")
    if policies.eviction.pins is not None:
        raise SpecmdError(
            f"eviction {mix.eviction.name!r} fills the cache beforehand, which a running model does not do"
        )
    if policies.prefetch is not None and policies.prefetch.needs in FUTURES:
        raise SpecmdError(f"prefetch {mix.prefetch.name!r} looks into the future, which a running model does not have")
    level_bytes = (expert_bytes,) if isinstance(expert_bytes, int) else tuple(expert_bytes)
    blank = _blank(cfg, level_bytes[-1])
    sizes = stored_sizes(level_bytes, blank.layers, blank.experts)
    replays = _with_sizes(prepare(blank, logits=policies.needs_logits), sizes)
    setup = replays.setup(mix, None, **setting.options)._replace(detail="full")
    return Policy(mix, policies, setup, setting.budget(blank), sizes, setting.options, setting.batch)


def _check_fields(setting: Setting) -> None:
    """Refuses what a running model would not obey."""
    default = Setting()
    for name in FIELDS:
        given, own = getattr(setting, name), getattr(default, name)
        if name not in (*OBEYED, "hardware") and given != own:
            expected = "the store's own" if name == "precisions" else repr(own)
            raise SpecmdError(f"{name} is {given!r}, which a running model does not do, expected {expected}")


def _blank(cfg: MoEConfig, expert_bytes: int) -> Trace:
    """Gives a trace of one token in the model's shape: what settings are checked against."""
    layers = len(cfg.moe_layers)
    scores = np.zeros((1, layers, cfg.experts), np.float32)
    return Trace(
        expert_ids=np.broadcast_to(np.arange(cfg.top_k, dtype=np.int32), (1, layers, cfg.top_k)),
        lengths=np.ones(1, np.int32),
        prompt_lengths=np.zeros(1, np.int32),
        experts=cfg.experts,
        expert_bytes=np.full(layers, expert_bytes, np.int64),
        ahead=scores,
        logits=scores,
        meta={"model": cfg.family},
    )


def numbers_of(policy: Policy) -> Numbers:
    """Gives what the step reads beside the policies' numbers (numpy); units as in `Policy.sizes`."""
    never: Any = np.full((policy.setup.layers, policy.setup.experts), NEVER, np.int32)
    budget: Any = policy.sizes.budget(policy.budget)
    units: Any = policy.sizes.units
    return Numbers(budget, units, never)


def slots_of(policy: Policy, numbers: Numbers) -> int:
    """Gives experts at the highest precision that the budget holds, over all layers."""
    budget = np.asarray(numbers.budget) // np.asarray(numbers.units)[-1, 0]
    return int(np.minimum(budget, policy.setup.experts).sum()) if budget.ndim else int(budget)
