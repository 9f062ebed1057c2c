"""The dense part of the decoder as NNX modules: norms, projections, attention, routers, shared experts.

Modules say what there is and compute on one layer; `specmd_jax.moe.model.forward` splits them once into a graph and
plain dictionaries of arrays and offers the pure functions that a driver calls. Weights keep the [out, in] layout of
checkpoints, so loading never transposes.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specmd_jax.moe.model import quant
from specmd_jax.moe.model.config import Latent, MoEConfig
from specmd_jax.moe.model.experts import activation, uncontracted
from specmd_jax.moe.model.rope import rotate
from specmd_jax.moe.model.routing import ROUTERS


class LayerCache(NamedTuple):
    """What attention keeps of the positions seen so far, for one layer; the length S is static.

    With latent attention ``key`` is the normed latent [B, S, kv_rank] and ``value`` the shared rotary key
    [B, S, rope_dim]; otherwise keys and values [B, S, kv_heads, head_dim].
    """

    key: jax.Array
    value: jax.Array


class Linear(nnx.Module):
    def __init__(self, cfg: MoEConfig, inputs: int, outputs: int, bias: bool = False):
        self.weight = nnx.Param(jnp.zeros((outputs, inputs), cfg.np_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), cfg.np_dtype)) if bias else None

    def wide(self, x: jax.Array) -> jax.Array:
        """Maps [n, in] -> [n, out] in float32."""
        y = quant.matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)[None, :]

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = self.wide(x.reshape(-1, x.shape[-1])).astype(x.dtype)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a bias where the family has it; statistics in float32."""

    def __init__(self, cfg: MoEConfig, size: int, kind: str = "rms", eps: float | None = None):
        self.weight = nnx.Param(jnp.ones((size,), cfg.np_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), cfg.np_dtype)) if kind == "layer" else None
        self.eps = cfg.norm_eps if eps is None else eps

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        if self.bias is not None:
            rows = rows - rows.mean(axis=-1, keepdims=True)
        rows = rows * lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + self.eps)
        rows = rows * self.weight[...].astype(jnp.float32)[None, :]
        if self.bias is not None:
            rows = rows + self.bias[...].astype(jnp.float32)[None, :]
        return rows.astype(x.dtype).reshape(x.shape)


