"""The differentiable cache: a replay with residency in 0..1, whose misses and stall have gradients.

It follows CONTRACT.md with three steps made smooth by one temperature:

- **Eviction.** Of what is not pinned, a share ``sigmoid((score - t) / temperature)`` stays, and `t` is where the bytes
  that stay meet the budget. `t` is found by bisection; its gradient is that of the implicit function. What stays is a
  share of what was there: nothing comes back without a copy, as it could if membership alone were the residency.
- **Admission.** A demanded expert is copied by as much of it as is missing. A prefetch copies what is missing of the
  experts whose want-score lies above a threshold, a share ``sigmoid((want - threshold) / temperature)`` of each.
- **Arrival.** A prefetch starts before the next gate, and arrives before it, by a sigmoid of the seconds left over
  ``temperature`` copies. What is in flight at its gate makes the visit wait for the link.

As the temperature falls to 0, misses, late hits and stall become those of the scan with ``eviction="weighted"``, or
with ``policies.tuned`` where the scores of its policy are given, if the experts of a pool are equally large, the budget
is a whole number of them, the weights are multiples of 1/1024 (that of the scores of 1/256), and every demand fits. A
larger one streams through as in the contract; there the budget makes misses jump, and such a jump has no gradient. Its
copies are timed by falling gate mass, not by id.

Axis B: requests replayed side by side, each with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.core import Tracer

from specmd_jax.engines.prepared import Prepared
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.features import Features
from specmd_jax.soft.top_c import kept
from specmd_jax.soft.visit import FINEST, Memory, Now, experts_done_s, keep_score, prefetch, seen, with_arrivals
from specmd_jax.specs.hardware import Hardware
from specmd_jax.types import DECODE

WINDOW = 64  # visits between the states that the backward pass keeps
LEAST_WANT = -1e6  # less counts as this: differences stay finite
TRUST = "trust"  # the number of `policies.tuned` that weighs the score of its policy


class Given(NamedTuple):
    """What is replayed: requests of one pass after the other, each pass through layers 0..L-1."""

    demand: jax.Array  # [V, E, B] float32: 1 demanded, 0 not
    mass: jax.Array  # [V, E, B] float32 gate mass
    touch: jax.Array  # [V, E, B] float32: access clock of the use
    end_touch: jax.Array  # [V, B] float32: clock after the visit's uses
    counted: jax.Array  # [V, B] float32: 1 if the visit enters the sums
    expert_bytes: jax.Array  # [L] float32
    last_touch: jax.Array  # scalar float32: at least any touch
    seconds: Seconds | None = None  # needed for stall and for prefetching
    score: jax.Array | None = None  # [V, E, B] float32: a policy's own of the visited layer's experts (`soft.scores`)

    @property
    def layers(self) -> int:
        return self.expert_bytes.shape[0]


class Seconds(NamedTuple):
    """What visits cost on some hardware."""

    copy_s: jax.Array  # [L] one expert over the link
    compute_s: jax.Array  # [V, E, B] of each demanded expert
    dense_s: jax.Array  # [V, B] from the experts' end to the next gate
    by_mass: jax.Array  # [V, M, B] int32: demanded ids in the order of their copies, -1 pads
    adds: jax.Array  # scalar: 0: residents run while others arrive; 1: when all are there


class Knobs(NamedTuple):
    """What has gradients."""

    weights: jax.Array  # [6], of `policies.features.Features` in order; with `Given.score` [7], the last of that
    budget_bytes: jax.Array  # a scalar for one pool, or [L] for a pool per layer (`quotas`)
    threshold: jax.Array | None = None  # scalar: prefetch what is wanted more
    want: jax.Array | None = None  # [V, E, B] want-scores of the next layer's experts, by any differentiable predictor


class Expected(NamedTuple):
    """Expectations of each visit, 0 where it is not counted."""

    misses: jax.Array  # [V, B] experts
    late: jax.Array  # [V, B] experts demanded while in flight
    prefetched: jax.Array  # [V, B] experts copied ahead
    stall_s: jax.Array  # [V, B] (0 without `Given.seconds`)
    occupancy_bytes: jax.Array  # [V, B] after the visit, of all pools


def given(
    parts: Sequence[Prepared],
    hardware: Hardware | None = None,
    least: int = 0,
    scores: Sequence[npt.NDArray[np.float32]] | None = None,
) -> Given:
    """Gives requests as one batch, padded to equal length (`least` visits or more) with visits that demand nothing.

    `scores` are a policy's own, [V, E] of each request.

    Raises SpecmdError for an empty batch, different models, resets, several precisions or a sequential contract.
    """
    if not parts:
        raise SpecmdError("a soft replay of no requests: expected at least one")
    shape = parts[0].schedule.layers, parts[0].schedule.experts
    for i, part in enumerate(parts):
        s = part.schedule
        if (s.layers, s.experts) != shape:
            raise SpecmdError(f"request {i} has {s.layers} x {s.experts} experts, expected {shape[0]} x {shape[1]}")
        if s.reset.any():
            raise SpecmdError(f"request {i} resets the cache inside, expected a batch element for each request")
        if len(part.sizes.units) != 2:
            raise SpecmdError(f"request {i} has {len(part.sizes.units) - 1} stored precisions, expected one")
        if s.visits % s.layers or (s.layer != np.arange(s.visits) % s.layers).any():
            raise SpecmdError(f"request {i} has a sequential contract, expected 'event'")
    visits = max(least, *(part.schedule.visits for part in parts))

    def stacked(name: str, fill: float = 0, dtype: Any = np.float32) -> jax.Array:
        return together([np.asarray(getattr(part.schedule, name)) for part in parts], fill, dtype)

    def together(columns: Sequence[npt.NDArray[Any]], fill: float = 0, dtype: Any = np.float32) -> jax.Array:
        shape = (visits, *np.max([column.shape[1:] for column in columns], axis=0).astype(int))
        rows = np.full((*shape, len(parts)), fill, dtype)
        for i, column in enumerate(columns):
            rows[tuple(map(slice, column.shape))][..., i] = column
        return jnp.asarray(rows)

    count, clock, rank = stacked("count"), stacked("clock"), stacked("rank")
    demand = (count > 0).astype(jnp.float32)
    drafting_s = np.zeros((visits, len(parts)), np.float32)  # behind a visit
    for i, part in enumerate(parts):
        if part.schedule.drafting_s is not None:
            drafting_s[: part.schedule.visits, i] = part.schedule.drafting_s[:, 1]
    seconds = None
    if hardware is not None:
        costs = parts[0].costs(hardware)
        assert costs is not None
        at = jnp.arange(visits) % shape[0]
        flop_s, read_s = costs.expert_flop_s[at], costs.expert_read_s[-1][at]
        tokens, dense_flop_s, dense_read_s = stacked("tokens"), costs.dense_flop_s[at], costs.dense_read_s[at]
        dense_flop_s, dense_read_s = dense_flop_s[:, None], dense_read_s[:, None]
        if costs.context_read_s is not None and costs.context_flop_s is not None:
            decode = stacked("phase") == DECODE
            dense_flop_s = dense_flop_s + decode * costs.context_flop_s[at][:, None]
            dense_read_s = dense_read_s + decode * stacked("served") * costs.context_read_s[at][:, None]
        seconds = Seconds(
            copy_s=costs.copy_s[-1],
            compute_s=demand * (jnp.maximum(count * flop_s[:, None, None], read_s[:, None, None]) + costs.launch_s),
            dense_s=jnp.maximum(tokens * dense_flop_s, dense_read_s) + (costs.launch_s + costs.layer_s) + drafting_s,
            by_mass=stacked("by_mass", -1, np.int32),
            adds=costs.adds,
        )
    return Given(
        demand, stacked("mass"), clock[:, None] + rank, clock + demand.sum(axis=1), stacked("counted"),
        jnp.asarray(parts[0].sizes.level_bytes[-1], jnp.float32), jnp.max(clock) + shape[1] + 1, seconds,
        None if scores is None else together(scores),
    )  # fmt: skip


def weight_names(given: Given) -> tuple[str, ...]:
    """Gives what has a weight, in order: the features, then a policy's own score, where it is given."""
    return Features._fields if given.score is None else (*Features._fields, TRUST)


