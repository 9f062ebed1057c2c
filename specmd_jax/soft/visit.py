"""One visit of the differentiable cache: the tables behind the keep-scores, and when its experts have run."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.policies.features import ONE, Features, faded, log2_eighths
from specmd_jax.soft.top_c import TINY

FEW = 4  # experts of a demand that are looked at without a loop
FINEST = 2.0**-21  # half of a unit of a keep-score: what breaks ties and nothing else
LEAST_ROOM = 1e-6  # experts: as good as none
FIRST = 1024.0  # above every keep-score with a policy's own: that of an arrival


class Now(NamedTuple):
    """One visit; meanings as in `Given`."""

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    demand: jax.Array  # [E, B], as all that follow unless noted
    mass: jax.Array
    touch: jax.Array
    end_touch: jax.Array  # [B]
    counted: jax.Array  # [B]
    compute_s: Any = None
    dense_s: Any = None  # [B]
    by_mass: Any = None  # [M, B]
    want: Any = None
    score: Any = None


class Memory(NamedTuple):
    """Tables of the features, [L, E, B]; those of averages float32, rounded as the policy's own."""

    last: jax.Array  # pass of the last use or arrival
    touch: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    fast: jax.Array
    slow: jax.Array
    mass: jax.Array
    told: Any = None  # the policy's own score, given at the layer's latest visit; None: there is none
    sure: Any = None  # how much of an expert arrived since then


def seen(old: Memory, here: jax.Array, now: Now, pass_id: jax.Array, decays: tuple[jax.Array, jax.Array]) -> Memory:
    """Gives the tables after the uses of a visit."""
    demand, mass, touch = now.demand[None], now.mass[None], now.touch[None]  # [1, E, B]
    used = here & (demand > 0)

    def fade(table: jax.Array, new: jax.Array, decay: jax.Array) -> jax.Array:
        value = (table + new) * decay
        return jnp.where(here, jnp.where(value < TINY, 0.0, value), table)

    return Memory(
        last=jnp.where(used, pass_id.astype(old.last.dtype), old.last),
        touch=jnp.where(used, touch.astype(old.touch.dtype), old.touch),
        count=old.count + here.astype(demand.dtype) * demand,
        fast=fade(old.fast, demand, decays[0]),
        slow=fade(old.slow, demand, decays[1]),
        mass=fade(old.mass, jnp.where(demand > 0, mass, 0.0), decays[1]),
        told=None if old.told is None else jnp.where(here, now.score[None].astype(old.told.dtype), old.told),
        sure=None if old.sure is None else jnp.where(here, 0, old.sure),
    )


def with_arrivals(old: Memory, arrived: jax.Array, pass_id: jax.Array, end_touch: jax.Array) -> Memory:
    """Gives the tables after prefetching: by as much as arrives it counts as a use in the pass that it is for."""
    pass_id, end_touch = pass_id.astype(arrived.dtype), end_touch[None, None].astype(arrived.dtype)
    return old._replace(
        last=old.last + arrived * (pass_id - old.last),
        touch=old.touch + arrived * (end_touch - old.touch),
        sure=None if old.sure is None else old.sure + arrived * (1 - old.sure),
    )


def keep_score(
    memory: Memory,
    weights: jax.Array,
    pass_id: jax.Array,
    layer: jax.Array,
    layers: int,
    decays: tuple[jax.Array, jax.Array],
    between: bool,
) -> jax.Array:
    """Keep-scores [L, E, B]: the fixed-point features of the policy as floats; `between`: ages may be fractions.

    With a policy's own scores, the last weight is theirs, and what arrived is above all else.
    """
    age = jnp.maximum(pass_id.astype(memory.last.dtype) - memory.last, 0) + 1
    whole = jnp.floor(age).astype(jnp.int32)
    recency = log2_eighths(whole).astype(age.dtype)
    if between:  # straight lines between whole ages
        step = log2_eighths(whole + 1) - log2_eighths(whole)
        recency += (age - whole.astype(age.dtype)) * step.astype(age.dtype)
    distance = (jnp.mod(jnp.arange(layers)[:, None, None] - layer - 1, layers) + 1) * ONE // layers
    found = Features(
        recency=-recency,
        frequency=log2_eighths(memory.count.astype(jnp.int32) + 1),
        fast=faded(memory.fast, decays[0]),
        slow=faded(memory.slow, decays[1]),
        mass=faded(memory.mass, decays[1]),
        distance=-distance,
    )
    score = jnp.zeros((), weights.dtype)
    for weight, feature in zip(weights[: len(found)], found, strict=True):
        score = score + weight * (feature.astype(weights.dtype) / ONE)
    if memory.told is None:
        return score
    return (score + weights[-1] * memory.told) * (1 - memory.sure) + FIRST * memory.sure


