"""How well a checkpoint predicts held-out text: bits per byte of each domain, all experts on the device."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.model.forward import build, forward, init_cache
from specmd_jax.reference import HeldOut

BATCH = 4  # windows that are read together


class Bits(NamedTuple):
    """A domain's windows under a model."""

    tokens: int  # that were predicted
    nats: float  # of a token, on average
    bits_per_byte: float  # at the domain's mean bytes per token


def bits_of(folder: str | os.PathLike[str], texts: Mapping[str, HeldOut]) -> dict[str, Bits]:
    """Reads every window of some domains with a checkpoint, in its own precision; each begins without context.

    Raises SpecmdError for a checkpoint that does not load, and for tokens that it does not know.
    """
    cfg, params, store = weights.load(folder)
    net, stacks = build(cfg), jax.tree.map(jnp.asarray, store)

    @jax.jit
    def nats(params: Any, stacks: Any, tokens: jax.Array) -> jax.Array:
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        start = jnp.zeros(rows, jnp.int32)
        x, _, _ = forward(net, params, stacks, tokens[:, :-1], init_cache(cfg, rows, length), start)
        logits = net.head(params["head"], x.reshape(-1, cfg.width)).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:].reshape(-1, 1), axis=1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - chosen).reshape(rows, length).sum(axis=1)

    found = {}
    for name, text in texts.items():
        if int(text.windows.max()) >= cfg.vocabulary:
            raise SpecmdError(
                f"{folder}: held-out {name} has token {int(text.windows.max())}, expected less than {cfg.vocabulary}"
            )
        count, total = len(text.windows), 0.0
        for begin in range(0, count, BATCH):
            rows = text.windows[begin : begin + BATCH]
            padded = np.resize(rows, (min(BATCH, count), rows.shape[1]))  # one program for all
            total += float(np.asarray(nats(params, stacks, jnp.asarray(padded, jnp.int32)))[: len(rows)].sum())
        tokens = count * (text.windows.shape[1] - 1)
        found[name] = Bits(tokens, total / tokens, total / tokens / math.log(2) / text.bytes_per_token)
    return found
