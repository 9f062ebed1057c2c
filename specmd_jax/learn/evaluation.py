"""What a predictor is worth on requests it never saw: hits and recall by request, and intervals over requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.engines.curves import curves
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import simulate
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.examples import decoded
from specmd_jax.learn.splits import groups
from specmd_jax.policies.base import Gate, Now, Size
from specmd_jax.policies.choice import Chosen, Mix, choose
from specmd_jax.programs import room_for_programs
from specmd_jax.replay.totals import LATE, PREFETCHED, REUSED
from specmd_jax.specs.capacity import Budget
from specmd_jax.trace import select_requests
from specmd_jax.types import Trace

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and the central 95 % of its bootstrap."""

    value: float
    low: float
    high: float


class HeldOut(NamedTuple):
    """Requests that judge a predictor, those it learned from, and why."""

    requests: Ints
    trained: Ints  # of this trace
    why: str


def held_out(trace: Trace, card: Mapping[str, Any], fingerprint: str) -> HeldOut:
    """Gives the requests of a trace that a predictor with this card has not learned from.

    Of a trace of the card's model, those of no group that its training or validation had (by the names of the groups,
    so that a part of the training trace, or more of it, is split alike); of another model's, all. `fingerprint` is that
    of the trace (`training.fingerprint`), which tells whether numbered requests are the same ones.

    Raises SpecmdError if none is left.
    """
    unit = str(card["settings"]["split"])
    everything, nothing = np.arange(trace.requests), np.zeros(0, np.int64)
    if trace.model != card["trace"]["model"]:
        return HeldOut(everything, nothing, f"all requests: it learned from {card['trace']['model']}")
    if unit == "request" and fingerprint != card["trace"]["sha256"]:
        return HeldOut(everything, nothing, "all requests: the predictor learned from another trace of this model")
    try:
        names = groups(trace, unit)
    except SpecmdError:
        return HeldOut(everything, nothing, f"all requests: the trace names no {unit}, so some may have been learned")
    known = card[unit]
    if unit == "request":
        names = np.array([str(int(name)) for name in names])
    trained = np.isin(names, known["train"])
    kept = np.flatnonzero(~trained & ~np.isin(names, known["validation"]))
    if not len(kept):
        raise SpecmdError(f"{trace.model}: the predictor's training or validation had each {unit} of this trace")
    count = len(np.unique(names[kept]))
    why = f"{len(kept)} of {trace.requests} requests: {count} groups by {unit} that training did not have"
    return HeldOut(kept, np.flatnonzero(trained), why)


def seen_requests(trace: Trace, card: Mapping[str, Any], fingerprint: str) -> tuple[int, str | None]:
    """Gives how many requests of a trace a predictor with this card had for training or validation, and how that is
    known; None: the trace does not say which they are. Arguments as for `held_out`.
    """
    unit = str(card["settings"]["split"])
    try:
        found = held_out(trace, card, fingerprint)
    except SpecmdError as error:
        return trace.requests, str(error)
    if trace.model == card["trace"]["model"] and unit != "request":
        try:
            groups(trace, unit)
        except SpecmdError:
            return 0, None
    return trace.requests - len(found.requests), found.why


def hits_by_request(
    trace: Trace,
    eviction: Chosen,
    budgets: Sequence[Budget],
    numbers: Mapping[str, Any] | None = None,
    contract: str = "event",
) -> Ints:
    """Gives [B, R] hits of each request at each budget: demand only, cache and policy fresh for every request."""
    room_for_programs()
    mix = Mix.of(eviction, numbers={"eviction": dict(numbers or {})})
    if mix.eviction.build().curve is not None:
        parts = [prepare(select_requests(trace, [r]), contract=contract) for r in range(trace.requests)]

        def total(part: Prepared) -> list[int]:
            sizes = [part.sizes.budget(budget) for budget in budgets]
            found = curves(part.schedule, part.sizes.units[1], sizes, mix.eviction, demand=part.demand)
            return [int(curve.hits.sum()) for curve in found]

        return np.array([total(part) for part in parts], np.int64).T
    replays = prepare(trace, reset_per_request=True, contract=contract)
    setup = replays.setup(mix, None, detail="events")
    sizes = jnp.asarray(np.stack([replays.sizes.budget(budget) for budget in budgets]))
    cell = replays.numbers(budgets[0], None)

    @jax.jit
    def outcomes(sizes: jax.Array, visits: Any) -> jax.Array:
        def one(size: jax.Array) -> jax.Array:
            events = simulate(setup, mix.build(), cell._replace(budget=size), visits)[1]
            assert events is not None
            kinds = events.outcome
            return jnp.sum((kinds == REUSED) | (kinds == PREFETCHED) | (kinds == LATE), axis=1)

        return jax.vmap(one)(sizes)

    hit = np.asarray(outcomes(sizes, replays.visits(setup, mix)))[:, : replays.schedule.visits]
    return np.stack([np.bincount(replays.schedule.request, row, trace.requests) for row in hit]).astype(np.int64)


