"""Eviction: each policy scores experts, and the engine removes the lowest (CONTRACT.md section 3 lists the scores).

A policy owns some `[L, E]` tables. It hears the uses of the visited layer and the arrivals by prefetch, and gives a
*keep-score*: a tuple of arrays compared in order. Ties go to the lower flat id, which stays. Nothing here can touch
residency.

To add one: write a function that returns an `Eviction` (usually through `scored`) and give it a line in `EVICTION`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.errors import unknown
from specmd_jax.loops import anywhere
from specmd_jax.policies import online as linear
from specmd_jax.policies.features import ONE, Features, faded, log2_eighths, whole
from specmd_jax.policies.hashing import hash31
from specmd_jax.policies.numbers import Seed, Share, Weight
from specmd_jax.policies.trained import SURE, load, scores
from specmd_jax.policies.use_history import DECAYS, History, blank, seen, used

Keys = tuple[jax.Array, ...]


class Start(NamedTuple):
    """What tables are made from."""

    first_use: jax.Array  # [L, E] int32: the first visit that demands each expert (NEVER: none)


class Now(NamedTuple):
    """Where the replay stands (scalars)."""

    visit: jax.Array
    layer: jax.Array
    pass_id: jax.Array
    layers: int


class Use(NamedTuple):
    """What one visit tells a policy about the row of the visited layer; arrays are [E] unless noted."""

    now: Now
    demand: jax.Array  # bool: the pass's tokens route to it
    touch: jax.Array  # int32: access clock of this use
    mass: jax.Array  # float32: gate mass
    hit: jax.Array  # bool: demanded and resident
    loaded: jax.Array  # bool: demanded, absent and copied in
    top: jax.Array  # bool: demanded and runs at the highest stored precision
    next_use: jax.Array  # int32: the next visit that demands it
    end_touch: jax.Array  # int32 scalar: clock after this visit's uses
    pool: jax.Array  # [L] bool: layers that share the visited layer's budget
    budget: jax.Array  # int32 scalar: that budget in units
    units: jax.Array  # [L, E] int32: what each resident expert takes of it (0: absent), demand included
    score: jax.Array | None = None  # int32: what a `Rows.scored` policy gives, where it was worked out beforehand


class Arrival(NamedTuple):
    """Prefetching of one visit for the rows of its target layers; arrays are [H, E] unless noted."""

    rows: jax.Array  # [H] int32: target layers
    selected: jax.Array  # bool: the prefetcher wants it there, resident or not
    arrived: jax.Array  # bool: its copy started
    touch: jax.Array  # int32 scalar
    visit: jax.Array  # int32 scalar: the visit that prefetched
    pass_id: jax.Array  # [H] int32: the pass each target layer will be visited in


class Column(NamedTuple):
    """One table a policy keeps, and how a visit changes it."""

    fill: Callable[[Start], jax.Array]
    used: Callable[[jax.Array, Use], jax.Array]  # (row [E], use) -> row
    arrived: Callable[[jax.Array, Arrival], jax.Array] = lambda rows, arrival: rows  # (rows [H, E], arrival) -> rows


class Rows(NamedTuple):
    """A policy whose tables change by rows: what `kernel` replays. Its functions are elementwise."""

    columns: Mapping[str, Column]
    keep: Callable[..., Keys]  # (now, layers, entries of each column) -> keep-score keys
    scored: bool = False  # reads `Use.score`: the routing alone decides it


class Eviction(NamedTuple):
    """A policy. State leaves are `[L, E]` tables; `keep` is elementwise over rows or gathered entries of them."""

    init: Callable[[Start], Any]
    observe: Callable[[Any, Use], Any]
    arrive: Callable[[Any, Arrival], Any]
    # (state entries, now, their layers) -> keep-score keys, lowest leaves first
    keep: Callable[[Any, Now, jax.Array], Keys]
    bypass: bool = False  # the demand competes for its place instead of being pinned (forced admission otherwise)
    # the order inside a layer changes only at pass starts and when that layer is visited or prefetched into
    static_rows: bool = True
    oracle: bool = False  # reads the future: an upper bound, not something to deploy
    rows: Rows | None = None  # the same by rows; None: cannot be had so


def _full(value: float, dtype: Any) -> Callable[[Start], jax.Array]:
    return lambda start: jnp.full(start.first_use.shape, value, dtype)


def _on_demand(old: jax.Array, use: Use, new: jax.Array) -> jax.Array:
    return jnp.where(use.demand, new, old)


TOUCH = Column(
    _full(-1, jnp.int32),
    lambda row, use: _on_demand(row, use, use.touch),
    lambda rows, a: jnp.where(a.arrived, a.touch, rows),
)
LOADED = Column(
    _full(-1, jnp.int32),
    lambda row, use: jnp.where(use.loaded, use.touch, row),
    lambda rows, a: jnp.where(a.arrived, a.touch, rows),
)
LAST_VISIT = Column(
    _full(-1, jnp.int32),
    lambda row, use: _on_demand(row, use, use.now.visit),
    lambda rows, a: jnp.where(a.arrived, a.visit, rows),
)
COUNT = Column(_full(0, jnp.int32), lambda row, use: row + use.demand)
COUNT_SINCE_LOAD = Column(
    _full(0, jnp.int32),
    lambda row, use: jnp.where(use.loaded, 1, row + use.demand),
    lambda rows, a: jnp.where(a.arrived, 0, rows),
)
TOP_COUNT = Column(_full(0, jnp.int32), lambda row, use: row + use.top)
MASS = Column(_full(0, jnp.float32), lambda row, use: _on_demand(row, use, row + use.mass))
MARK = Column(
    _full(-1, jnp.int32),
    lambda row, use: _on_demand(row, use, use.now.pass_id),
    lambda rows, a: jnp.where(a.selected, a.pass_id[:, None], rows),
)
LAST_PASS = Column(
    _full(-1, jnp.int32),
    lambda row, use: _on_demand(row, use, use.now.pass_id),
    lambda rows, a: jnp.where(a.arrived, a.pass_id[:, None], rows),
)
SEGMENT = Column(
    _full(0, jnp.int32),
    lambda row, use: jnp.where(use.loaded, 0, jnp.where(use.hit, 1, row)),
    lambda rows, a: jnp.where(a.arrived, 0, rows),
)
FLAT = Column(
    lambda start: jnp.arange(start.first_use.size, dtype=jnp.int32).reshape(start.first_use.shape), lambda row, use: row
)
NEXT_USE = Column(lambda start: start.first_use, lambda row, use: _on_demand(row, use, use.next_use))


def scored(
    keep: Callable[..., Keys],
    *,
    static_rows: bool = True,
    bypass: bool = False,
    oracle: bool = False,
    **columns: Column,
) -> Eviction:
    """A policy that keeps `columns` and scores `keep(now, layer, **columns)`."""

    def init(start: Start) -> dict[str, jax.Array]:
        return {name: column.fill(start) for name, column in columns.items()}

    def observe(state: dict[str, jax.Array], use: Use) -> dict[str, jax.Array]:
        layer = use.now.layer
        return {
            name: state[name].at[layer].set(column.used(state[name][layer], use)) for name, column in columns.items()
        }

    def arrive(state: dict[str, jax.Array], arrival: Arrival) -> dict[str, jax.Array]:
        rows = arrival.rows
        return {
            name: state[name].at[rows].set(column.arrived(state[name][rows], arrival))
            for name, column in columns.items()
        }

    def keep_score(state: dict[str, jax.Array], now: Now, layer: jax.Array) -> Keys:
        return keep(now, layer, **state)

    return Eviction(init, observe, arrive, keep_score, bypass, static_rows, oracle, Rows(columns, keep))


def cyclic_distance(now: Now, layer: jax.Array) -> jax.Array:
    """Layers until `layer` is visited again; a full cycle for the layer being visited."""
    return jnp.mod(layer - now.layer - 1, now.layers) + 1


def lru() -> Eviction:
    """Least recently used leaves first."""
    return scored(lambda now, layer, touch: (touch,), touch=TOUCH)


def fifo() -> Eviction:
    """First in, first out: oldest load leaves first."""
    return scored(lambda now, layer, loaded: (loaded,), loaded=LOADED)


def random(seed: Seed = 0) -> Eviction:
    """Uniformly random victims, drawn afresh at every visit from `seed`."""

    def keep(now: Now, layer: jax.Array, flat: jax.Array) -> Keys:
        return (hash31(jnp.asarray(seed), now.visit, flat),)

    return scored(keep, static_rows=False, flat=FLAT)


def lfu() -> Eviction:
    """Fewest uses over the whole history leave first (a use is a visit, not a token); ties by recency."""
    return scored(lambda now, layer, count, touch: (count, touch), count=COUNT, touch=TOUCH)


def lfu_resident() -> Eviction:
    """LFU that forgets: counts start again at every load."""
    return scored(lambda now, layer, count, touch: (count, touch), count=COUNT_SINCE_LOAD, touch=TOUCH)


def _fading(decay: float | jax.Array, new: Callable[[Use], jax.Array]) -> Column:
    """What fades by `decay` at every visit of its layer."""

    def fade(row: jax.Array, use: Use) -> jax.Array:
        # (value + new) * decay, not value * decay + new: no fused multiply-add can round it differently elsewhere;
        # and some devices flush what is below the smallest normal number, so all of them do
        value = (row + new(use)) * jnp.float32(decay)
        return jnp.where(value < jnp.finfo(jnp.float32).tiny, 0.0, value)

    return Column(_full(0, jnp.float32), fade)


def lfu_decay(decay: Share = 0.9) -> Eviction:
    """LFU whose counts fade by `decay` at every visit of their layer."""
    value = _fading(decay, lambda use: use.demand)
    return scored(lambda now, layer, value, touch: (value, touch), value=value, touch=TOUCH)


def lfru() -> Eviction:
    """Frequency over age: uses divided by the visits since the last touch."""

    def keep(now: Now, layer: jax.Array, count: jax.Array, seen: jax.Array, touch: jax.Array) -> Keys:
        return (count.astype(jnp.float32) / (now.visit - seen + 1).astype(jnp.float32), touch)

    return scored(keep, static_rows=False, count=COUNT, seen=LAST_VISIT, touch=TOUCH)


def slru(protected: Share = 0.8) -> Eviction:
    """Segmented LRU: loads enter a probation segment; hits move to one of at most `protected` of the budget."""
    base = scored(lambda now, layer, segment, touch: (segment, touch), segment=SEGMENT, touch=TOUCH)

    def observe(state: dict[str, jax.Array], use: Use) -> dict[str, jax.Array]:
        state = base.observe(state, use)
        limit = jnp.floor(jnp.float32(protected) * use.budget.astype(jnp.float32)).astype(jnp.int32)
        units = jnp.where(use.pool[:, None], use.units, 0)

        def overfull(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
            return anywhere(jnp.sum(jnp.where(carry[0] == 1, units, 0)) > limit)

        def demote(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            segment, touch = carry
            candidates = (segment == 1) & (units > 0)
            over = jnp.sum(jnp.where(candidates, units, 0)) > limit
            oldest = jnp.min(jnp.where(candidates, touch, jnp.iinfo(jnp.int32).max))
            falls = candidates & (touch == oldest) & over
            return jnp.where(falls, 0, segment), jnp.where(falls, use.end_touch, touch)

        segment, touch = jax.lax.while_loop(overfull, demote, (state["segment"], state["touch"]))
        return {"segment": segment, "touch": touch}

    # a demotion reorders a layer that nobody visits
    return base._replace(observe=observe, static_rows=False, rows=None)


def lhu() -> Eviction:
    """Least high-precision used (HOBBIT): fewest uses at the top precision leave first; goes with a cascade."""
    return scored(lambda now, layer, top, touch: (top, touch), top=TOP_COUNT, touch=TOUCH)


def fld(distance: str = "cyclic") -> Eviction:
    """Farthest layer first. The paper leaves the distance open: `cyclic` (next visit) or `absolute` (layer numbers)."""
    measures = {"cyclic": cyclic_distance, "absolute": lambda now, layer: jnp.abs(layer - now.layer)}
    if distance not in measures:
        raise unknown("fld distance", distance, measures)
    # the table only gives the score its shape: the order is by layer alone
    blank = Column(_full(0, jnp.int32), lambda row, use: row)
    return scored(lambda now, layer, blank: (blank - measures[distance](now, layer),), blank=blank)


def score() -> Eviction:
    """SB: lowest accumulated gate mass leaves first."""
    return scored(lambda now, layer, mass: (mass,), mass=MASS)


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

    return scored(keep, mark=MARK, touch=TOUCH, flat=FLAT)


def weighted(
    recency: Weight = 0.5,
    frequency: Weight = 0.0,
    fast: Weight = 1.0,
    slow: Weight = 1.0,
    mass: Weight = 0.0,
    distance: Weight = 0.0,
    fast_decay: Share = 0.7,
    slow_decay: Share = 0.95,
) -> Eviction:
    """A weighted sum of six features (`policies.features`), ties by recency; `learn.soft` finds the weights."""
    weights = Features(*map(whole, (recency, frequency, fast, slow, mass, distance)))
    quick, lasting = jnp.float32(fast_decay), jnp.float32(slow_decay)

    def keep(now: Now, layer: jax.Array, last: jax.Array, count: jax.Array, touch: jax.Array, **fading: Any) -> Keys:
        found = Features(
            recency=-log2_eighths(jnp.maximum(now.pass_id - last, 0) + 1),
            frequency=log2_eighths(count + 1),
            fast=faded(fading["fast"], quick),
            slow=faded(fading["slow"], lasting),
            mass=faded(fading["mass"], lasting),
            distance=-(cyclic_distance(now, layer) * ONE // now.layers),
        )
        score = jnp.zeros_like(touch)
        for weight, feature in zip(weights, found, strict=True):
            score = score + weight * feature
        return (score, touch)

    return scored(
        keep,
        last=LAST_PASS,
        count=COUNT,
        touch=TOUCH,
        fast=_fading(quick, lambda use: use.demand),
        slow=_fading(lasting, lambda use: use.demand),
        mass=_fading(lasting, lambda use: jnp.where(use.demand, use.mass, 0.0)),
    )


def _scored(row: jax.Array, use: Use) -> jax.Array:
    assert use.score is not None
    return use.score


# of the layer's latest visit
SCORE = Column(
    _full(0, jnp.int32),
    _scored,
    lambda rows, a: jnp.where(a.arrived, SURE, rows),
)
SCORED = Rows({"score": SCORE, "touch": TOUCH}, lambda now, layer, score, touch: (score, touch), scored=True)


def _by_score(init: Callable[[Start], Any], observe: Callable[[Any, Use], Any]) -> Eviction:
    """A policy that works out the score of each expert of the visited layer; ties by recency."""
    return Eviction(
        init, observe, _arrives_for_its_visit, lambda state, now, layer: (state.score, state.touch), rows=SCORED
    )


def _arrives_for_its_visit(state: Any, arrival: Arrival) -> Any:
    """Scores of what was prefetched: above all others, until its layer is visited and gives it one."""
    rows = arrival.rows
    return state._replace(
        score=state.score.at[rows].set(SCORE.arrived(state.score[rows], arrival)),
        touch=state.touch.at[rows].set(TOUCH.arrived(state.touch[rows], arrival)),
    )


class Learned(NamedTuple):
    history: History  # [L, E] tables
    score: jax.Array  # [L, E] int32: given at the layer's latest visit
    touch: jax.Array  # [L, E] int32


def learned(checkpoint: str = "") -> Eviction:
    """A trained predictor scores how soon each expert of the visited layer is used again; ties by recency.

    `checkpoint` is a file that `experiments.train_evictor` wrote, "" the one that comes with the package. A prefetched
    expert stays until its layer is visited, whatever its score.
    """
    weights = load("evictor", checkpoint)

    def init(start: Start) -> Learned:
        return Learned(blank(*start.first_use.shape), _full(0, jnp.int32)(start), TOUCH.fill(start))

    def observe(state: Learned, use: Use) -> Learned:
        layer = use.now.layer
        row = seen(jax.tree.map(lambda table: table[layer], state.history), use.demand, use.mass)
        history = jax.tree.map(lambda table, new: table.at[layer].set(new), state.history, row)
        return Learned(
            history,
            state.score.at[layer].set(scores(weights, history, layer[None])[0]),
            state.touch.at[layer].set(TOUCH.used(state.touch[layer], use)),
        )

    return _by_score(init, observe)


class _Online(NamedTuple):
    weights: linear.Linear
    use: jax.Array  # [L, E, 7] float32: as `History.use`
    last: jax.Array  # [L, E] bool: the layer's latest demand
    sources: jax.Array  # [L, 2, E] bool: of the latest values: the layer's demand, and that of the layer before it
    value: jax.Array  # [L, E] int32: given at the layer's latest visit, as a share; -1 before the first
    score: jax.Array  # [L, E] int32: the same before it was clipped
    touch: jax.Array  # [L, E] int32


def online(fade: Share = 0.85, rate: Share = 0.0625) -> Eviction:
    """A linear predictor of how soon each expert of the visited layer is used again, learned on the way; then recency.

    It learns ``fade ** (visits until the next use - 1)`` from one visit of a layer to the next: 1 for what is used,
    `fade` times its new value for the rest (temporal differences, `policies.online`). Each step corrects a share `rate`
    of the error by either source. Both numbers are rounded to 1/1024. A prefetched expert stays until its layer is
    visited.
    """
    fade_units, rate_units = linear.whole(fade), linear.whole(rate)

    def init(start: Start) -> _Online:
        shape = start.first_use.shape
        nobody = jnp.zeros(shape, bool)
        return _Online(
            weights=linear.blank(shape[0], shape[1], 2),
            use=jnp.zeros((*shape, len(DECAYS)), jnp.float32),
            last=nobody,
            sources=jnp.stack([nobody, nobody], axis=1),
            value=_full(-1, jnp.int32)(start),
            score=_full(0, jnp.int32)(start),
            touch=TOUCH.fill(start),
        )

    def observe(state: _Online, use: Use) -> _Online:
        layer = use.now.layer
        weights = jax.tree.map(lambda table: table[layer], state.weights)
        before, before_sources, guess = linear.inputs(state.use[layer]), state.sources[layer], state.value[layer]
        row = used(state.use[layer], use.demand)
        last = state.last.at[layer].set(use.demand)
        sources = jnp.stack([use.demand, last[jnp.mod(layer - 1, use.now.layers)]])
        now = linear.inputs(row)
        later = fade_units * linear.clipped(linear.value(weights, now, sources)) // linear.RATE
        error = jnp.where(guess < 0, 0, jnp.where(use.demand, linear.ONE, later) - guess)
        weights = linear.corrected(weights, before, before_sources, error, rate_units)
        score = linear.value(weights, now, sources)
        return _Online(
            jax.tree.map(lambda table, new: table.at[layer].set(new), state.weights, weights),
            state.use.at[layer].set(row),
            last,
            state.sources.at[layer].set(sources),
            state.value.at[layer].set(linear.clipped(score)),
            state.score.at[layer].set(score),
            state.touch.at[layer].set(TOUCH.used(state.touch[layer], use)),
        )

    return _by_score(init, observe)


def belady() -> Eviction:
    """Oracle: the farthest next use leaves first; the demand is always admitted."""
    return scored(lambda now, layer, next_use: (-next_use,), oracle=True, next_use=NEXT_USE)


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
    "belady": belady,
    "belady_bypass": belady_bypass,
}
