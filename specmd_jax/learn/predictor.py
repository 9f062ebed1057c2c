"""The predictor as it is trained: float weights rounded to the steps that `policies.trained` computes with.

Each expert has two scores. `free` sees that expert's history alone. `tied` adds, for each target layer, D hidden
numbers of the wavefront (which experts of which layers the last L visits used) and S of the request's slow shares of
use, and compares them with a vector for each of the layer's experts. Rounding is straight through: the forward pass
sees the stored weights, the backward pass the ones behind them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.learn.examples import Batch
from specmd_jax.policies import use_history as history
from specmd_jax.policies.trained import ONE, Context, Free, Tied, Weights

STEP = 1 / 64  # of a weight
INT8, INT16 = 127, 32767
PLACES = {"evictor": 1, "prefetcher": 0}
"""How many layers from the target on the present token has already been through."""


def rounded(weight: jax.Array, most: int) -> jax.Array:
    """Gives the nearest multiple of `STEP` that is stored, with the gradient of `weight`."""
    near = jnp.clip(jnp.round(weight / STEP), -most, most) * STEP
    return weight + jax.lax.stop_gradient(near - weight)


class FreeScore(nn.Module):
    """[..., F] features of 0..255 -> [...] logits."""

    hidden: int = 32

    @nn.compact
    def __call__(self, seen: jax.Array | npt.NDArray[np.uint8]) -> jax.Array:
        width = seen.shape[-1]
        into = self.param("hidden", nn.initializers.normal(width**-0.5), (width, self.hidden))
        bias = self.param("hidden_bias", nn.initializers.zeros, (self.hidden,))
        out = self.param("out", nn.initializers.normal(0.1), (self.hidden,))
        start = self.param("bias", nn.initializers.constant(-2.0), ())
        found = jax.nn.relu(seen.astype(jnp.float32) / 256 @ rounded(into, INT16) + bias)
        return found @ rounded(out, INT16) + start


class ContextScore(nn.Module):
    """Inputs [B, L, E] of this token and of the one before -> [B, L, E] logits of every target layer's experts."""

    place: int  # layers from the target on that are of this token
    width: int
    shared: bool  # one map for all target layers

    @nn.compact
    def __call__(self, now: jax.Array, before: jax.Array) -> jax.Array:
        _, layers, experts = now.shape
        maps = 1 if self.shared else layers
        into = self.param("into", nn.initializers.normal(0.1), (maps, layers * experts, self.width))
        bias = self.param("bias", nn.initializers.zeros, (layers, self.width))
        out = self.param("out", nn.initializers.normal(0.1), (layers, experts, self.width))
        matrix = rounded(into, INT8).reshape(maps, layers, experts, self.width)
        target, layer = jnp.arange(layers)[:, None], jnp.arange(layers)
        passed = (layer < target + self.place)[..., None]  # [target, layer, 1]
        if self.shared:  # a sum over layers for each token, then which token's share counts for which target
            now, before = (jnp.einsum("nle,led->nld", x, matrix[0]) for x in (now, before))
            found = jnp.einsum("tl,nld->ntd", passed[..., 0].astype(jnp.float32), now - before)
            found += jnp.sum(before, axis=1)[:, None]
        else:
            mixed = jnp.where(passed, now[:, None], before[:, None])
            found = jnp.einsum("ntle,tled->ntd", mixed, matrix)
        return jnp.einsum("ntd,ted->nte", jax.nn.relu(found + bias), rounded(out, INT8))


class Predictor(nn.Module):
    """Both scores of a batch: logits [B, L, E] of `free` and of `tied`."""

    head: str
    hidden: int = 32
    width: int = 64  # D
    topics: int = 64  # S
    drop: float = 0.0  # share of the context's inputs that training hides

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> tuple[jax.Array, jax.Array]:
        _, layers, experts, _ = batch.seen.shape
        place = PLACES[self.head]

        def table(inputs: Any, unit: float) -> jax.Array:
            return jnp.asarray(inputs, jnp.float32).reshape(-1, layers, experts) / unit

        hide = nn.Dropout(self.drop, deterministic=not train)
        wave = hide(table(batch.wave, 16)), hide(table(batch.wave_before, 16))
        topic = table(batch.topic, 64), table(batch.topic_before, 64)
        tied = FreeScore(self.hidden, name="tied_free")(batch.seen)
        tied += self.param("tied_bias", nn.initializers.zeros, (layers, experts))
        tied += ContextScore(place, self.width, False, name="wave")(*wave)
        tied += ContextScore(place, self.topics, True, name="topic")(*topic)
        return FreeScore(self.hidden, name="free")(batch.seen), tied


def loss(logits: jax.Array, label: jax.Array | npt.NDArray[np.float32]) -> jax.Array:
    """Gives the cross-entropy of labels in 0..1, the mean over all experts."""
    return jnp.mean(jax.nn.softplus(logits) - label * logits)


def whole(params: Any) -> Weights:
    """Gives the stored integers of trained float parameters."""

    def integers(values: Any, unit: float, kind: Any) -> np.ndarray:
        limit = {np.int8: INT8, np.int16: INT16}.get(kind, np.iinfo(np.int32).max)
        return np.asarray(np.clip(np.rint(np.asarray(values, np.float64) * unit), -limit, limit)).astype(kind)

    def free(part: Any) -> Free:
        return Free(
            integers(part["hidden"], 64, np.int16),
            integers(part["hidden_bias"], 64 * 256, np.int32),
            integers(part["out"], 64, np.int16),
            integers(part["bias"], ONE, np.int32),
        )

    def context(part: Any, unit: float) -> Context:
        return Context(
            integers(part["into"], 64, np.int8),
            integers(part["bias"], 64 * unit, np.int32),
            integers(part["out"], 64, np.int8),
        )

    tied = Tied(
        free(params["tied_free"]),
        integers(params["tied_bias"], ONE, np.int32),
        context(params["wave"], 16),
        context(params["topic"], 64),
    )
    assert tied.free.hidden.shape[0] == history.FEATURES
    return Weights(free(params["free"]), tied)