def recall_by_request(
    trace: Trace,
    prefetch: Chosen,
    counts: Sequence[int],
    numbers: Mapping[str, Any] | None = None,
    shift: int = 0,
    ahead: int = 1,
) -> Ints:
    """Gives [counts + 1, R, L] used experts among the best `counts` predicted `ahead` layers before, then all used.

    Of decoded tokens. The predictor starts anew with every request; its first `ahead` visits, which nobody predicts,
    are left out. `ahead` of L is the next token. Further than the next layer, a predictor is asked as if the layers in
    between were already behind it, as it is in a replay. `shift` takes the predictions of that many visits before: a
    control.
    """
    room_for_programs()
    policy = choose("prefetch", prefetch, numbers).build()
    if policy is None:
        raise SpecmdError("prefetch is none, expected a predictor: nothing else has a recall")
    size, layers = Size(trace.layers, trace.experts, 1), trace.layers
    length = int((trace.lengths - trace.prompt_lengths).max()) * layers

    @jax.jit
    def predict(demand: jax.Array, mass: jax.Array) -> jax.Array:
        def visit(state: Any, given: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            index, used, weight = given
            gate = Gate(Now(index, jnp.mod(index, layers), index // layers, layers), used, weight, None, None)
            state = policy.observe(state, gate)
            there = gate._replace(now=gate.now._replace(layer=jnp.mod(index + ahead - 1, layers)))
            return state, policy.want(state, there, size)[0]

        return jax.lax.scan(visit, policy.init(size), (jnp.arange(length, dtype=jnp.int32), demand, mass))[1]

    found = np.zeros((len(counts) + 1, trace.requests, layers), np.int64)
    for r in range(trace.requests):
        tables = decoded(trace, np.array([r]))
        demand, mass = tables[0].reshape(-1, trace.experts), tables[1].reshape(-1, trace.experts)
        if len(demand) <= ahead:
            continue
        padded = [np.concatenate([x, np.zeros((length - len(x), trace.experts), x.dtype)]) for x in (demand, mass)]
        want = np.roll(np.asarray(predict(*padded))[: len(demand) - ahead], shift, axis=0)
        used, layer = demand[ahead:], np.arange(ahead, len(demand)) % layers
        best = np.argsort(-want, axis=1, kind="stable")
        chosen = np.take_along_axis(used & (want > -np.inf), best, axis=1)  # what is not wanted is not predicted
        for row, right in enumerate([*(chosen[:, :count].sum(axis=1) for count in counts), used.sum(axis=1)]):
            found[row, r] = np.bincount(layer, right, layers)
    return found


def ratio(parts: Floats | Ints, wholes: Floats | Ints, draws: int = 1000, seed: int = 0) -> Interval:
    """Gives the sum of `parts` over that of `wholes` ([R] each), with a bootstrap that draws whole requests."""
    picked = np.random.default_rng(seed).integers(0, len(parts), (draws, len(parts)))
    above, below = parts[picked].sum(axis=1), wholes[picked].sum(axis=1)
    found = above[below > 0] / below[below > 0]
    whole = wholes.sum()
    if whole <= 0 or not len(found):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(float(parts.sum() / whole), float(low), float(high))
