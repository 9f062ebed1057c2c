"""The demand of a visit: what it finds, what becomes of its misses, and its copies (CONTRACT.md section 2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int8, Int32

from specmd_jax.loops import settled
from specmd_jax.policies.base import Offer, Plan, Row
from specmd_jax.replay.make_room import Cache, pick
from specmd_jax.replay.start import Held
from specmd_jax.replay.state import Cell, Numbers, Open, State, Visit
from specmd_jax.replay.totals import Classified


class Found(NamedTuple):
    """The visited layer as the visit finds it."""

    level: Int32[Array, " E"]  # 0 absent, else precision level 1..Q
    flying: Bool[Array, " E"]  # its copy is still in flight at the gate
    fresh: Int8[Array, " E"]  # as `State.fresh`
    evicted: Int32[Array, " E"]  # the pass of the last eviction (-1: none)
    predicted: Bool[Array, " E"]  # had been selected for this visit


class Copied(NamedTuple):
    """The visited layer behind its demand copies."""

    level: Int32[Array, " E"]  # that an expert runs at
    units: Int32[Array, ""]  # what the demand takes of the budget
    stream: Bool[Array, ""]  # it is more than the budget, and none of it is held
    pinned_units: Int32[Array, ""] | None = None  # of `units`, what pins keep anyway; None: there are no pins


def find(state: State, visit: Visit) -> tuple[Found, Visit]:
    """Reads the rows of the visited layer, here and nowhere else: what is read later is not overwritten in place.

    The visit comes back for `ends_layer`, which is settled with them: a prefetch writes `predicted` and does not depend
    on what is read of it, but on that.
    """
    layer, cache = visit.layer, state.cache
    rows = cache.level[layer], state.fresh[layer], cache.evicted[layer], state.predicted[layer]
    (level, fresh, evicted, predicted), closing = settled((rows, visit.ends_layer), visit.index >= 0)
    flying = state.flight.of(layer, level.shape[0])
    found = Found(level.astype(jnp.int32), flying, fresh, evicted, predicted & closing)
    return found, visit._replace(ends_layer=closing)


def row_of(numbers: Numbers, visit: Visit, found: Found, cache: Cache) -> Row:
    """Gives the visited layer as the miss rule sees it."""
    levels, layer = numbers.units.shape[0] - 1, visit.layer
    matches = visit.by_mass[:, None] == jnp.arange(found.level.shape[0])[None]  # [M, E]
    order = jnp.sum(jnp.where(matches, jnp.arange(visit.by_mass.shape[0])[:, None], 0), axis=0, dtype=jnp.int32)
    probability = None
    if visit.logits is not None:
        probability = jnp.where(visit.tokens == 1, jax.nn.softmax(visit.logits[0]), jnp.nan)
    arrived = (found.level > 0) & ~found.flying
    free = numbers.budget_of(layer) - (jnp.sum(cache.used) if numbers.pooled else cache.used[layer])
    room = jnp.maximum(free // jnp.maximum(numbers.units[levels, layer], 1), 0)
    return Row(visit.demand, found.level, arrived, visit.mass, order, probability, levels, room)


def classify(visit: Visit, found: Found, plan: Plan, gate: Open, rerouted: Bool[Array, " E"]) -> Classified:
    """Gives the demand by outcome; `gate` is the demand of the (pass, layer) so far, this visit's included."""
    demand = visit.demand
    hit = demand & (found.level > 0) & (found.level >= plan.need)
    miss = demand & ~hit
    fetched = miss & (plan.fetch > 0)
    substituted = miss & ~fetched & (plan.instead >= 0)
    host = miss & ~fetched & ~substituted & plan.host
    late = hit & found.flying
    return Classified(
        demand=demand,
        reused=hit & ~late & (found.fresh == 0),
        prefetch_hits=hit & ~late & (found.fresh > 0),
        late=late,
        fetched=fetched,
        dropped=miss & ~fetched & ~substituted & ~host,
        substituted=substituted,
        host=host,
        collisions=miss & (found.evicted == visit.pass_id),
        prefetch_used=hit & (found.fresh == 2),
        rerouted=rerouted,
        predicted=found.predicted,
        predicted_right=found.predicted & gate.demand,
    )


def admit(cell: Cell, state: State, visit: Visit, row: Row, experts: Classified) -> tuple[State, Bool[Array, " E"]]:
    """Says which of the fetched experts are let in; the others run from a buffer."""
    rule = cell.policies.admission
    if rule is None or rule.admit is None:
        return state, experts.fetched
    admission, taken = rule.admit(state.admission, Offer(visit.starts_pass, experts.fetched, row.order))
    return state._replace(admission=admission), taken


def copy_demand(
    cell: Cell,
    cache: Cache,
    held: Held | None,
    visit: Visit,
    found: Found,
    experts: Classified,
    plan: Plan,
    taken: Bool[Array, " E"],
) -> tuple[Cache, Copied]:
    """Makes the fetched experts that are `taken` resident at the level that the plan names."""
    numbers, layer = cell.numbers, visit.layer
    level = jnp.where(experts.fetched, plan.fetch, found.level)
    resident = jnp.where(taken, plan.fetch, found.level)
    units = pick(numbers.units[:, layer], resident)
    cache = cache._replace(
        level=cache.level.at[layer].set(resident.astype(jnp.int8)), used=cache.used.at[layer].set(jnp.sum(units))
    )
    demand_units, room, pinned = jnp.sum(jnp.where(experts.demand, units, 0)), numbers.budget_of(layer), None
    if held is not None:
        pinned = jnp.sum(jnp.where(experts.demand & held.which[layer], units, 0))
        room = room - held.of_pool(layer, numbers.pooled) + pinned
    stream = (demand_units > room) & (not cell.setup.hold)
    return cache, Copied(level, demand_units, stream, pinned)


def runs_of(visit: Visit, experts: Classified, plan: Plan) -> Int32[Array, " E"]:
    """Gives the tokens that each expert computes on the device."""
    kept = experts.demand & ~experts.dropped & ~experts.substituted & ~experts.host
    moved = jnp.where(experts.substituted, visit.count, 0)
    at = plan.instead[:, None] == jnp.arange(moved.shape[0])[None]
    # a token that loses several experts to one stand-in runs it once
    extra = jnp.minimum(jnp.sum(jnp.where(at, moved[:, None], 0), axis=0, dtype=jnp.int32), visit.tokens)
    return jnp.where(kept, visit.count, 0) + extra
