"""Linear maps from a model's activations at one layer to the router logits of a later one, trained on its own text.

A map is what a prefetcher could run beside the model: it sees the residual stream in front of a layer's attention, or
what the layer's router sees, divided by its root mean square, and gives logits of a router that is still to come. Its
target is that router's own distribution (cross entropy), which beats the K chosen experts alone as a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specmd_jax.errors import SpecmdError
from specmd_jax.learn.settings import MapSettings
from specmd_jax.learn.stall import Cost

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
EPSILON = 1e-6
WEIGHT_BYTES = 2  # of a map's weights where a machine reads them: bfloat16


class Shown(NamedTuple):
    """N tokens: what s maps see, and what they should say."""

    activations: Halves  # [N, s, D]
    logits: Floats  # [N, s, E] of the routers that are predicted
    ids: npt.NDArray[np.int64]  # [N, s, K] which experts they chose


class Maps(NamedTuple):
    """A map for each of s layers. Logits are ``weight @ (down @ x) + bias``; without ``down`` ``weight @ x + bias``."""

    down: Any  # [s, r, D], or None
    weight: Any  # [s, E, r], [s, E, D] without `down`
    bias: Any  # [s, E]

    @property
    def cost(self) -> Cost:
        """One map, run for one token: a multiply-add is two FLOPs; activations are there, weights are read."""
        inner = sum(array[0].size for array in (self.down, self.weight) if array is not None)
        return Cost(2 * inner, WEIGHT_BYTES * (inner + self.bias[0].size))


class Fitted(NamedTuple):
    """Trained maps, of the epoch with the best recall on validation tokens."""

    maps: Maps
    epoch: int  # from 1
    validation_recall: float  # of the K experts, with K predicted


def shown(activations: Halves, logits: Floats, ids: npt.NDArray[np.integer[Any]], ahead: int) -> Shown:
    """Pairs what layers see ([N, L, D]) with the routers ``ahead`` layers later ([N, L, E], [N, L, K]); 0: their own.

    Raises SpecmdError where no layer is that far ahead.
    """
    layers = logits.shape[1] - ahead
    if ahead < 0 or layers < 1:
        raise SpecmdError(f"{ahead} layers ahead of {logits.shape[1]}: expected 0 to {logits.shape[1] - 1}")
    return Shown(activations[:, :layers], logits[:, ahead:], ids[:, ahead:].astype(np.int64))


def fit_maps(train: Shown, validation: Shown, routers: Floats, settings: MapSettings) -> Fitted:
    """Trains a map for each layer; one without a rank begins as the router that it predicts, ``routers`` [s, E, D]."""
    settings.check()
    maps = _start(routers, settings)
    steps = -(-len(train.ids) // settings.batch)
    rate = optax.cosine_decay_schedule(settings.learning_rate, steps * settings.epochs)
    optimizer = optax.adamw(rate, weight_decay=settings.weight_decay)

    @jax.jit
    def update(maps: Maps, memory: Any, activations: jax.Array, logits: jax.Array) -> tuple[Maps, Any]:
        def objective(maps: Maps) -> jax.Array:
            target = jax.nn.softmax(logits, axis=-1)
            return optax.softmax_cross_entropy(_apply(maps, activations), target).mean()

        change, memory = optimizer.update(jax.grad(objective)(maps), memory, maps)
        return jax.tree.map(jnp.add, maps, change), memory

    memory, best = optimizer.init(maps), Fitted(maps, 0, -1.0)
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(train.ids))
        for begin in range(0, len(order), settings.batch):  # batches of one size: the last is filled from the first
            rows = np.take(order, np.arange(begin, begin + settings.batch), mode="wrap")
            maps, memory = update(maps, memory, train.activations[rows], train.logits[rows])
        tokens, _, top_k = validation.ids.shape
        right, asked = recalled(
            predicted(maps, validation.activations), validation.ids, np.array([tokens]), [top_k]
        ).sum(axis=(1, 2))
        found = float(right / asked)
        if found > best.validation_recall:
            best = Fitted(maps, epoch + 1, found)
    return best._replace(maps=Maps(*(None if array is None else np.asarray(array) for array in best.maps)))


def predicted(maps: Maps, activations: Halves) -> Floats:
    """Gives the probabilities [N, s, E] that maps predict from activations [N, s, D]."""
    parts = np.array_split(activations, max(1, len(activations) // 4096))
    return np.concatenate([np.asarray(_probabilities(maps, part)) for part in parts])


def recalled(
    scores: Floats, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.integer[Any]], counts: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Gives [counts + 1, R, s] of the chosen experts ``ids`` [N, s, K] those among the best ``counts`` of ``scores``
    [N, s, E] (ties: the lower id), then all of them, by request; ``lengths`` [R] are their tokens, at least 1 each.
    """
    best = np.argsort(-scores, axis=-1, kind="stable")
    rank = np.empty_like(best)
    np.put_along_axis(rank, best, np.arange(scores.shape[-1])[None, None], axis=-1)
    mine = np.take_along_axis(rank, ids, axis=-1)  # of each chosen expert
    starts = np.cumsum(lengths) - lengths
    right = [*((mine < count).sum(axis=-1) for count in counts), np.full(mine.shape[:2], mine.shape[2])]
    return np.stack([np.add.reduceat(each, starts, axis=0) for each in right])


def _start(routers: Floats, settings: MapSettings) -> Maps:
    layers, experts, width = routers.shape
    bias = jnp.zeros((layers, experts), jnp.float32)
    if not settings.rank:
        return Maps(None, jnp.asarray(routers), bias)
    draw = np.random.default_rng(settings.seed).normal(0, width**-0.5, (layers, settings.rank, width))
    return Maps(jnp.asarray(draw, jnp.float32), jnp.zeros((layers, experts, settings.rank), jnp.float32), bias)


def _apply(maps: Maps, activations: jax.Array) -> jax.Array:
    x = activations.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    if maps.down is not None:
        x = jnp.einsum("nsd,srd->nsr", x, maps.down)
    return jnp.einsum("nsd,sed->nse", x, maps.weight) + maps.bias[None]


@jax.jit
def _probabilities(maps: Maps, activations: jax.Array) -> jax.Array:
    return jax.nn.softmax(_apply(maps, activations), axis=-1)