def experts_done_s(
    now: Now, missed: jax.Array, late: jax.Array, copy_s: jax.Array, link_s: jax.Array, adds: jax.Array
) -> jax.Array:
    """[B] seconds from the gate until the visit's experts have run, in order of arrival: residents, what is in flight,
    then the misses one copy after the other. An expert that is there by a share waits by that share.

    Args:
      adds: 0: residents run while others arrive; 1: all wait for the last arrival; or in between.
    """

    def at(table: jax.Array, ids: jax.Array) -> jax.Array:  # [E, B], [B] -> [B]
        found = jnp.take_along_axis(table, jnp.maximum(ids, 0)[None], axis=0)[0]
        return jnp.where(ids < 0, 0, found)

    def wait(done: jax.Array, ids: jax.Array) -> tuple[jax.Array, None]:
        return done + at(late, ids) * (jnp.maximum(link_s - done, 0) + at(now.compute_s, ids)), None

    def copied(times: tuple[jax.Array, jax.Array], ids: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        arrival, done = times[0] + at(missed, ids) * copy_s, times[1]
        return (arrival, done + at(missed, ids) * (jnp.maximum(arrival - done, 0) + at(now.compute_s, ids))), None

    needed, some = now.demand.astype(missed.dtype), jnp.max(missed * now.demand.astype(missed.dtype), axis=0)
    done = jnp.sum(now.compute_s * (1 - missed - late) * needed, axis=0)
    done = jax.lax.scan(wait, done, now.by_mass, unroll=FEW)[0]
    arrival, done = jax.lax.scan(copied, (link_s, done), now.by_mass, unroll=FEW)[0]
    last = jnp.maximum(some * arrival, jnp.max(late * needed, axis=0) * link_s)
    return done + adds * (last + jnp.sum(now.compute_s * needed, axis=0) - done)


def prefetch(
    want: jax.Array,
    threshold: Any,
    missing: jax.Array,
    free: jax.Array,
    link_s: jax.Array,
    gate_s: jax.Array,
    copy_s: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Copies one layer's experts between the last demand copy and the next gate, in order of falling want-score.

    Args:
      want: [E, B] scores; ties: the lower id goes first. threshold: what is wanted less is left alone.
      missing: [E, B] share that is not there.
      free: [B] experts that fit beside what is pinned.
      link_s, gate_s: [B] the link is free, the next gate is known. copy_s: [1 or B] of one expert.

    Returns:
      [E, B] how much of each is copied, and how much of that is in flight at the gate.
    """
    ids = jnp.arange(want.shape[0])[:, None, None]
    wanted = jax.nn.sigmoid((want - threshold) / temperature) * missing
    lead = want[:, None] - want[None] + FINEST * (jnp.swapaxes(ids, 0, 1) > ids).astype(want.dtype)
    before = jnp.where(ids == jnp.swapaxes(ids, 0, 1), 0, jax.nn.sigmoid(lead / temperature))  # [i, j, B]: i before j
    ahead = jnp.sum(wanted[:, None] * before, axis=0)
    link_s, gate_s, free, copy_s = link_s[None], gate_s[None], free[None], copy_s[None]
    start_s, patience_s = link_s + copy_s * ahead, temperature * copy_s
    started = wanted * jax.nn.sigmoid((gate_s - start_s) / patience_s)
    started *= jax.nn.sigmoid((free - ahead - 0.5) / temperature)
    # never more than fits; no quotient overflows where next to nothing starts, as its slope would be no number
    most = jnp.maximum(free, 0)
    started *= most / jnp.maximum(jnp.maximum(jnp.sum(started, axis=0, keepdims=True), most), LEAST_ROOM)
    return started, started * jax.nn.sigmoid((start_s + copy_s - gate_s) / patience_s)
