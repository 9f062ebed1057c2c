"""Host memory as a cache between storage and the device: what it is asked, and what enters and leaves it (CONTRACT.md
section 6). Room is made in it by `make_room`, as on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from specmd_jax.loops import settled
from specmd_jax.policies.base import Arrival, Eviction, Now, Plan, Use
from specmd_jax.replay.state import Cell, HostTier, Numbers, State, Visit
from specmd_jax.replay.totals import Classified


class Asked(NamedTuple):
    """What a visit asks of host memory, of the visited layer."""

    read: Bool[Array, " E"]  # is copied or runs on the host, and not there: storage is read first
    stays: Bool[Array, " E"]  # is copied or runs on the host, and in host memory behind that
    stream: Bool[Array, ""]  # `stays` is more than the budget, and none of it is held
    # where predictions are read into host memory:
    used: Bool[Array, " E"] | None = None  # was read ahead in the counted visits and is asked for the first time
    late: Bool[Array, " E"] | None = None  # is still being read ahead


def parts(cell: Cell, state: State) -> tuple[HostTier, Eviction, Numbers]:
    """Gives the host tier, its policy and its numbers, where there is one."""
    assert state.host is not None and cell.policies.host_eviction is not None
    return state.host, cell.policies.host_eviction, cell.numbers.of_host()


def there_of(state: State, visit: Visit) -> Bool[Array, " E"]:
    """Says who of the visited layer is in host memory."""
    assert state.host is not None
    return settled(state.host.cache.level[visit.layer], visit.index >= 0) > 0


def arriving_of(state: State, visit: Visit, there: Bool[Array, " E"]) -> Bool[Array, " E"] | None:
    """Says who of those that are `there` is still being read ahead; None: nobody ever is."""
    assert state.host is not None
    early = state.host.early
    return None if early is None else early.flight.of(visit.layer, visit.demand.shape[0]) & there


def ask(
    cell: Cell,
    state: State,
    visit: Visit,
    now: Now,
    experts: Classified,
    plan: Plan,
    taken: Bool[Array, " E"],
    there: Bool[Array, " E"],
    arriving: Bool[Array, " E"] | None = None,
) -> tuple[HostTier, Asked]:
    """Reads what is copied or runs on the host and is not there, and lets the host tier's policy hear the visit.

    Args:
      state: before the device's policy has seen the visit.
      taken: copies that the device lets in.
      there, arriving: as `there_of` and `arriving_of` give them.
    """
    host, policy, numbers = parts(cell, state)
    tier, layer, demand = cell.setup.tier, visit.layer, visit.demand
    assert tier is not None
    cache = host.cache
    asked = experts.fetched | experts.host if cell.policies.miss.hosts else experts.fetched
    # only a copy at the highest precision is the whole expert, which can move; it does not if it runs from a buffer
    moves = taken & (plan.fetch == cell.numbers.units.shape[0] - 1)
    stays = asked & ~moves if tier.exclusive else asked
    read, units = asked & ~there, numbers.units[1, layer]
    after = (there & ~asked) | stays
    cache = cache._replace(
        level=cache.level.at[layer].set(after.astype(jnp.int8)),
        used=cache.used.at[layer].set(jnp.sum(jnp.where(after, units, 0))),
    )
    heard = demand if tier.uses or policy.oracle else asked
    use = Use(
        now=now,
        demand=heard,
        touch=state.clock + visit.rank,
        mass=jnp.where(heard, visit.mass, 0.0),
        hit=heard & there,
        loaded=read & stays,
        top=heard,
        next_use=visit.next_use,
        end_touch=state.clock + jnp.sum(demand, dtype=jnp.int32),
        pool=jnp.ones(cell.setup.layers, bool) if numbers.pooled else jnp.arange(cell.setup.layers) == layer,
        budget=numbers.budget_of(layer),
        units=jnp.where(cache.level > 0, numbers.units[1][:, None], 0),
    )
    over = jnp.sum(jnp.where(stays, units, 0)) > numbers.budget_of(layer)
    stream = over & (not cell.setup.hold)
    host = host._replace(cache=cache, eviction=policy.observe(host.eviction, use))
    if host.early is None or arriving is None:
        return host, Asked(read, stays, stream)
    fresh = settled(host.early.fresh[layer], visit.index >= 0)
    early = host.early._replace(fresh=host.early.fresh.at[layer].set(jnp.where(asked, 0, fresh)))
    return host._replace(early=early), Asked(read, stays, stream, asked & there & (fresh == 2), asked & arriving)


def copied_ahead(cell: Cell, state: State, arrival: Arrival, read: Bool[Array, "H E"]) -> HostTier:
    """Lets the host tier follow the prefetch copies of a visit.

    Args:
      arrival: as the device's policy sees it.
      read: those copies for which storage is read first.
    """
    host, policy, numbers = parts(cell, state)
    assert cell.setup.tier is not None
    rows, cache = arrival.rows, host.cache
    before = cache.level[rows]
    if cell.setup.tier.exclusive:
        read, after = jnp.zeros_like(read), jnp.where(arrival.arrived, jnp.int8(0), before)
    else:
        after = jnp.where(read, jnp.int8(1), before)
    change = jnp.sum(after - before, axis=1, dtype=jnp.int32) * numbers.units[1, rows]
    cache = cache._replace(level=cache.level.at[rows].set(after), used=cache.used.at[rows].add(change))
    return host._replace(cache=cache, eviction=policy.arrive(host.eviction, arrival._replace(arrived=read)))


def taken_back(cell: Cell, state: State, visit: Visit, gone: Bool[Array, "L E"]) -> HostTier:
    """Lets what the device evicted enter the host tier."""
    host, policy, numbers = parts(cell, state)
    rows, cache = jnp.arange(cell.setup.layers, dtype=jnp.int32), host.cache
    arrival = Arrival(
        rows=rows,
        selected=jnp.zeros_like(gone),
        arrived=gone,
        touch=state.clock,
        visit=visit.index,
        pass_id=visit.pass_id + (rows <= visit.layer).astype(jnp.int32),
    )
    more = jnp.sum(gone, axis=1, dtype=jnp.int32) * numbers.units[1]
    cache = cache._replace(level=jnp.where(gone, jnp.int8(1), cache.level), used=cache.used + more)
    return host._replace(cache=cache, eviction=policy.arrive(host.eviction, arrival))
