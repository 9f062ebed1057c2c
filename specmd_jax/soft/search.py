"""Finds the weights of `weighted`, or of features on top of a policy's own scores (`tuned`), and the layers' budgets:
by gradient through the soft cache, by evolution, at random.

All three search the same plane from the same start and pay the same price, counted in replays of a request: a gradient
costs `GRADIENT_REPLAYS`. Evolution and random search need no gradient and replay all but hard, at `HARD`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specmd_jax.checkpoints import checkpoints
from specmd_jax.errors import unknown
from specmd_jax.policies.features import ONE, Features
from specmd_jax.programs import room_for_programs
from specmd_jax.soft import replay as soft
from specmd_jax.soft.replay import Given, Knobs
from specmd_jax.soft.settings import METHODS, TUNED, Search

HARD = 1e-4  # a temperature so low that eviction is all but hard
START = Features(0.5, 0.0, 1.0, 1.0, 0.0, 0.0)  # pyright: ignore[reportArgumentType]
AS_IT_IS = Features(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # pyright: ignore[reportArgumentType]
"""The start on top of a policy's own scores, whose weight stays 1: the policy itself."""
MOST_WEIGHT = 8.0


class Progress(NamedTuple):
    """What a checkpoint holds."""

    step: jax.Array  # int32: updates so far
    point: jax.Array  # [6 + L]: weights and budgets, as steps from the start in units of their spread
    score: jax.Array  # float32: the point's miss rate, of random search
    optimizer: Any
    best: jax.Array  # [6 + L]: the point of the round with the lowest validation loss
    best_loss: jax.Array  # float32: its miss rate there, with whole experts
    history: jax.Array  # [rounds] float32: that of each round (nan: still to come)
    spent_s: jax.Array  # float32: seconds of the updates, compiling and validation left out


class Found(NamedTuple):
    """A finished search."""

    weights: dict[str, float]  # numbers of `weighted`, or of `tuned`, multiples of 1/1024
    budget_bytes: npt.NDArray[np.int64]  # [L] whole experts
    loose_bytes: npt.NDArray[np.float64]  # [L] before rounding
    validation: float  # miss rate
    history: list[float]  # of the rounds
    replays: int
    seconds: float