def quotas(logits: jax.Array, total_bytes: float | jax.Array) -> jax.Array:
    """Gives [L] bytes of each layer's pool: a softmax over the layers of [L] `logits`, times the total."""
    return jax.nn.softmax(logits) * jnp.asarray(total_bytes, logits.dtype)


def whole_quotas(budget_bytes: npt.ArrayLike, expert_bytes: npt.ArrayLike, experts: int) -> npt.NDArray[np.int64]:
    """Gives [L] bytes of whole experts, 1..`experts` per layer, within the sum of `budget_bytes`; largest lack first.

    Raises SpecmdError for shapes that differ, or a sum that does not hold an expert of every layer.
    """
    wanted, sizes = np.asarray(budget_bytes, np.float64), np.asarray(expert_bytes, np.int64)
    if wanted.shape != sizes.shape or wanted.ndim != 1:
        raise SpecmdError(f"budgets of shape {wanted.shape}, expected one for each of {sizes.size} layers")
    left = wanted.sum() * (1 + 1e-6) - sizes.sum()
    if not left >= 0:
        raise SpecmdError(f"budgets sum to {wanted.sum():.0f} bytes, expected at least one expert of every layer")
    slots = np.ones(sizes.shape, np.int64)
    while True:
        lacks = np.where((slots < experts) & (sizes <= left), wanted / sizes - slots, -np.inf)
        layer = int(np.argmax(lacks))
        if lacks[layer] == -np.inf:
            return slots * sizes
        slots[layer] += 1
        left -= sizes[layer]


