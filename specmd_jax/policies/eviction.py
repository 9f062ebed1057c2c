"""Eviction: each policy scores experts, and the engine removes the lowest (CONTRACT.md section 3 lists the scores).

A policy owns some `[L, E]` tables. It hears the uses of the visited layer and the arrivals by prefetch, and gives a
*keep-score*: a tuple of arrays compared in order. Ties go to the lower flat id, which stays. Nothing here can touch
residency.

To add one: write a function that returns an `Eviction` (usually through `scored`) and give it a line in `EVICTION`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from specmd_jax.errors import unknown
from specmd_jax.loops import anywhere
from specmd_jax.policies.adaptive_eviction import adaptive
from specmd_jax.policies.base import Column, Curve, Eviction, Keys, Now, Use
from specmd_jax.policies.columns import (
    COUNT,
    COUNT_SINCE_LOAD,
    FLAT,
    LAST_VISIT,
    LOADED,
    MARK,
    MASS,
    NEXT_USE,
    SEGMENT,
    TOP_COUNT,
    TOUCH,
    cyclic_distance,
    fading,
    full,
    scored,
)
from specmd_jax.policies.hashing import hash31
from specmd_jax.policies.learned_eviction import learned, online
from specmd_jax.policies.numbers import Seed, Share
from specmd_jax.policies.weighted import weighted

Tables = tuple[Int32[Array, "L E"], Int32[Array, "L E"]]


def lru() -> Eviction:
    """Least recently used leaves first."""
    return scored(lambda now, layer, touch: (touch,), curve=Curve("touch"), touch=TOUCH)


def fifo() -> Eviction:
    """First in, first out: oldest load leaves first."""
    return scored(lambda now, layer, loaded: (loaded,), curve=Curve("load"), loaded=LOADED)


def random(seed: Seed = 0) -> Eviction:
    """Uniformly random victims, drawn afresh at every visit from `seed`."""

    def keep(now: Now, layer: jax.Array, flat: jax.Array) -> Keys:
        return (hash31(jnp.asarray(seed), now.visit, flat),)

    return scored(keep, static_rows=False, curve=Curve("hash", seed=seed), flat=FLAT)


def lfu() -> Eviction:
    """Fewest uses over the whole history leave first (a use is a visit, not a token); ties by recency."""
    return scored(lambda now, layer, count, touch: (count, touch), curve=Curve("count"), count=COUNT, touch=TOUCH)


def lfu_resident() -> Eviction:
    """LFU that forgets: counts start again at every load."""
    curve = Curve("resident_count")
    return scored(lambda now, layer, count, touch: (count, touch), curve=curve, count=COUNT_SINCE_LOAD, touch=TOUCH)


def lfu_decay(decay: Share = 0.9) -> Eviction:
    """LFU whose counts fade by `decay` at every visit of their layer.

    What was prefetched and never used counts as 0 and leaves first, often before it is used: with a prefetcher that
    looks two layers or more ahead, choose a policy that knows when an expert came (`lru`, `least_stale`) instead.
    """
    value = fading(decay, lambda use: use.demand)
    curve = Curve("decay", decay=decay)
    return scored(lambda now, layer, value, touch: (value, touch), curve=curve, value=value, touch=TOUCH)


def lfru() -> Eviction:
    """Frequency over age: uses divided by the visits since the last touch."""

    def keep(now: Now, layer: jax.Array, count: jax.Array, seen: jax.Array, touch: jax.Array) -> Keys:
        return (count.astype(jnp.float32) / (now.visit - seen + 1).astype(jnp.float32), touch)

    return scored(keep, static_rows=False, curve=Curve("rate"), count=COUNT, seen=LAST_VISIT, touch=TOUCH)


def slru(protected: Share = 0.8) -> Eviction:
    """Segmented LRU: loads enter a probation segment; hits move to one of at most `protected` of the budget."""
    base = scored(lambda now, layer, segment, touch: (segment, touch), segment=SEGMENT, touch=TOUCH)

    def observe(state: dict[str, Int32[Array, "L E"]], use: Use) -> dict[str, Int32[Array, "L E"]]:
        state = base.observe(state, use)
        limit = jnp.floor(jnp.float32(protected) * use.budget.astype(jnp.float32)).astype(jnp.int32)
        units = jnp.where(use.pool[:, None], use.units, 0)

        def overfull(carry: Tables) -> Bool[Array, ""]:
            return anywhere(jnp.sum(jnp.where(carry[0] == 1, units, 0)) > limit)

        def demote(carry: Tables) -> Tables:
            segment, touch = carry
            candidates = (segment == 1) & (units > 0)
            over = jnp.sum(jnp.where(candidates, units, 0)) > limit
            oldest = jnp.min(jnp.where(candidates, touch, jnp.iinfo(jnp.int32).max))
            falls = candidates & (touch == oldest) & over
            return jnp.where(falls, 0, segment), jnp.where(falls, use.end_touch, touch)

        segment, touch = jax.lax.while_loop(overfull, demote, (state["segment"], state["touch"]))
        return {"segment": segment, "touch": touch}

    # a demotion reorders a layer that nobody visits
    curve = Curve("segment", protected=protected)
    return base._replace(observe=observe, static_rows=False, rows=None, curve=curve)


def lhu() -> Eviction:
    """Least high-precision used (HOBBIT): fewest uses at the top precision leave first; goes with a cascade."""
    curve = Curve("count")  # it has one precision, and there every use is at the highest
    return scored(lambda now, layer, top, touch: (top, touch), curve=curve, top=TOP_COUNT, touch=TOUCH)


def fld(distance: str = "cyclic") -> Eviction:
    """Farthest layer first. The paper leaves the distance open: `cyclic` (next visit) or `absolute` (layer numbers)."""
    measures = {"cyclic": cyclic_distance, "absolute": lambda now, layer: jnp.abs(layer - now.layer)}
    if distance not in measures:
        raise unknown("fld distance", distance, measures)
    # the table only gives the score its shape: the order is by layer alone
    blank = Column(full(0, jnp.int32), lambda row, use: row)
    curve = Curve("id", layers=distance)
    return scored(lambda now, layer, blank: (blank - measures[distance](now, layer),), curve=curve, blank=blank)


def score() -> Eviction:
    """SB: lowest accumulated gate mass leaves first."""
    return scored(lambda now, layer, mass: (mass,), curve=Curve("mass"), mass=MASS)


def least_stale(reading: str = "cyclic") -> Eviction:
    """SpecMD's Least-Stale: experts neither used nor predicted in this pass leave before those that were.

    The paper leaves the order within a queue open. `cyclic` (default): farthest next visit first, then oldest touch.
    `left_first`: layers already executed first. `literal`: ascending layer, then ascending id. `recency`: oldest touch
    (equals LRU when nothing is prefetched).
    """

    def left_first(now: Now, layer: jax.Array, touch: jax.Array, flat: jax.Array) -> Keys:
        left = layer < now.layer
        return (jnp.where(left, layer, 2 * now.layers - layer) + jnp.zeros_like(touch), touch)

    readings: dict[str, Callable[[Now, jax.Array, jax.Array, jax.Array], Keys]] = {
        "cyclic": lambda now, layer, touch, flat: (jnp.zeros_like(touch) - cyclic_distance(now, layer), touch),
        "left_first": left_first,
        "literal": lambda now, layer, touch, flat: (flat,),  # flat ids ascend by layer, then by expert
        "recency": lambda now, layer, touch, flat: (touch,),
    }
    if reading not in readings:
        raise unknown("least_stale reading", reading, readings)

    def keep(now: Now, layer: jax.Array, mark: jax.Array, touch: jax.Array, flat: jax.Array) -> Keys:
        return ((mark >= now.pass_id).astype(jnp.int32), *readings[reading](now, layer, touch, flat))

    curves = {
        "cyclic": Curve("touch", marks=True, layers="cyclic"),
        "left_first": Curve("touch", marks=True, layers="left_first"),
        "literal": Curve("ascending", marks=True),
        "recency": Curve("touch", marks=True),
    }
    return scored(keep, curve=curves[reading], mark=MARK, touch=TOUCH, flat=FLAT)


def belady() -> Eviction:
    """Oracle: the farthest next use leaves first; the demand is always admitted."""
    return scored(lambda now, layer, next_use: (-next_use,), oracle=True, curve=Curve("next_use"), next_use=NEXT_USE)


def belady_bypass() -> Eviction:
    """Oracle: as `belady`, but a demanded expert need not be kept: the lower bound on demand misses."""
    return belady()._replace(bypass=True)


EVICTION: dict[str, Callable[..., Eviction]] = {
    "lru": lru,
    "fifo": fifo,
    "random": random,
    "lfu": lfu,
    "lfu_resident": lfu_resident,
    "lfu_decay": lfu_decay,
    "lfru": lfru,
    "slru": slru,
    "lhu": lhu,
    "fld": fld,
    "fld_absolute": partial(fld, "absolute"),
    "score": score,
    "least_stale": least_stale,
    "least_stale_left_first": partial(least_stale, "left_first"),
    "least_stale_literal": partial(least_stale, "literal"),
    "least_stale_recency": partial(least_stale, "recency"),
    "weighted": weighted,
    "learned": learned,
    "online": online,
    "adaptive": adaptive,
    "belady": belady,
    "belady_bypass": belady_bypass,
}
