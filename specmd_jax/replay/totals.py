"""What a replay reports: events per visit, and integer totals over the counted visits. `metrics` takes ratios, once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int8, Int32

# Outcome of an expert at a visit.
NOT_DEMANDED, REUSED, PREFETCHED, LATE, FETCHED, DROPPED, SUBSTITUTED, HOST = range(8)
# Columns of the seconds of a visit.
VISIT_S, LATE_S, MISS_S, BUSY_S, LINK_S, HOST_S = range(6)
# Columns of the seconds of a visit's reads from storage.
STORAGE_S, READ_S = range(2)


class Classified(NamedTuple):
    """The demand of a visit by outcome: [E] bool, disjoint from `reused` to `host`."""

    demand: jax.Array
    reused: jax.Array
    prefetch_hits: jax.Array
    late: jax.Array
    fetched: jax.Array
    dropped: jax.Array
    substituted: jax.Array
    host: jax.Array
    collisions: jax.Array  # misses on experts evicted earlier in the same pass
    prefetch_used: jax.Array  # first hits on experts whose prefetch was counted
    rerouted: jax.Array  # demanded only because of the routing policy
    predicted: jax.Array  # had been selected for this visit
    predicted_right: jax.Array

    @property
    def hit(self) -> jax.Array:
        """[E] bool: on time or late"""
        return self.reused | self.prefetch_hits | self.late

    @property
    def outcome(self) -> jax.Array:
        """[E] int8, one of the constants above."""
        named = [self.reused, self.prefetch_hits, self.late, self.fetched, self.dropped, self.substituted, self.host]
        codes = jnp.arange(1, len(named) + 1, dtype=jnp.int8)
        return jnp.sum(jnp.where(jnp.stack(named, axis=-1), codes[None], jnp.int8(0)), axis=-1, dtype=jnp.int8)


class EarlyTotals(NamedTuple):
    """What became of reads ahead that go no further than host memory."""

    used: Int32[Array, " L"]  # were asked for before they left
    late: Int32[Array, " L"]  # were asked for before they were over
    skipped: Int32[Array, " L"]  # did not start for want of room


class TierTotals(NamedTuple):
    """Sums of what a host tier adds, over the counted visits."""

    reads: Int32[Array, " L"]  # demand misses of the device that host memory missed, too
    reads_ahead: Int32[Array, " L"]  # reads for prefetch copies, or into host memory
    evictions: Int32[Array, " L"]  # from host memory
    seconds: Float32[Array, "2 2"]  # (prefill, decode) x (stall by storage, storage link)
    rounding: Float32[Array, "2 2"]  # as in `Totals`
    early: EarlyTotals | None = None  # where predictions are read into host memory


class Totals(NamedTuple):
    """Sums over the counted visits."""

    experts: Classified  # [L] int32 each
    fetched_at: Int32[Array, "Q L"]  # demand copies at each precision
    runs_at: Int32[Array, "Q L"]  # expert runs on the device at each precision
    evictions: Int32[Array, " L"]
    prefetched: Int32[Array, " L"]  # prefetch copies
    lost_mass: Float32[Array, "2 L"]  # gate mass dropped, and moved to a substitute
    mass: Float32[Array, " L"]  # gate mass demanded
    seconds: Float32[Array, "2 6"]  # (prefill, decode) x (visit, late, miss, busy, link, host)
    rounding: Float32[Array, "2 6"]  # what `seconds` is short of (compensated summation)
    admitted: Int32[Array, " L"] | None = None  # demand copies that stayed; None: not counted (`Policies.selective`)
    tier: TierTotals | None = None

    def clocks(self) -> Any:
        """Gives the sums of seconds and their rounding: what a replay in stretches carries on."""
        tier = None if self.tier is None else (self.tier.seconds, self.tier.rounding)
        return self.seconds, self.rounding, tier

    def at(self, clocks: Any) -> Totals:
        """Gives the same with the sums of seconds of others, as `clocks` gives them."""
        seconds, rounding, tier = clocks
        if self.tier is not None:
            return self._replace(
                seconds=seconds, rounding=rounding, tier=self.tier._replace(seconds=tier[0], rounding=tier[1])
            )
        return self._replace(seconds=seconds, rounding=rounding)


class EarlyEvents(NamedTuple):
    """As `EarlyTotals`, of a visit."""

    used: Bool[Array, " E"]
    late: Bool[Array, " E"]
    skipped: Bool[Array, "H E"]


class TierEvents(NamedTuple):
    """What a host tier adds to a visit's events."""

    read: Bool[Array, " E"]  # misses for which storage was read, to be copied or run on the host
    # reads for prefetch copies, or into host memory; rising in the order in which they started, 0: none
    ahead: Int32[Array, "H E"]
    evictions: Int32[Array, " L"]
    seconds: Float32[Array, " 2"]
    level: Int8[Array, "L E"] | None = None  # who is in host memory after the visit, on request
    early: EarlyEvents | None = None  # where predictions are read into host memory


class Events(NamedTuple):
    """What happened at one visit; a replay stacks them along V."""

    outcome: Int8[Array, " E"]
    collision: Bool[Array, " E"]
    evictions: Int32[Array, " L"]
    seconds: Float32[Array, " 6"]
    prefetched: Int32[Array, "H E"] | None  # 1, 2, ... in the order the copies started; 0: none
    # only on request:
    level: Int8[Array, "L E"] | None = None  # after the visit
    row: Int8[Array, " E"] | None = None  # the visited layer behind its demand copies, before anything leaves
    instead: Int32[Array, " E"] | None = None  # which expert runs in this one's place (-1: none)
    # and only where routing may change them:
    count: Int32[Array, " E"] | None = None  # tokens routed to each expert  # pyright: ignore[reportIncompatibleMethodOverride]
    mass: Float32[Array, " E"] | None = None  # their gate mass
    # only on request:
    taken: Bool[Array, " E"] | None = None  # demand copies that are let in
    stream: Bool[Array, ""] | None = None  # the demand is more than the budget and passes through
    tier: TierEvents | None = None