class _State(NamedTuple):
    resident: jax.Array  # [L, E, B]
    flight: jax.Array  # [L, E, B] how much of it is a prefetch that has not arrived at the gate
    link_s: jax.Array  # [B] from the gate until the link is free
    memory: Memory


def replay(
    given: Given,
    knobs: Knobs,
    temperature: float | jax.Array,
    *,
    fast_decay: float = 0.7,
    slow_decay: float = 0.95,
    window: int = WINDOW,
    truncate: bool = False,
    steps: int = 12,
) -> Expected:
    """Replays a batch of requests from empty caches.

    Args:
      given: the requests (`given`).
      knobs: what gradients are wanted of; dtypes follow the weights' (float32 or float64).
      temperature: in units of keep-scores, of want-scores and of one copy. Traced: annealing compiles once.
      fast_decay, slow_decay: settings of `weighted`.
      window: visits (passes, if layers are on their own) between kept states; the rest is computed again backwards.
      truncate: cut the gradient at windows, as backpropagation through a part of time does.
      steps: halvings that look for the eviction's cut; more for a temperature below 1/1000.

    Raises:
      SpecmdError: shapes that do not fit together, want-scores without threshold or seconds, numbers out of range.
    """
    _check(given, knobs, temperature, window, steps)
    floats = jnp.asarray(knobs.budget_bytes, knobs.weights.dtype)  # as whole bytes, they may overflow an int32
    knobs = knobs._replace(budget_bytes=floats)
    settings = _Settings(fast_decay, slow_decay, window, truncate, steps)
    layers, lanes, kind = given.layers, given.demand.shape[2], knobs.weights.dtype
    temperature, largest = jnp.asarray(temperature, kind), jnp.max(given.expert_bytes)
    size = (given.expert_bytes / largest).astype(kind)  # of the largest: sums stay small
    budget = knobs.budget_bytes / largest.astype(kind)
    if knobs.want is not None or not budget.ndim:
        pools = budget.reshape(-1, 1, 1)
        found = _scan(given, knobs, pools, size[:, None, None], temperature, layers, settings)
    else:
        # pools on their own never meet: each becomes a lane with a cache of one layer, and a step is a whole pass
        def lane(column: jax.Array) -> jax.Array:  # [P * L, ..., B] -> [P, ..., L * B]
            apart = jnp.moveaxis(column.reshape(-1, layers, *column.shape[1:]), 1, -2)
            return apart.reshape(*apart.shape[:-2], layers * lanes)

        def spread(values: jax.Array) -> jax.Array:  # [L] -> [1, 1, L * B]
            return jnp.repeat(values, lanes)[None, None]

        columns = given._replace(expert_bytes=jnp.ones(1), last_touch=jnp.zeros(()), seconds=None)
        apart = jax.tree.map(lambda c: lane(c) if c.ndim > 1 else c, columns)._replace(last_touch=given.last_touch)
        if given.seconds is not None:
            each = given.seconds._replace(copy_s=jnp.zeros(()))
            each = jax.tree.map(lambda c: lane(c) if c.ndim > 1 else c, each)
            apart = apart._replace(seconds=each._replace(copy_s=spread(given.seconds.copy_s)))
        found = _scan(apart, knobs, spread(budget), spread(size), temperature, 1, settings)
        found = jax.tree.map(lambda x: x.reshape(x.shape[0] * layers, lanes), found)
    return found._replace(occupancy_bytes=found.occupancy_bytes * largest.astype(kind))


