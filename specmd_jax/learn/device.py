"""Training by JAX, on whatever device it has: one program for each update of `learn.predictor`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specmd_jax.learn.examples import Batch, Examples, Ids, batch, labels
from specmd_jax.learn.predictor import Predictor, loss
from specmd_jax.learn.settings import Settings


class DeviceState(NamedTuple):
    """What a run goes on from: the network and its optimizer."""

    step: jax.Array  # int32: updates so far
    weights: Any
    optimizer: Any


class Device:
    """The programs of one run. Every target layer learns from every token."""

    def __init__(self, params: Any, settings: Settings) -> None:
        """Takes the first `params` of `Predictor`."""
        self._first, self._settings, self._model = params, settings, model(settings)
        # the rate comes with each update, so that both engines are told it in the same way
        self._optimizer = optax.inject_hyperparams(optax.adamw, static_args=("b2", "weight_decay"))(
            learning_rate=0.0, b2=0.99, weight_decay=settings.weight_decay
        )
        self._labels: tuple[Examples, npt.NDArray[np.float32]] | None = None  # of the window at hand
        self._update = jax.jit(self._updated)

    def start(self) -> DeviceState:
        """Gives the state before the first update."""
        return DeviceState(jnp.int32(0), self._first, self._optimizer.init(self._first))

    def params(self, weights: Any) -> Any:
        """Gives `DeviceState.weights` as parameters of `Predictor`."""
        return weights

    def update(self, state: DeviceState, found: Examples, rows: Ids, rate: float) -> tuple[DeviceState, jax.Array]:
        """Learns some tokens [B] of a window at a learning rate; gives the new state, and the mean loss before."""
        return self._update(state, self._batch(found, rows), jnp.float32(rate))

    def losses(self, weights: Any, found: Examples, rows: Ids) -> tuple[npt.NDArray[np.float64], float]:
        """Gives the mean loss [B] of some tokens, and the mean of the score of lone histories over all of them."""
        each, free = token_losses(self._model, weights, self._batch(found, rows))
        return np.asarray(each).astype(np.float64), float(free)

    def _batch(self, found: Examples, rows: Ids) -> Batch:
        if self._labels is None or self._labels[0] is not found:
            self._labels = found, labels(found, self._settings.head, self._settings.fade)
        return batch(found, self._labels[1], rows, self._settings.head)

    def _updated(self, state: DeviceState, given: Batch, rate: jax.Array) -> tuple[DeviceState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(self._settings.seed), state.step)

        def objective(params: Any) -> tuple[jax.Array, jax.Array]:
            free, tied = logits(self._model, params, given, train=True, rngs={"dropout": key})
            return loss(free, given.label) + loss(tied, given.label), loss(tied, given.label)

        (_, value), slope = jax.value_and_grad(objective, has_aux=True)(state.weights)
        memory = state.optimizer._replace(hyperparams={**state.optimizer.hyperparams, "learning_rate": rate})
        change, memory = self._optimizer.update(slope, memory, state.weights)
        return DeviceState(state.step + 1, optax.apply_updates(state.weights, change), memory), value


def model(settings: Settings) -> Predictor:
    """Gives the network that some settings describe."""
    return Predictor(settings.head, settings.hidden, settings.width, settings.topics, settings.drop)


def first_params(found: Examples, settings: Settings) -> Any:
    """Gives the parameters that training begins with, drawn by the seed, for the shape of some examples."""
    one = batch(found, found.demand[:1].astype(np.float32), np.zeros(1, np.int64), settings.head)
    return jax.jit(model(settings).init)(jax.random.key(settings.seed), one)["params"]


def logits(network: Predictor, params: Any, given: Batch, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Gives both scores of a batch."""
    return cast("tuple[jax.Array, jax.Array]", network.apply({"params": params}, given, **options))


@partial(jax.jit, static_argnames="network")
def token_losses(network: Predictor, params: Any, given: Batch) -> tuple[jax.Array, jax.Array]:
    """Gives the loss [B] of each token, and the mean of the score of lone histories."""
    free, tied = logits(network, params, given)
    return jax.vmap(loss)(tied, given.label), loss(free, given.label)
