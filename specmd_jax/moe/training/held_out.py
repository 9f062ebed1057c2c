"""How well weights predict held-out text: bits per byte of each domain, and which experts each domain uses."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.training import network
from specmd_jax.moe.training.corpus import Data
from specmd_jax.moe.training.parameters import Weights
from specmd_jax.training import Training


class Score(NamedTuple):
    """A domain's held-out text under a model, in windows that each begin without context."""

    tokens: int  # that were predicted
    nats: float  # of all of them
    bits_per_byte: float  # of the tokens that were predicted, at the domain's mean bytes per token
    choices: npt.NDArray[np.int64]  # [L, E] how often each expert was chosen

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


def scores(
    cfg: MoEConfig, settings: Training, weights: Weights, data: Data, attention: str, most: int | None = None
) -> dict[str, Score]:
    """Scores each domain on its windows of ``settings.sequence`` tokens, on at most ``most`` of them, spread evenly."""
    found = {}
    for name, domain in data.domains.items():
        text = data.held_out[domain.held_out.begin : domain.held_out.end]
        windows, real = cut(text, settings.sequence)
        if most is not None and len(windows) > most:
            chosen = np.linspace(0, len(windows) - 1, most).round().astype(int)
            windows, real = windows[chosen], real[chosen]
        nats, tokens, choices = 0.0, 0, np.zeros((cfg.layers, cfg.experts), np.int64)
        for begin in range(0, len(windows), settings.batch):
            rows = [np.resize(a[begin : begin + settings.batch], (settings.batch, a.shape[1])) for a in (windows, real)]
            rows[1][len(windows) - begin :] = False
            some, counts = _score(cfg, settings.block_rows, attention, weights, *map(jnp.asarray, rows))
            nats, choices = nats + float(some), choices + np.asarray(counts, np.int64)
            tokens += int(rows[1].sum())
        bytes_per_token = domain.held_out.bytes / len(text)
        found[name] = Score(tokens, nats, nats / math.log(2) / tokens / bytes_per_token, choices)
    return found


def cut(text: npt.NDArray[np.uint16], sequence: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Cuts text into windows [W, sequence + 1] that share a token, and tells which predicted ones are real."""
    count = max(-(-(len(text) - 1) // sequence), 1)
    padded = np.zeros(count * sequence + 1, np.int32)
    padded[: len(text)] = text
    at = np.arange(count)[:, None] * sequence + np.arange(sequence + 1)[None, :]
    return padded[at], at[:, 1:] < len(text)


def mean_bits(found: dict[str, Score]) -> float:
    """Gives the plain mean of the domains' bits per byte: what the best weights are chosen by."""
    return float(np.mean([score.bits_per_byte for score in found.values()]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    cfg: MoEConfig, rows: int, attention: str, weights: Weights, windows: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, routed = network.hidden(cfg, weights, windows[:, :-1], rows=rows, attention=attention)
    logits = network.logits(cfg, weights, x.reshape(-1, cfg.width))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].reshape(-1))
    chosen = jax.nn.one_hot(routed.ids, cfg.experts, dtype=jnp.int32).sum(axis=2) * real.reshape(1, -1, 1)
    return jnp.where(real.reshape(-1), each, 0.0).sum(), chosen.sum(axis=1)