class _Settings(NamedTuple):
    fast_decay: float
    slow_decay: float
    window: int
    truncate: bool
    steps: int


def _scan(
    given: Given,
    knobs: Knobs,
    budget: jax.Array,
    size: jax.Array,
    temperature: jax.Array,
    layers: int,
    settings: _Settings,
) -> Expected:
    """Budget [1 or L, 1, 1 or B] and size [L or 1, 1, 1 or B] are in sizes of the largest expert."""
    visits, experts, lanes = given.demand.shape
    kind = knobs.weights.dtype
    rows = jnp.arange(layers)[:, None, None]
    axes = (0, 1) if budget.shape[0] == 1 and layers > 1 else (1,)
    timed, fetches = given.seconds, knobs.want is not None
    copy_s = jnp.zeros((), kind) if timed is None else timed.copy_s.astype(kind)
    decays = jnp.float32(settings.fast_decay), jnp.float32(settings.slow_decay)

    def pooled(units: jax.Array) -> jax.Array:  # [L, E, B] -> [1 or L, 1, B]
        return jnp.sum(units * size, axes, keepdims=True)

    def visit(state: _State, now: Now) -> tuple[_State, Expected]:
        layer = jnp.mod(now.index, layers)
        pass_id = now.index // layers
        here, next_row = rows == layer, rows == jnp.mod(layer + 1, layers)
        demand = jnp.where(here, now.demand[None], 0).astype(kind)
        miss, late = demand * (1 - state.resident), demand * state.flight
        memory = seen(state.memory, here, now, pass_id, decays)
        resident = state.resident + miss
        fits = pooled(demand) <= budget * (1 + 1e-6)  # a larger demand pins nothing
        alone = jnp.any(here & ~fits, axis=(0, 1)) if len(axes) == 1 else ~fits[0, 0]  # [B]
        pinned = jnp.where(fits, demand, 0) + jnp.where(alone[None, None], 0, state.flight * (1 - demand))
        missed, late_row = jnp.sum(miss, axis=0), jnp.sum(late, axis=0)  # [E, B]
        link_s, stall_s, flight = state.link_s, jnp.zeros(lanes, kind), state.flight
        started = jnp.zeros((experts, lanes), kind)
        if timed is not None:
            here_s = jnp.sum(jnp.where(rows[:, 0] == layer, copy_s.reshape(layers, -1), 0), axis=0)  # [1 or B]
            done_s = experts_done_s(now, missed, late_row, here_s, link_s, timed.adds.astype(kind))
            stall_s = done_s - jnp.sum(now.compute_s, axis=0)
            gate_s = done_s + now.dense_s
            link_s = link_s + here_s * jnp.sum(missed, axis=0)
            if fetches:

                def there(table: jax.Array) -> jax.Array:
                    return jnp.sum(jnp.where(next_row, table, 0), axis=0)

                next_s, ahead = there(copy_s[:, None, None])[0], next_row.astype(kind)
                free = jnp.where(alone, 0, there((budget - pooled(pinned)) / size + jnp.zeros_like(pinned))[0])
                missing, wants = 1 - there(resident), (now.want, knobs.threshold)
                started, unarrived = prefetch(*wants, missing, free, link_s, gate_s, next_s, temperature)
                link_s = link_s + next_s * jnp.sum(started, axis=0)
                in_flight = jax.nn.sigmoid((state.link_s - gate_s) / (temperature * next_s))
                flight = state.flight * (1 - demand) * in_flight[None, None] + ahead * unarrived[None]
                arrived = ahead * started[None]
                resident, pinned = resident + arrived, pinned + arrived
                memory = with_arrivals(memory, arrived, pass_id + (layer + 1) // layers, now.end_touch)
            link_s = jnp.maximum(link_s - gate_s, 0)
        loose = jnp.maximum(resident - pinned, 0)
        touched = here | next_row if fetches else here
        amount = loose * size * (touched.astype(kind) if len(axes) == 1 else 1)
        score = keep_score(memory, knobs.weights, pass_id, layer, layers, decays, fetches)
        score = score + (FINEST / given.last_touch).astype(kind) * memory.touch
        stays = kept(score, amount, budget - pooled(pinned), temperature, axes, settings.steps)
        resident = pinned + loose * stays
        found = Expected(
            jnp.sum(missed, axis=0) * now.counted,
            jnp.sum(late_row, axis=0) * now.counted,
            jnp.sum(started, axis=0) * now.counted,
            stall_s * now.counted,
            jnp.sum(resident * size, axis=(0, 1)),
        )
        return _State(resident, flight, link_s, memory), jax.tree.map(lambda x: x.astype(kind), found)

    def stretch(state: _State, now: Now) -> tuple[_State, Expected]:
        if settings.truncate:
            state = jax.lax.stop_gradient(state)
        return jax.lax.scan(visit, state, now)

    window = min(settings.window, visits)
    counted = given.counted.astype(kind)
    now = Now(jnp.arange(visits), given.demand, given.mass, given.touch, given.end_touch, counted)
    if timed is not None:
        compute_s, dense_s = timed.compute_s.astype(kind), timed.dense_s.astype(kind)
        now = now._replace(compute_s=compute_s, dense_s=dense_s, by_mass=timed.by_mass)
    if knobs.want is not None:
        now = now._replace(want=jnp.maximum(knobs.want, LEAST_WANT).astype(kind))
    if given.score is not None:
        now = now._replace(score=given.score.astype(kind))

    def cut_up(column: jax.Array) -> jax.Array:
        blank = -visits % window
        padded = jnp.pad(column, ((0, blank), *((0, 0),) * (column.ndim - 1)))
        return padded.reshape(-1, window, *column.shape[1:])

    blank = jnp.zeros((layers, experts, lanes), kind)
    memory = Memory(blank - 1, blank - 1, *(blank.astype(jnp.float32),) * 4)
    if given.score is not None:
        memory = memory._replace(told=blank, sure=blank)
    begin = _State(blank, blank, jnp.zeros(lanes, kind), memory)
    found = jax.lax.scan(jax.checkpoint(stretch), begin, jax.tree.map(cut_up, now))[1]
    return jax.tree.map(lambda x: x.reshape(-1, lanes)[:visits], found)


def _check(given: Given, knobs: Knobs, temperature: Any, window: int, steps: int) -> None:
    """Raises SpecmdError, naming the argument, for what `replay` cannot take."""
    names = weight_names(given)
    if knobs.weights.shape != (len(names),):
        raise SpecmdError(f"weights of shape {knobs.weights.shape}, expected one for each of {names}")
    if (shape := np.shape(knobs.budget_bytes)) not in ((), (given.layers,)):
        raise SpecmdError(f"budget_bytes of shape {shape}, expected a number or one a layer ({given.layers})")
    if knobs.want is not None:
        if given.seconds is None or knobs.threshold is None:
            raise SpecmdError("want-scores need a threshold, and hardware in `given`: a prefetch competes for the link")
        if knobs.want.shape != given.demand.shape:
            raise SpecmdError(
                f"want of shape {knobs.want.shape}, expected {given.demand.shape}: visits, experts, batch"
            )
        if given.layers < 2:
            raise SpecmdError("want-scores need at least 2 layers: a layer is not ahead of itself")
    for name, value in (("window", window), ("steps", steps)):
        if value < 1:
            raise SpecmdError(f"{name} is {value}, expected at least 1")
    if not isinstance(temperature, Tracer) and not float(temperature) > 0:
        raise SpecmdError(f"temperature is {temperature}, expected above 0")
