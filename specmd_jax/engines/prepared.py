"""A trace under one schedule, ready to be replayed by any policies, budget and hardware."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.engines.sizes import Sizes, native_bits, sizes, work
from specmd_jax.engines.visits import Ahead, columns, padded
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import Mix
from specmd_jax.programs import room_for_programs
from specmd_jax.replay.state import Numbers, Setup, Visit
from specmd_jax.replay.storage import with_reads
from specmd_jax.replay.timing import Costs, Work, costs
from specmd_jax.schedule.build import build_schedule
from specmd_jax.schedule.demand import Demand, pack
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.types import NEVER, Schedule, Trace


@dataclass(frozen=True)
class Prepared:
    """What no policy, budget or hardware decides."""

    trace: Trace
    schedule: Schedule
    sizes: Sizes
    work: Work

    @cached_property
    def first_use(self) -> npt.NDArray[np.int32]:
        """[L, E]: the first visit that demands each expert."""
        first = np.full((self.schedule.layers, self.schedule.experts), NEVER, np.int32)
        visit, expert = np.nonzero(self.schedule.count)
        np.minimum.at(first, (self.schedule.layer[visit], expert), visit.astype(np.int32))
        return first

    @cached_property
    def demand(self) -> Demand:
        """The demand as the curves read it."""
        return pack(self.schedule)

    @property
    def bits(self) -> tuple[float, ...]:
        """The stored precisions, ascending."""
        native = native_bits(self.trace)
        level = self.sizes.level_bytes.sum(axis=1) / self.trace.expert_bytes.sum()
        return tuple(float(native * share) for share in level)

    def numbers(self, budget: Budget, hardware: Hardware | None, host_budget: Budget | None = None) -> Numbers:
        """Gives the traced numbers of one cell; `host_budget` is that of the host tier, if there is one."""
        return Numbers(
            budget=jnp.asarray(self.sizes.budget(budget)),
            units=jnp.asarray(self.sizes.units),
            first_use=jnp.asarray(self.first_use),
            costs=self.costs(hardware, reads=host_budget is not None),
            host_budget=None if host_budget is None else jnp.asarray(self.sizes.budget(host_budget)),
        )

    def costs(self, hardware: Hardware | None, reads: bool = False) -> Costs | None:
        """Gives the seconds of what a visit does on a machine, with those of `reads` if asked; None without one."""
        if hardware is None:
            return None
        found = costs(hardware, self.work)
        if reads:
            found = with_reads(found, hardware, self.work)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)

    def setup(self, mix: Mix, hardware: Hardware | None, **options: Any) -> Setup:
        """Gives the static choices; raises SpecmdError for policies that make no sense on this trace.

        Whatever compiles a replay asks for them first, so programs of earlier ones are let go here if they are too
        many.
        """
        room_for_programs()
        found = check(self.trace, len(self.sizes.level_bytes), mix, hardware, **options)
        if mix.declared().needs_logits and self.schedule.logits is None:
            raise SpecmdError(f"{_reader(mix)!r} needs the router's full logits: prepare the trace with logits=True")
        return found._replace(resets=bool(self.schedule.reset.any()))

    def visits(self, setup: Setup, mix: Mix) -> Visit:
        """Gives every column the scan reads (numpy), padded so that traces of similar length share a compile."""
        found = self.columns(setup, mix, self.schedule.most)
        count = self.schedule.visits
        block = 1 << max(6, (count - 1).bit_length() - 3)
        return padded(found, -count % block)

    def columns(self, setup: Setup, mix: Mix, most: int, ahead: Ahead | None = None) -> Visit:
        """Gives them without padding, for visits that demand at most `most` experts; `ahead` as for `future_mass`."""
        return columns(self.schedule, mix.declared(), setup.horizon, most, ahead)


def check(trace: Trace, levels: int, mix: Mix, hardware: Hardware | None, **options: Any) -> Setup:
    """Gives the static choices of a replay of `trace` (its head is enough) with `levels` stored precisions.

    Raises SpecmdError for policies that make no sense on this trace. `options` are the rest of `Setup`.
    """
    policies, horizon = mix.declared(), options.get("horizon", 1)
    for what, profile in (
        ("warm_start", options.get("warm_start")),
        (f"eviction {mix.eviction.name!r}", policies.eviction.pins and policies.eviction.pins.profile),
    ):
        if profile is not None:
            profile.check(what, trace.layers, trace.experts)
    if horizon != int(horizon) or not 1 <= horizon < max(2, trace.layers):
        raise SpecmdError(
            f"horizon is {horizon}, expected 1..{max(1, trace.layers - 1)}: a layer is not ahead of itself"
        )
    prefetch = policies.prefetch
    if prefetch is not None:
        if prefetch.needs == "ahead" and trace.ahead is None:
            raise SpecmdError(
                f"prefetch {mix.prefetch.name!r} needs a trace with `ahead` scores, and this one has none"
            )
        if prefetch.most_horizon is not None and horizon > prefetch.most_horizon:
            ahead = "one layer" if prefetch.most_horizon == 1 else f"at most {prefetch.most_horizon} layers"
            raise SpecmdError(f"prefetch {mix.prefetch.name!r} looks {ahead} ahead, not horizon {horizon}")
    if policies.needs_logits and trace.logits is None:
        raise SpecmdError(f"{_reader(mix)!r} needs a trace with the router's full logits, and this one has none")
    if levels < policies.miss.least_levels:
        raise SpecmdError(
            f"miss {mix.miss.name!r} copies some experts at a lower precision, and that precision is not stored: "
            "expected at least two precisions, such as (4, 16)"
        )
    if policies.miss.divides and hardware is None:
        raise SpecmdError(f"miss {mix.miss.name!r} divides misses by time, and without hardware there are no seconds")
    if policies.routing is not None and policies.eviction.oracle:
        raise SpecmdError(
            f"eviction {mix.eviction.name!r} knows the recorded routing, which routing {mix.routing.name!r} changes"
        )
    if policies.host_eviction is not None:
        if policies.host_eviction.pins is not None:
            raise SpecmdError(
                f"host_eviction {mix.host_eviction.name!r} keeps some experts for good: expected a policy without pins"
            )
        if policies.routing is not None and policies.host_eviction.oracle:
            raise SpecmdError(
                f"host_eviction {mix.host_eviction.name!r} knows the recorded routing, which routing "
                f"{mix.routing.name!r} changes"
            )
    return Setup(layers=trace.layers, experts=trace.experts, top_k=trace.top_k, timed=hardware is not None, **options)


def _reader(mix: Mix) -> str:
    """Gives the policy that reads logits."""
    return mix.routing.name if mix.declared().routing is not None else mix.miss.name


def prepare(
    trace: Trace,
    *,
    precisions: tuple[float, ...] | None = None,
    logits: bool = False,
    context: int = 0,
    **schedule: Any,
) -> Prepared:
    """Builds the schedule (options of `build_schedule`) and everything that does not depend on the policies.

    `context` are the tokens that each request of a decode pass attends to.
    """
    bits = native_bits(trace)
    found = sizes(trace.expert_bytes, trace.experts, precisions, bits)
    built = build_schedule(
        trace, with_logits=logits and trace.logits is not None, with_ahead=trace.ahead is not None, **schedule
    )
    return Prepared(trace, built, found, work(trace, found.level_bytes, bits, context))
