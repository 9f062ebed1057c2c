"""What a replay is given, what it remembers from visit to visit, and how it begins.

`Setup` and the policies' code are static (one compile each); everything in `Numbers` and every number a policy is
closed over is traced, so a `vmap` over any of them is a sweep. State that does not depend on a swept number stays
unbatched: under a vmap over capacities the recency table of `lru` is one table, and under a vmap over hardware a
residency without prefetch is one residency.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int8, Int32

from specmd_jax.policies.base import Policies, Size, Start, renew
from specmd_jax.replay.make_room import Cache
from specmd_jax.replay.start import Held, held_by, units_of, warm
from specmd_jax.replay.timing import Costs
from specmd_jax.trace.profile import Profile


class Tier(NamedTuple):
    """How host memory stands between storage and the device (static)."""

    uses: bool = False  # its policy hears all uses, not only what the device asks it for
    exclusive: bool = False  # what moves to the device leaves it, and what the device evicts enters it
    to_host: bool = False  # predictions are read into it, and not copied to the device


class Setup(NamedTuple):
    """Static choices: they decide shapes and code (hashable)."""

    layers: int
    experts: int
    top_k: int
    hold: bool = False  # oversize="hold" instead of "stream"
    horizon: int = 1
    may_evict: bool = True  # prefetching may make room
    timed: bool = True  # False: no seconds, and prefetching is not limited by time
    resets: bool = False  # the schedule empties the cache somewhere
    detail: str = "totals"  # "events": also Events of each visit; "full": with the residency after each
    warm_start: Profile | None = None  # the cache begins with its most used experts; None: empty
    tier: Tier | None = None  # None: all experts are in host memory

    @property
    def tiers(self) -> tuple[bool, bool]:
        """Whether there is a host tier, and whether predictions go no further."""
        return self.tier is not None, self.tier is not None and self.tier.to_host


class Numbers(NamedTuple):
    """Everything numeric that is not a policy's own."""

    budget: Int32[Array, " *pools"]  # units: a scalar for one pool, [L] for a pool per layer
    units: Int32[Array, "levels L"]  # what an expert takes at each of the Q + 1 levels; row 0 (absent) is 0
    first_use: Int32[Array, "L E"]
    costs: Costs | None = None  # None only when `Setup.timed` is False
    host_budget: Int32[Array, " *host_pools"] | None = None  # of the host tier, as `budget`; None only without one

    @property
    def pooled(self) -> bool:
        """Whether all layers share one pool."""
        return self.budget.ndim == 0

    def budget_of(self, layer: Int32[Array, ""]) -> Int32[Array, ""]:
        """Gives the budget, in units, of the pool that a layer belongs to."""
        return self.budget if self.pooled else self.budget[layer]

    def of_host(self) -> Numbers:
        """Gives the same of the host tier, which holds whole experts: one level, the highest."""
        assert self.host_budget is not None
        return self._replace(budget=self.host_budget, units=jnp.stack([self.units[0], self.units[-1]]))

    def of_storage(self) -> Numbers:
        """Gives the same of the host tier, what is copied into it being read from storage."""
        host, costs = self.of_host(), self.costs
        if costs is None:
            return host
        assert costs.read_s is not None
        return host._replace(costs=costs._replace(copy_s=jnp.broadcast_to(costs.read_s, costs.copy_s.shape)))


class Cell(NamedTuple):
    """All that one replay is given besides its visits."""

    setup: Setup
    policies: Policies
    numbers: Numbers