def nothing(layers: int, levels: int, selective: bool = False, tier: bool = False, early: bool = False) -> Totals:
    """Gives the totals of no visit; `selective` as the policies declare it, `tier`: with those of a host tier, `early`:
    into which predictions are read.
    """
    row = jnp.zeros(layers, jnp.int32)
    by_level = jnp.zeros((levels, layers), jnp.int32)
    mass, seconds = jnp.zeros((2, layers)), jnp.zeros((2, HOST_S + 1))
    found = Totals(
        Classified(*[row] * len(Classified._fields)),
        by_level,
        by_level,
        row,
        row,
        mass,
        mass[0],
        seconds,
        seconds,
        row if selective else None,
    )
    if not tier:
        return found
    reads = jnp.zeros((2, 2))
    ahead = EarlyTotals(row, row, row) if early else None
    return found._replace(tier=TierTotals(row, row, row, reads, reads, ahead))


def add(
    totals: Totals,
    *,
    layer: Int32[Array, ""],
    counted: Bool[Array, ""],
    decode: Bool[Array, ""],
    experts: Classified,
    level: Int32[Array, " E"],
    runs: Int32[Array, " E"],
    evictions: Int32[Array, " L"],
    prefetched: Int32[Array, " L"],
    mass: Float32[Array, " E"],
    seconds: Float32[Array, " 6"],
    admitted: Bool[Array, " E"] | None = None,
) -> Totals:
    """Adds one visit.

    Args:
      layer, counted, decode: of the visit.
      experts: masks of the layer's experts.
      level: behind the demand copies.
      runs: tokens that each expert computes on the device.
      evictions, prefetched: copies that left and that started, by layer.
      mass: gate mass.
      seconds: in the columns above.
      admitted: demand copies that stayed, where that is counted.
    """
    at_level = level[None] == jnp.arange(1, totals.fetched_at.shape[0] + 1)[:, None]

    def number(mask: jax.Array) -> jax.Array:
        return jnp.where(counted, jnp.sum(mask, axis=-1, dtype=jnp.int32), 0)

    def at_layer(total: jax.Array, mask: jax.Array) -> jax.Array:
        return total.at[..., layer].add(number(mask))

    def mass_of(mask: jax.Array) -> jax.Array:
        return jnp.where(counted, jnp.sum(jnp.where(mask, mass, 0.0)), 0.0)

    new_seconds, rounding = _later(totals.seconds, totals.rounding, seconds, counted, decode)
    return Totals(
        experts=jax.tree.map(at_layer, totals.experts, experts),
        fetched_at=at_layer(totals.fetched_at, experts.fetched[None] & at_level),
        runs_at=at_layer(totals.runs_at, (runs > 0)[None] & at_level),
        evictions=totals.evictions + jnp.where(counted, evictions, 0),
        prefetched=totals.prefetched + jnp.where(counted, prefetched, 0),
        lost_mass=totals.lost_mass.at[:, layer].add(
            jnp.stack([mass_of(experts.dropped), mass_of(experts.substituted)])
        ),
        mass=totals.mass.at[layer].add(mass_of(experts.demand)),
        seconds=new_seconds,
        rounding=rounding,
        admitted=None if totals.admitted is None or admitted is None else at_layer(totals.admitted, admitted),
        tier=totals.tier,
    )


def add_tier(
    tier: TierTotals,
    events: TierEvents,
    *,
    layer: Int32[Array, ""],
    targets: Int32[Array, " H"],
    counted: Bool[Array, ""],
    decode: Bool[Array, ""],
) -> TierTotals:
    """Adds what a host tier did at one visit of `layer`, whose prefetch goes to the layers `targets`."""
    seconds, rounding = _later(tier.seconds, tier.rounding, events.seconds, counted, decode)

    def here(total: Int32[Array, " L"], mask: Bool[Array, " E"]) -> Int32[Array, " L"]:
        return total.at[layer].add(jnp.sum(mask & counted, dtype=jnp.int32))

    def ahead(total: Int32[Array, " L"], mask: Bool[Array, "H E"]) -> Int32[Array, " L"]:
        return total.at[targets].add(jnp.sum(mask & counted, axis=1, dtype=jnp.int32))

    early = tier.early
    if early is not None and events.early is not None:
        own = events.early
        early = EarlyTotals(here(early.used, own.used), here(early.late, own.late), ahead(early.skipped, own.skipped))
    return TierTotals(
        reads=here(tier.reads, events.read),
        reads_ahead=ahead(tier.reads_ahead, events.ahead > 0),
        evictions=tier.evictions + jnp.where(counted, events.evictions, 0),
        seconds=seconds,
        rounding=rounding,
        early=early,
    )


def _later(
    sums: Float32[Array, "2 S"],
    rounding: Float32[Array, "2 S"],
    seconds: Float32[Array, " S"],
    counted: Bool[Array, ""],
    decode: Bool[Array, ""],
) -> tuple[Float32[Array, "2 S"], Float32[Array, "2 S"]]:
    """Adds the seconds of a visit to the sums of its phase, compensated: the sums and what they are short of."""
    # Neumaier's correction would catch |term| > |sum| too; sums of non-negative terms do not need it
    of_phase = jnp.arange(2)[:, None] == decode.astype(jnp.int32)
    term = jnp.where(of_phase & counted, seconds[None], 0.0) - rounding
    later = sums + term
    return later, (later - sums) - term