def visible(position: jax.Array, keys: int, window: int) -> jax.Array:
    """Which of ``keys`` cached positions a query sees: [B, T] int32 -> [B, T, S] bool. Window 0: all up to itself."""
    key = jnp.arange(keys, dtype=jnp.int32)[None, None, :]
    query = position[:, :, None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def softmax_with_sink(scores: jax.Array, sink: jax.Array | None) -> jax.Array:
    """Takes the softmax over the last axis with one more, unseen entry per head that only takes mass (gpt-oss).

    ``scores`` [B, kv_heads, heads / kv_heads, T, S] float32, ``sink`` [kv_heads, heads / kv_heads] or None.
    """
    if sink is None:
        return jax.nn.softmax(scores, axis=-1)
    wide = sink.astype(jnp.float32)[None, :, :, None, None]
    peak = jnp.maximum(scores.max(axis=-1, keepdims=True), wide)
    weight = jnp.exp(scores - peak)
    return weight / (weight.sum(axis=-1, keepdims=True) + jnp.exp(wide - peak))


def write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Puts ``new`` [B, T, ...] at positions ``start`` [B] onwards of ``cache`` [B, S, ...]."""
    if cache.shape[0] == 1:  # a plain slice is updated in place; the general case is a scatter
        at = (jnp.int32(0), start[0], *(jnp.int32(0) for _ in cache.shape[2:]))
        return lax.dynamic_update_slice(cache, new.astype(cache.dtype), at)
    put = jax.vmap(lambda row, value, at: lax.dynamic_update_slice_in_dim(row, value, at, 0))
    return put(cache, new.astype(cache.dtype), start)


class Attention(nnx.Module):
    """Grouped-query attention with the families' extras: biases, query and key norms, clipping, windows, sinks."""

    def __init__(self, cfg: MoEConfig, window: int):
        self.cfg, self.window = cfg, window
        queries, keys = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.query = Linear(cfg, cfg.width, queries, cfg.qkv_bias)
        self.key = Linear(cfg, cfg.width, keys, cfg.qkv_bias)
        self.value = Linear(cfg, cfg.width, keys, cfg.qkv_bias)
        self.out = Linear(cfg, queries, cfg.width, cfg.out_bias)
        sizes = {"none": None, "full": (queries, keys), "head": (cfg.head_dim, cfg.head_dim)}[cfg.qk_norm]
        self.query_norm = Norm(cfg, sizes[0]) if sizes else None
        self.key_norm = Norm(cfg, sizes[1]) if sizes else None
        self.sinks = nnx.Param(jnp.zeros((cfg.heads,), cfg.np_dtype)) if cfg.sinks else None

    def __call__(self, h: jax.Array, cache: LayerCache, start: jax.Array) -> tuple[jax.Array, LayerCache]:
        cfg, (batch, tokens, _) = self.cfg, h.shape
        query, key, value = self.query(h), self.key(h), self.value(h)
        if cfg.qk_norm == "full":
            query, key = _must(self.query_norm)(query), _must(self.key_norm)(key)
        if cfg.qkv_clip:
            query, key, value = (jnp.clip(a, -cfg.qkv_clip, cfg.qkv_clip) for a in (query, key, value))
        query = query.reshape(batch, tokens, cfg.heads, cfg.head_dim)
        key = key.reshape(batch, tokens, cfg.kv_heads, cfg.head_dim)
        value = value.reshape(batch, tokens, cfg.kv_heads, cfg.head_dim)
        if cfg.qk_norm == "head":
            query, key = _must(self.query_norm)(query), _must(self.key_norm)(key)
        context = cache.key.shape[1]
        position = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
        query, key = (rotate(cfg.rope, a, position, context) for a in (query, key))
        cache = LayerCache(write(cache.key, key, start), write(cache.value, value, start))

        per_key = cfg.heads // cfg.kv_heads
        query = query.reshape(batch, tokens, cfg.kv_heads, per_key, cfg.head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", query, cache.key, preferred_element_type=jnp.float32)
        seen = visible(position, context, self.window)[:, None, None]
        scores = jnp.where(seen, scores * cfg.attention_scale, jnp.finfo(jnp.float32).min)
        sink = None if self.sinks is None else self.sinks[...].reshape(cfg.kv_heads, per_key)
        weight = softmax_with_sink(scores, sink).astype(h.dtype)
        y = jnp.einsum("bkgts,bskd->btkgd", weight, cache.value, preferred_element_type=jnp.float32)
        return self.out(y.astype(h.dtype).reshape(batch, tokens, -1)), cache


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Only the latent and the shared rotary key are cached. The up-projections of keys and values are absorbed: queries
    are taken into the latent space, and the weighted latents are expanded after the softmax.
    """

    def __init__(self, cfg: MoEConfig, latent: Latent):
        self.cfg, self.latent = cfg, latent
        queries = cfg.heads * (latent.plain_dim + latent.rope_dim)
        inner_eps = 1e-6  # the norms of the latents do not follow the model's own epsilon
        self.query = None if latent.query_rank else Linear(cfg, cfg.width, queries)
        self.query_down = Linear(cfg, cfg.width, latent.query_rank, cfg.qkv_bias) if latent.query_rank else None
        self.query_norm = Norm(cfg, latent.query_rank, eps=inner_eps) if latent.query_rank else None
        self.query_up = Linear(cfg, latent.query_rank, queries) if latent.query_rank else None
        self.kv_down = Linear(cfg, cfg.width, latent.kv_rank + latent.rope_dim, cfg.qkv_bias)
        self.kv_norm = Norm(cfg, latent.kv_rank, eps=inner_eps)
        self.kv_up = Linear(cfg, latent.kv_rank, cfg.heads * (latent.plain_dim + latent.value_dim))
        self.out = Linear(cfg, cfg.heads * latent.value_dim, cfg.width, cfg.out_bias)

    def __call__(self, h: jax.Array, cache: LayerCache, start: jax.Array) -> tuple[jax.Array, LayerCache]:
        cfg, latent, (batch, tokens, _) = self.cfg, self.latent, h.shape
        if self.query is not None:
            query = self.query(h)
        else:
            query = _must(self.query_up)(_must(self.query_norm)(_must(self.query_down)(h)))
        query = query.reshape(batch, tokens, cfg.heads, latent.plain_dim + latent.rope_dim)
        plain, turned = query[..., : latent.plain_dim], query[..., latent.plain_dim :]
        down = self.kv_down(h)
        compressed, shared_key = self.kv_norm(down[..., : latent.kv_rank]), down[..., latent.kv_rank :]

        context = cache.key.shape[1]
        position = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
        turned = rotate(cfg.rope, turned, position, context)
        shared_key = rotate(cfg.rope, shared_key[:, :, None, :], position, context)[:, :, 0, :]
        cache = LayerCache(write(cache.key, compressed, start), write(cache.value, shared_key, start))

        up = self.kv_up.weight[...].reshape(cfg.heads, latent.plain_dim + latent.value_dim, latent.kv_rank)
        key_up, value_up = up[:, : latent.plain_dim], up[:, latent.plain_dim :]
        wide = jnp.float32
        into_latent = jnp.einsum("bthn,hnr->bthr", plain, key_up)
        scores = jnp.einsum("bthr,bsr->bhts", into_latent, cache.key, preferred_element_type=wide)
        scores = scores + jnp.einsum("bthp,bsp->bhts", turned, cache.value, preferred_element_type=wide)
        seen = visible(position, context, 0)[:, None]
        scores = jnp.where(seen, scores * cfg.attention_scale, jnp.finfo(wide).min)
        weight = jax.nn.softmax(scores, axis=-1).astype(h.dtype)
        y = jnp.einsum("bhts,bsr->bthr", weight, cache.key, preferred_element_type=wide).astype(h.dtype)
        y = jnp.einsum("bthr,hvr->bthv", y, value_up)
        return self.out(y.reshape(batch, tokens, -1)), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward network: a layer without routed experts, or a shared expert."""

    def __init__(self, cfg: MoEConfig, width: int):
        self.cfg = cfg
        self.gate = Linear(cfg, cfg.width, width)
        self.up = Linear(cfg, cfg.width, width)
        self.down = Linear(cfg, width, cfg.width)

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.down(activation(self.cfg, self.gate.wide(h), self.up.wide(h)).astype(h.dtype))


class Layer(nnx.Module):
    """One decoder layer without its routed experts."""

    def __init__(self, cfg: MoEConfig, index: int):
        self.cfg = cfg
        routed = index in cfg.moe_layers
        self.attention_norm = Norm(cfg, cfg.width, cfg.norm)
        self.attention = LatentAttention(cfg, cfg.latent) if cfg.latent else Attention(cfg, cfg.windows[index])
        self.experts_norm = Norm(cfg, cfg.width, cfg.norm)
        self.router = Linear(cfg, cfg.width, cfg.experts, cfg.router_bias) if routed else None
        self.shared = MLP(cfg, cfg.shared_width) if routed and cfg.shared_width else None
        self.shared_gate = Linear(cfg, cfg.width, 1) if routed and cfg.shared_gate else None
        self.mlp = None if routed else MLP(cfg, cfg.dense_width)

    def attend(self, x: jax.Array, cache: LayerCache, start: jax.Array) -> tuple[jax.Array, jax.Array, LayerCache]:
        y, cache = self.attention(self.attention_norm(x), cache, start)
        x = x + y
        x, h = lax.optimization_barrier((x, self.experts_norm(x)))
        return x, h.reshape(-1, h.shape[-1]), cache

    def route(self, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = lax.optimization_barrier(_must(self.router).wide(h))
        ids, gates = ROUTERS[self.cfg.router](self.cfg, logits)
        return ids, gates, logits

    def share(self, h: jax.Array) -> jax.Array:
        y = _must(self.shared)(h)
        if self.shared_gate is not None:
            y = uncontracted(y.astype(jnp.float32) * jax.nn.sigmoid(self.shared_gate.wide(h))).astype(h.dtype)
        return lax.optimization_barrier(y)

    def feed_forward(self, h: jax.Array) -> jax.Array:
        return lax.optimization_barrier(_must(self.mlp)(h))


class Embedding(nnx.Module):
    def __init__(self, cfg: MoEConfig):
        self.weight = nnx.Param(jnp.zeros((cfg.vocabulary, cfg.width), cfg.np_dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...][ids]


class Head(nnx.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, cfg: MoEConfig):
        self.norm = Norm(cfg, cfg.width, cfg.norm)
        self.project = Linear(cfg, cfg.width, cfg.vocabulary, cfg.head_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.project.wide(self.norm(x))


class Decoder(nnx.Module):
    """The whole model without its routed experts."""

    def __init__(self, cfg: MoEConfig):
        self.embed = Embedding(cfg)
        self.layers = nnx.List([Layer(cfg, index) for index in range(cfg.layers)])
        self.head = Head(cfg)


Part = TypeVar("Part")


def _must(part: Part | None) -> Part:
    """Gives the part that this layer's configuration guarantees."""
    assert part is not None
    return part