class Visit(NamedTuple):
    """One visit; a stretch of a schedule has a leading V axis on every leaf. Meanings as in `types.Schedule`."""

    index: Int32[Array, " *visits"]  # pyright: ignore[reportIncompatibleMethodOverride]
    layer: Int32[Array, " *visits"]
    pass_id: Int32[Array, " *visits"]
    tokens: Int32[Array, " *visits"]
    decode: Bool[Array, " *visits"]
    starts_pass: Bool[Array, " *visits"]
    ends_layer: Bool[Array, " *visits"]
    reset: Bool[Array, " *visits"]
    counted: Bool[Array, " *visits"]
    count: Int32[Array, " *visits E"]  # pyright: ignore[reportIncompatibleMethodOverride]
    mass: Float32[Array, " *visits E"]
    rank: Int32[Array, " *visits E"]
    next_use: Int32[Array, " *visits E"]
    by_mass: Int32[Array, " *visits M"]
    ahead: Float32[Array, " *visits E"] | None = None
    future: Float32[Array, " *visits H E"] | None = None
    logits: Float32[Array, " *visits t E"] | None = None
    drafting_s: Float32[Array, " *visits 2"] | None = None
    turns: Int32[Array, " *visits"] | None = None

    @property
    def demand(self) -> Bool[Array, " *visits E"]:
        """Which experts the visit's tokens route to."""
        return self.count > 0


