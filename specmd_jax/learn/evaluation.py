"""What a predictor is worth on requests it never saw: hits and recall by request, and intervals over requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.engines.curves import Curves
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import simulate
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.examples import decoded
from specmd_jax.learn.splits import groups
from specmd_jax.policies.base import Gate, Now, Size, renew
from specmd_jax.policies.choice import Chosen, Mix, choose
from specmd_jax.programs import room_for_programs
from specmd_jax.replay.totals import LATE, PREFETCHED, REUSED
from specmd_jax.schedule.demand import cut, widest_demand
from specmd_jax.specs.capacity import Budget
from specmd_jax.trace import select_requests
from specmd_jax.trace.prompts import without_prompts
from specmd_jax.types import Trace

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
AHEAD = "ahead"  # the column of `Gate` with recorded scores


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
    """Gives [B, R] hits of each request at each budget: demand only, the cache emptied before every request.

    So is what a policy remembers, but for what it carries over (`Eviction.carried`): requests come in their order.
    """
    room_for_programs()
    mix = Mix.of(eviction, numbers={"eviction": dict(numbers or {})})
    replays = prepare(trace, reset_per_request=True, contract=contract)
    if mix.eviction.build().curve is not None:
        return _hits_by_curves(replays, mix, budgets)
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


def _hits_by_curves(replays: Prepared, mix: Mix, budgets: Sequence[Budget]) -> Ints:
    schedule, demand = replays.schedule, replays.demand
    under_way = Curves(
        schedule.layers,
        schedule.experts,
        widest_demand(demand, schedule.layers),
        replays.sizes.units[1],
        [replays.sizes.budget(budget) for budget in budgets],
        mix.eviction,
    )
    so_far = np.zeros((len(budgets), replays.trace.requests + 1), np.int64)
    ends = np.searchsorted(schedule.request, np.arange(replays.trace.requests), side="right")
    for r, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        for step in under_way.steps:
            step(cut(demand, int(first), int(end)), int(first))
        so_far[:, r + 1] = [curve.hits.sum() for curve in under_way.totals()]
    return np.diff(so_far, axis=1)


def recall_by_request(
    trace: Trace,
    prefetch: Chosen,
    counts: Sequence[int],
    numbers: Mapping[str, Any] | None = None,
    shift: int = 0,
    ahead: int = 1,
) -> Ints:
    """Gives [counts + 1, R, L] used experts among the best `counts` predicted `ahead` layers before, then all used.

    Of decoded tokens. The predictor starts anew with every request but for what it carries over (`Prefetch.carried`);
    its first `ahead` visits, which nobody predicts,
    are left out. `ahead` of L is the next token. Further than the next layer, a predictor is asked as if the layers in
    between were already behind it, as it is in a replay. `shift` takes the predictions of that many visits before: a
    control.

    Raises SpecmdError for a policy that reads the future, one that cannot look so far ahead, and one that reads scores
    (`gate_ahead`) which the trace does not have.
    """
    room_for_programs()
    policy = choose("prefetch", prefetch, numbers).build()
    if policy is None:
        raise SpecmdError("prefetch is none, expected a predictor: nothing else has a recall")
    if policy.needs not in (None, AHEAD) or (policy.needs == AHEAD and trace.ahead is None):
        lacks = "the trace has no scores of the next layer" if policy.needs == AHEAD else "it reads the future"
        raise SpecmdError(f"recall of {prefetch}: {lacks}")
    if policy.most_horizon is not None and ahead > policy.most_horizon:
        raise SpecmdError(f"recall of {prefetch}, {ahead} layers ahead: it looks at most {policy.most_horizon} ahead")
    size, layers = Size(trace.layers, trace.experts, 1), trace.layers
    length = int((trace.lengths - trace.prompt_lengths).max()) * layers

    @jax.jit
    def predict(
        before: Any, count: jax.Array, demand: jax.Array, mass: jax.Array, scores: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        def visit(index: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            state, wants = carry
            now = Now(index, jnp.mod(index, layers), index // layers, layers)
            gate = Gate(now, demand[index], mass[index], None if scores is None else scores[index], None)
            state = policy.observe(state, gate)
            there = gate._replace(now=now._replace(layer=jnp.mod(index + ahead - 1, layers)))
            return state, wants.at[index].set(policy.want(state, there, size)[0])

        state = renew(policy, before, policy.init(size))
        return jax.lax.fori_loop(0, count, visit, (state, jnp.zeros(demand.shape, jnp.float32)))

    state = policy.init(size)
    found = np.zeros((len(counts) + 1, trace.requests, layers), np.int64)
    for r in range(trace.requests):
        tables = decoded(trace, np.array([r]))
        demand, mass = tables[0].reshape(-1, trace.experts), tables[1].reshape(-1, trace.experts)
        if len(demand) <= ahead:
            continue
        told = [demand, mass]
        if policy.needs == AHEAD:
            scores = without_prompts(select_requests(trace, [r])).ahead
            assert scores is not None
            told.append(scores.astype(np.float32).reshape(-1, trace.experts))
        padded = [np.concatenate([x, np.zeros((length - len(x), trace.experts), x.dtype)]) for x in told]
        padded += [None] * (3 - len(padded))
        state, wants = predict(state, jnp.int32(len(demand)), *padded)
        want = np.roll(np.asarray(wants)[: len(demand) - ahead], shift, axis=0)
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