def tune(
    batches: Sequence[Given],
    validation: Given,
    total_bytes: float,
    method: str,
    tuned: str,
    search: Search,
    folder: Path,
    report: Callable[[str], object] = print,
) -> Found:
    """Searches, or goes on from the last checkpoint in `folder`; the round that validates best is taken.

    With a policy's own scores (`Given.score`) the search begins at that policy, and stays there if no round validates
    better.

    Args:
      batches: training requests, all of one shape, taken in turn.
      validation: requests that choose the round.
      total_bytes: what the layers' budgets sum to.
      method, tuned: one of `METHODS`, one of `TUNED`. What is not tuned stays at its start, or equal for all layers.
      folder: for the checkpoints of this search alone.

    Raises:
      SpecmdError: an unknown name, or settings out of range.
    """
    room_for_programs()
    search.check()
    if method not in METHODS:
        raise unknown("method of search", method, METHODS)
    if tuned not in TUNED:
        raise unknown("thing to tune", tuned, TUNED)
    layers, weights = validation.layers, len(START)
    mask = jnp.asarray([tuned != "budgets"] * weights + [tuned != "weights"] * layers, jnp.float32)
    updates = search.updates(method)
    rounds = min(search.rounds, updates)
    ends = [updates * (i + 1) // rounds for i in range(rounds)]
    point = jnp.zeros(weights + layers)
    progress = Progress(
        jnp.int32(0), point, jnp.float32(jnp.inf), _adam(0.0, updates).init(point), point, jnp.float32(jnp.inf),
        jnp.full(rounds, jnp.nan), jnp.float32(0),
    )  # fmt: skip
    update = partial(_UPDATES[method], search, updates)
    with checkpoints(folder) as kept:
        if kept.latest is not None:
            progress = Progress(**kept.restore(progress._asdict()))
            report(f"goes on after update {int(progress.step)} of {updates}")
        else:
            jax.block_until_ready(update(progress, mask, total_bytes, batches[0]))  # compiles; not part of the price
            if validation.score is not None:
                rate = miss_rate(validation, *numbers(point, total_bytes, validation, search)[:2], search)
                progress = progress._replace(best_loss=jnp.float32(rate))
                report(f"as it is: validation misses {100 * rate:.2f} %")
        for number, end in enumerate(ends):
            if int(progress.step) >= end:
                continue
            began = time.perf_counter()
            while int(progress.step) < end:
                # random points are compared on the same requests, others see all of them in turn
                turn = 0 if method == "random" else int(progress.step) % len(batches)
                progress = jax.block_until_ready(update(progress, mask, total_bytes, batches[turn]))
            spent_s = float(progress.spent_s) + time.perf_counter() - began
            rate = miss_rate(validation, *numbers(progress.point, total_bytes, validation, search)[:2], search)
            progress = progress._replace(history=progress.history.at[number].set(rate), spent_s=jnp.float32(spent_s))
            if rate < float(progress.best_loss):
                progress = progress._replace(best=progress.point, best_loss=jnp.float32(rate))
            kept.save(end, progress._asdict())
            report(f"update {end} of {updates}: validation misses {100 * rate:.2f} %")
    named, whole, loose = numbers(progress.best, total_bytes, validation, search)
    history = [float(rate) for rate in progress.history]
    seconds = float(progress.spent_s)
    return Found(named, whole, loose, float(progress.best_loss), history, search.replays(method), seconds)


def numbers(
    point: jax.Array, total_bytes: float, given: Given, search: Search
) -> tuple[dict[str, float], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Gives a point's settings of `weighted` and its bytes [L] of whole experts; also those unrounded."""
    knobs = _knobs(point, total_bytes, search, given)
    rounded = np.round(np.asarray(knobs.weights, np.float64) * ONE) / ONE
    named = dict(zip(soft.weight_names(given), map(float, rounded), strict=True))
    named |= {"fast_decay": search.fast_decay, "slow_decay": search.slow_decay}
    loose = np.asarray(knobs.budget_bytes, np.float64)
    sizes = np.asarray(given.expert_bytes, np.float64).astype(np.int64)
    return named, soft.whole_quotas(loose, sizes, given.demand.shape[1]), loose


def start_of(given: Given) -> Features:
    """Gives the features' weights that a search begins with."""
    return START if given.score is None else AS_IT_IS


def beginning(given: Given, search: Search) -> dict[str, float]:
    """Gives the numbers of the policy that a search begins with, as `numbers` gives them."""
    total = float(jnp.sum(given.expert_bytes)) * given.demand.shape[1]  # any that holds what has to be there
    return numbers(jnp.zeros(len(START) + given.layers), total, given, search)[0]


def miss_rate(
    given: Given, weights: dict[str, float], budget_bytes: npt.ArrayLike, search: Search, temperature: float = HARD
) -> float:
    """Gives expected misses over demand of all requests, with numbers as `numbers` gives them."""
    values = jnp.asarray([weights[name] for name in soft.weight_names(given)], jnp.float32)
    knobs = Knobs(values, jnp.asarray(np.asarray(budget_bytes, np.float64), jnp.float32))
    return float(_rate(given, knobs, jnp.float32(temperature), (search.fast_decay, search.slow_decay)))


@partial(jax.jit, static_argnames="decays")
def _rate(given: Given, knobs: Knobs, temperature: jax.Array, decays: tuple[float, float]) -> jax.Array:
    found = soft.replay(given, knobs, temperature, fast_decay=decays[0], slow_decay=decays[1])
    return jnp.sum(found.misses) / jnp.sum(given.demand * given.counted[:, None])


def _knobs(point: jax.Array, total_bytes: float | jax.Array, search: Search, given: Given) -> Knobs:
    start = jnp.asarray(start_of(given))
    weights = jnp.clip(start + search.weight_spread * point[: len(START)], -MOST_WEIGHT, MOST_WEIGHT)
    if given.score is not None:
        weights = jnp.append(weights, 1.0)  # only the ratio to the others says anything
    return Knobs(weights, soft.quotas(search.budget_spread * point[len(START) :], total_bytes))


def _loss(search: Search, point: jax.Array, total_bytes: float, given: Given, temperature: Any) -> jax.Array:
    knobs = _knobs(point, total_bytes, search, given)
    return _rate(given, knobs, jnp.asarray(temperature, jnp.float32), (search.fast_decay, search.slow_decay))


@partial(jax.jit, static_argnums=(0, 1))
def _by_gradient(
    search: Search, updates: int, old: Progress, mask: jax.Array, total_bytes: float, given: Given
) -> Progress:
    """Adam along the gradient of the soft cache, which cools down geometrically."""
    temperature = search.hot * (search.cold / search.hot) ** (old.step.astype(jnp.float32) / max(1, updates - 1))
    slope = jax.grad(lambda point: _loss(search, point, total_bytes, given, temperature))(old.point)
    return _moved(old, _adam(search.learning_rate, updates), slope * mask)


@partial(jax.jit, static_argnums=(0, 1))
def _by_evolution(
    search: Search, updates: int, old: Progress, mask: jax.Array, total_bytes: float, given: Given
) -> Progress:
    """Adam along what mirrored random steps say of the slope, weighed by rank (an evolution strategy)."""
    key = jax.random.fold_in(jax.random.key(search.seed), old.step)
    half = jax.random.normal(key, (search.population // 2, old.point.size)) * mask[None]
    steps = jnp.concatenate([half, -half])
    losses = jax.vmap(lambda step: _loss(search, old.point + search.mutation * step, total_bytes, given, HARD))(steps)
    rank = jnp.argsort(jnp.argsort(losses)).astype(jnp.float32) / (search.population - 1) - 0.5
    slope = jnp.mean(rank[:, None] * steps, axis=0) / search.mutation
    return _moved(old, _adam(search.evolution_rate, updates), slope)


@partial(jax.jit, static_argnums=(0, 1))
def _by_chance(
    search: Search, updates: int, old: Progress, mask: jax.Array, total_bytes: float, given: Given
) -> Progress:
    """Takes the best of independent points."""
    del updates
    key = jax.random.fold_in(jax.random.key(search.seed), old.step)
    points = jax.random.normal(key, (search.population, old.point.size)) * mask[None]
    losses = jax.vmap(lambda point: _loss(search, point, total_bytes, given, HARD))(points)
    best = jnp.argmin(losses)
    better = losses[best] < old.score
    return old._replace(
        step=old.step + 1,
        point=jnp.where(better, points[best], old.point),
        score=jnp.where(better, losses[best], old.score),
    )


def _adam(rate: float, updates: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, updates, 0.05))


def _moved(old: Progress, optimizer: Any, slope: jax.Array) -> Progress:
    change, memory = optimizer.update(slope, old.optimizer, old.point)
    return old._replace(step=old.step + 1, point=optax.apply_updates(old.point, change), optimizer=memory)


_UPDATES: dict[str, Callable[..., Progress]] = {
    "gradient": _by_gradient,
    "evolution": _by_evolution,
    "random": _by_chance,
}