class Flight(NamedTuple):
    """A link as the next gate finds it. At most one prefetch can be in flight at a gate: the last one started."""

    link_s: Float32[Array, ""]  # seconds from the gate until the link is free
    expert: Int32[Array, ""]  # flat id of the copy in flight (-1: none)
    pinned_layer: Int32[Array, ""]  # where the previous visit's copy in flight pinned an expert

    def of(self, layer: Int32[Array, ""], experts: int) -> Bool[Array, " E"]:
        """Says which expert of a layer is in flight, if one is."""
        return (self.expert == layer * experts + jnp.arange(experts, dtype=jnp.int32)) & (self.link_s > 0)

    def layer_of(self, experts: int, otherwise: Int32[Array, ""]) -> Int32[Array, ""]:
        """Gives the layer of the copy in flight, or another one."""
        return jnp.where(self.expert < 0, otherwise, self.expert // experts)


class Early(NamedTuple):
    """What a host tier remembers of reads ahead that go no further."""

    flight: Flight  # on the storage link
    fresh: Int8[Array, "L E"]  # was read ahead and is unused; as `State.fresh`


class HostTier(NamedTuple):
    """Host memory as a cache in front of storage."""

    cache: Cache  # level 1: the whole expert is there
    eviction: Any
    storage_s: Float32[Array, ""]  # seconds from the gate until the storage link is free
    early: Early | None = None  # where predictions are read into it


class Open(NamedTuple):
    """The demand of a (pass, layer), gathered over its visits: one in the event contract, one per expert in the
    sequential ones.
    """

    demand: Bool[Array, " E"]
    mass: Float32[Array, " E"]
    closed: Bool[Array, ""]  # complete


class State(NamedTuple):
    """What the next visit needs."""

    cache: Cache
    clock: Int32[Array, ""]  # demanded experts so far, plus visits
    layer: Int32[Array, ""]  # the previous visit's
    gate: Open
    flight: Flight
    eviction: Any
    prefetch: Any
    selection: Any
    routing: Any
    fresh: Int8[Array, "L E"]  # came in by prefetch and is unused; 1 outside, 2 inside the counted visits
    predicted: Bool[Array, "L E"]  # the last selection for each layer
    admission: Any = ()
    held: Held | None = None  # what the eviction policy's pins keep for good
    host: HostTier | None = None


def begin(setup: Setup, policies: Policies, numbers: Numbers) -> State:
    """Gives the state before the first visit: a cache that is empty but for pins and a warm start."""
    shape = setup.layers, setup.experts
    size = Size(*shape, setup.horizon)
    prefetch, selection, routing = policies.prefetch, policies.selection, policies.routing
    cache = Cache(
        level=jnp.zeros(shape, jnp.int8),
        used=jnp.zeros(setup.layers, jnp.int32),
        best=jnp.full(setup.layers, -1, jnp.int32),
        evicted=jnp.full(shape, -1, jnp.int32),
    )
    cache, held = _filled(setup, policies, numbers, cache)
    rank = None if setup.warm_start is None else jnp.asarray(setup.warm_start.rank)
    return State(
        cache=cache,
        clock=jnp.int32(0),
        layer=jnp.int32(0),
        gate=Open(jnp.zeros(setup.experts, bool), jnp.zeros(setup.experts), jnp.asarray(True)),
        flight=Flight(jnp.float32(0), jnp.int32(-1), jnp.int32(0)),
        eviction=policies.eviction.init(Start(numbers.first_use, rank)),
        prefetch=prefetch.init(size) if prefetch else (),
        selection=selection.init(size) if selection else (),
        routing=routing.init(setup.layers) if routing else (),
        fresh=jnp.zeros(shape, jnp.int8),
        predicted=jnp.zeros(shape, bool),
        admission=policies.admission.init() if policies.admission and policies.admission.init else (),
        held=held,
        host=None if setup.tier is None else _host_filled(setup.tier, policies, numbers, cache.level),
    )


def _host_filled(tier: Tier, policies: Policies, numbers: Numbers, on_device: Int8[Array, "L E"]) -> HostTier:
    """Gives a host tier with as many experts as fit: the first of every layer, then the second, and so on. An exclusive
    one passes over those that the device begins with.
    """
    assert policies.host_eviction is not None
    host, (layers, experts) = numbers.of_host(), numbers.first_use.shape
    units = jnp.broadcast_to(host.units[1][None], (experts, layers))
    if tier.exclusive:
        units = jnp.where(on_device.T > 0, 0, units)
    if host.pooled:
        fits = jnp.cumsum(units.reshape(-1), dtype=jnp.int32).reshape(experts, layers) <= host.budget
    else:
        fits = jnp.cumsum(units, axis=0, dtype=jnp.int32) <= host.budget[None]
    if tier.exclusive:
        fits &= on_device.T == 0
    early = None
    if tier.to_host:
        nothing = Flight(jnp.float32(0), jnp.int32(-1), jnp.int32(0))
        early = Early(nothing, jnp.zeros((layers, experts), jnp.int8))
    return HostTier(
        cache=Cache(
            level=fits.T.astype(jnp.int8),
            used=jnp.sum(jnp.where(fits, units, 0), axis=0, dtype=jnp.int32),
            best=jnp.full(layers, -1, jnp.int32),
            evicted=jnp.full((layers, experts), -1, jnp.int32),
        ),
        eviction=policies.host_eviction.init(Start(numbers.first_use)),
        storage_s=jnp.float32(0),
        early=early,
    )


def _filled(setup: Setup, policies: Policies, numbers: Numbers, empty: Cache) -> tuple[Cache, Held | None]:
    """Gives the cache with what pins keep, and with what a warm start puts beside it."""
    pins, profile, top = policies.eviction.pins, setup.warm_start, numbers.units[-1]
    held = None if pins is None else held_by(pins, top, setup.experts, numbers.budget)
    if profile is not None:
        which = warm(profile, top, setup.experts, numbers.budget, held)
        which = which if held is None else which | held.which
    elif held is not None:
        which = held.which
    else:
        return empty, None
    level = jnp.where(which, jnp.int8(numbers.units.shape[0] - 1), jnp.int8(0))
    return empty._replace(level=level, used=units_of(which, top)), held


def empty(setup: Setup, policies: Policies, numbers: Numbers, old: State) -> State:
    """Gives a new beginning: all but the time, the links' last copies, and what policies say they carry over."""
    state = begin(setup, policies, numbers)
    state = state._replace(
        eviction=renew(policies.eviction, old.eviction, state.eviction),
        prefetch=renew(policies.prefetch, old.prefetch, state.prefetch) if policies.prefetch else (),
        flight=state.flight._replace(link_s=old.flight.link_s),
        layer=old.layer,
    )
    if state.host is None or old.host is None or policies.host_eviction is None:
        return state
    kept = renew(policies.host_eviction, old.host.eviction, state.host.eviction)
    host = state.host._replace(eviction=kept, storage_s=old.host.storage_s)
    if host.early is not None:
        early = host.early
        host = host._replace(early=early._replace(flight=early.flight._replace(link_s=old.host.storage_s)))
    return state._replace(host=host)
