"""The network of a training run as one differentiable function of whole sequences: that of `specmd_jax.moe.forward`.

The layers are alike and one scan goes over them; experts are a grouped product (`grouped`). Weights are float32 and
cast to the configuration's type once. In float32 the logits are those of the inference model but for rounding; in
bfloat16 attention, too, rounds its scores otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import activation
from specmd_jax.moe.model.rope import rotate
from specmd_jax.moe.model.routing import ROUTERS, weigh
from specmd_jax.moe.training import grouped
from specmd_jax.moe.training.grouped import product
from specmd_jax.moe.training.parameters import Weights


class Routed(NamedTuple):
    """The routing of all layers."""

    ids: jax.Array  # [L, N, K] int32
    logits: jax.Array  # [L, N, E] float32


def hidden(
    cfg: MoEConfig,
    weights: Weights,
    tokens: jax.Array,
    *,
    rows: int,
    attention: str = "xla",
    dropout: float = 0.0,
    key: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, Routed]:
    """Gives the normed hidden states [B, T, D] before the head, and the routing.

    Args:
        tokens: [B, T] int32. ``rows``: of a block of the grouped product.
        attention: ``implementation`` of `jax.nn.dot_product_attention`.
        dropout: share of entries left out of the embedding and of what a half layer adds; needs ``key``.
        bias: [L, E] added to the router's probabilities where experts are chosen, not to their gates; None: none.
    """
    layers = jax.tree.map(lambda leaf: leaf.astype(cfg.np_dtype), weights["layers"])
    # the embedding is gathered in float32: so is the sum of its slopes, which a frequent token has many of
    x = weights["embed"][tokens].astype(cfg.np_dtype)
    keys = None
    if dropout:
        assert key is not None
        first, *_ = parts = jax.random.split(key, 1 + 2 * cfg.layers)
        x = _drop(x, dropout, first)
        keys = parts[1:].reshape(cfg.layers, 2)

    def layer(x: jax.Array, given: tuple[Weights, jax.Array | None, jax.Array | None]) -> tuple[jax.Array, Routed]:
        own, drawn, offset = given
        y = _attention(cfg, own, _norm(cfg, x, own["attention_norm"]), attention)
        x = x + (y if drawn is None else _drop(y, dropout, drawn[0]))
        h = _norm(cfg, x, own["experts_norm"]).reshape(-1, cfg.width)
        y, routed = _experts(cfg, own, h, rows, offset)
        y = y.reshape(x.shape)
        return x + (y if drawn is None else _drop(y, dropout, drawn[1])), routed

    x, routed = lax.scan(layer, x, (layers, keys, bias))
    return _norm(cfg, x, weights["norm"].astype(cfg.np_dtype)), routed


def logits(cfg: MoEConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """Gives the logits [N, V] float32 of normed hidden states [N, D]."""
    return product(x, weights["embed"].astype(cfg.np_dtype))


def _drop(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(keep, x * jnp.asarray(1 / (1 - share), x.dtype), jnp.zeros((), x.dtype))


def _norm(cfg: MoEConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + cfg.norm_eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def _attention(cfg: MoEConfig, own: Weights, h: jax.Array, implementation: Any) -> jax.Array:
    batch, tokens, _ = h.shape
    flat = h.reshape(-1, cfg.width)

    def heads(name: str, count: int) -> jax.Array:
        return product(flat, own[name]).astype(h.dtype).reshape(batch, tokens, count, cfg.head_dim)

    query = _norm(cfg, heads("query", cfg.heads), own["query_norm"])
    key, value = _norm(cfg, heads("key", cfg.kv_heads), own["key_norm"]), heads("value", cfg.kv_heads)
    position = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    query, key = (rotate(cfg.rope, a, position, tokens) for a in (query, key))
    y = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, scale=cfg.attention_scale, implementation=implementation
    )
    return product(y.reshape(batch * tokens, -1), own["out"]).astype(h.dtype).reshape(h.shape)


def _experts(cfg: MoEConfig, own: Weights, h: jax.Array, rows: int, bias: jax.Array | None) -> tuple[jax.Array, Routed]:
    scores = product(h, own["router"])
    if bias is None:
        ids, gates = ROUTERS[cfg.router](cfg, scores)
    else:
        ids = lax.top_k(jax.nn.softmax(lax.stop_gradient(scores), axis=-1) + bias[None, :], cfg.top_k)[1]
        gates = weigh(cfg, scores, ids)
    plan = grouped.plan(ids, cfg.experts, rows)
    x = grouped.dispatch(h, plan).reshape(-1, rows, cfg.width)
    gate, up = jnp.split(product(x, grouped.blocks_of(own["gate_up"], plan.expert)), 2, axis=-1)
    y = product(activation(cfg, gate, up).astype(h.dtype), grouped.blocks_of(own["down"], plan.expert))
    each = grouped.collect(y.astype(h.dtype).reshape(-1, cfg.width), plan)
    total = (gates[:, :, None] * each.astype(jnp.float32)).sum(axis=1)
    return total.astype(h.dtype), Routed(ids, scores)
