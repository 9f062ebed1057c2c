"""The decoder as pure functions, layer by layer, so that a driver can bring the experts in between.

`build` turns a configuration into a `Net`. One pass over a layer that has routed experts is::

    x, h, cache[l] = layer.attend(params["layers"][l], x, cache[l], start)
    ids, gates, logits = layer.route(params["layers"][l], h)
    y = net.experts(h, ids, gates, lookup)            # `experts.stacked(...)` or `experts.slotted(...)`
    x = finish(x, y, layer.shared(params["layers"][l], h))     # the last only if layer.shared is not None

``params`` is a plain nested dictionary (``embed``, ``layers`` by number, ``head``) of device arrays; the weights of
the routed experts are not in it. `forward`, `greedy_step` and `generate` are the same with all experts resident:
``stacks`` holds one `Expert` with leading axis E for each entry of ``cfg.moe_layers``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import lax

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert, Lookup
from specmd_jax.moe.model.layers import Decoder, Embedding, Head, Layer, LayerCache

Params = dict[str, Any]
Cache = tuple[LayerCache, ...]


class LayerFns(NamedTuple):
    """Pure functions of one layer; layers of the same kind share the same objects (and so one compilation).

    attend: (params_l, x [B, T, D], cache_l, start [B] int32) -> (x [B, T, D], h [N, D], cache_l); ``start`` is the
        number of positions already in the cache.
    route: (params_l, h) -> (ids [N, K], gates [N, K], logits [N, E]); None for a dense layer.
        Next layer's ``route`` on this layer's ``h`` is the gate-ahead prediction.
    shared: (params_l, h) -> [N, D]; None where there is no shared expert.
    mlp: (params_l, h) -> [N, D]; None where experts are routed.
    """

    attend: Callable[..., tuple[jax.Array, jax.Array, LayerCache]]
    route: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None
    shared: Callable[[Params, jax.Array], jax.Array] | None
    mlp: Callable[[Params, jax.Array], jax.Array] | None


class Net(NamedTuple):
    """A model as pure functions.

    embed: (params["embed"], ids [B, T] int32) -> x [B, T, D]
    head: (params["head"], x [N, D]) -> logits [N, V] float32
    experts: (h, ids, gates, lookup) -> [N, D]; see `specmd_jax.moe.model.experts.experts`
    """

    cfg: MoEConfig
    embed: Callable[[Params, jax.Array], jax.Array]
    layers: tuple[LayerFns, ...]
    experts: Callable[[jax.Array, jax.Array, jax.Array, Lookup], jax.Array]
    head: Callable[[Params, jax.Array], jax.Array]


class PassRouting(NamedTuple):
    """Routing of a pass; L counts the layers with routed experts."""

    ids: jax.Array  # [L, B, T, K] int32; -1: padding
    gates: jax.Array  # [L, B, T, K] float32; 0 at padding
    logits: jax.Array  # [L, B, T, E] float32


class Generated(NamedTuple):
    tokens: npt.NDArray[np.int32]  # [B, steps]
    prefill: PassRouting  # of the prompt
    # leaves [steps - 1, L, B, 1, ...]: of the generated tokens but the last, which is never fed back
    decode: PassRouting


@functools.lru_cache(maxsize=64)
def build(cfg: MoEConfig) -> Net:
    """Gives the pure functions of a model. Cheap (no weight is allocated) and cached."""
    kinds: dict[tuple[bool, int], LayerFns] = {}
    for index in range(cfg.layers):
        kinds.setdefault(_kind(cfg, index), _layer_fns(cfg, index))
    return Net(
        cfg=cfg,
        embed=_pure(lambda: Embedding(cfg), Embedding.__call__),
        layers=tuple(kinds[_kind(cfg, index)] for index in range(cfg.layers)),
        experts=functools.partial(moe_experts.experts, cfg),
        head=_pure(lambda: Head(cfg), Head.__call__),
    )


def _kind(cfg: MoEConfig, index: int) -> tuple[bool, int]:
    return index in cfg.moe_layers, cfg.windows[index]


def _pure(make: Callable[[], nnx.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module as a function of (arrays, *args): the module is split once, merged only while tracing."""
    graph, _ = nnx.split(nnx.eval_shape(make))
    return lambda params, *args: method(nnx.merge(graph, params), *args)


def _layer_fns(cfg: MoEConfig, index: int) -> LayerFns:
    def pure(method: Callable[..., Any]) -> Callable[..., Any]:
        return _pure(lambda: Layer(cfg, index), method)

    routed = index in cfg.moe_layers
    return LayerFns(
        attend=pure(Layer.attend),
        route=pure(Layer.route) if routed else None,
        shared=pure(Layer.share) if routed and cfg.shared_width else None,
        mlp=None if routed else pure(Layer.feed_forward),
    )


def finish(x: jax.Array, *parts: jax.Array) -> jax.Array:
    """Adds the feed-forward parts [N, D], in order, to the residual stream [B, T, D]."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return lax.optimization_barrier(x + total.reshape(x.shape))


def param_spec(cfg: MoEConfig) -> Params:
    """Gives shapes and types of ``params`` as `jax.ShapeDtypeStruct`; allocates nothing."""
    _, state = nnx.split(nnx.eval_shape(lambda: Decoder(cfg)))
    return nnx.to_pure_dict(state)


def init_cache(cfg: MoEConfig, batch: int, length: int) -> Cache:
    """Gives an empty cache for ``batch`` sequences of up to ``length`` positions."""
    if cfg.latent:
        shapes = (batch, length, cfg.latent.kv_rank), (batch, length, cfg.latent.rope_dim)
    else:
        shapes = ((batch, length, cfg.kv_heads, cfg.head_dim),) * 2
    return tuple(LayerCache(*(jnp.zeros(shape, cfg.np_dtype) for shape in shapes)) for _ in range(cfg.layers))


def forward(
    net: Net,
    params: Params,
    stacks: Sequence[Expert],
    ids: jax.Array,
    cache: Cache,
    start: jax.Array,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, Cache, PassRouting]:
    """Runs one pass (a prefill, a chunk of one, or a decode step) with all experts resident.

    Args:
        ids: [B, T] int32 tokens. ``start``: [B] int32 positions already cached; the cache must hold T more.
        lengths: [B] int32 true tokens of each row when it is padded on the right; padding is routed to no expert, and
            what it leaves in the cache is hidden until the next pass overwrites it. None: no padding.
    Returns:
        The residual stream [B, T, D] (for `Net.head`), the cache, the routing.
    """
    x = net.embed(params["embed"], ids)
    real = None if lengths is None else (jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None])
    caches, routings, stack = [], [], iter(stacks)
    for index, layer in enumerate(net.layers):
        weights = params["layers"][index]
        x, h, layer_cache = layer.attend(weights, x, cache[index], start)
        caches.append(layer_cache)
        if layer.route is None:
            assert layer.mlp is not None
            x = finish(x, layer.mlp(weights, h))
            continue
        chosen, gates, logits = layer.route(weights, h)
        if real is not None:
            chosen, gates = drop_padding(chosen, gates, real)
        parts = [net.experts(h, chosen, gates, moe_experts.stacked(next(stack)))]
        if layer.shared is not None:
            parts.append(layer.shared(weights, h))
        x = finish(x, *parts)
        routings.append(tuple(a.reshape(*ids.shape, -1) for a in (chosen, gates, logits)))
    return x, tuple(caches), PassRouting(*(jnp.stack(column) for column in zip(*routings, strict=True)))


def drop_padding(ids: jax.Array, gates: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Routes padding to no expert: ids [N, K] and gates [N, K] where ``real`` [B, T] (N = B * T) is false."""
    keep = real.reshape(-1, 1)
    return jnp.where(keep, ids, -1), jnp.where(keep, gates, 0.0)


def greedy_step(
    net: Net, params: Params, stacks: Sequence[Expert], token: jax.Array, cache: Cache, start: jax.Array
) -> tuple[jax.Array, jax.Array, Cache, PassRouting]:
    """Runs one decode step: token [B] -> (next token [B], logits [B, V], cache, routing)."""
    x, cache, routing = forward(net, params, stacks, token[:, None], cache, start)
    logits = net.head(params["head"], x[:, -1])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, cache, routing


def generate(
    cfg: MoEConfig, params: Params, stacks: Sequence[Expert], prompt: npt.ArrayLike, steps: int, length: int = 0
) -> Generated:
    """Generates greedily with all experts resident: prefill and the decode loop are one compiled program per shape.

    Args:
        prompt: [B, T] token ids, every row T long.
        steps: tokens to generate, at least 1. No end token is heeded.
        length: positions of the KV cache; 0: exactly what is needed.
    Raises:
        SpecmdError: a prompt that is empty, no matrix of ids, or outside the vocabulary; more positions than the
            cache or the model has; logits that are not finite.
    """
    ids = check_prompt(cfg, prompt, steps, length)
    length = length or ids.shape[1] + steps - 1
    tokens, finite, prefill, decode = _generate(cfg, steps, length, params, tuple(stacks), jnp.asarray(ids))
    good = np.asarray(finite)
    if not good.all():
        step, row = np.argwhere(~good)[0]
        raise SpecmdError(
            f"{cfg.family}: the logits of generated token {step} of sequence {row} are not finite "
            f"(check the weights for NaN; float16 overflows where bfloat16 does not)"
        )
    return Generated(np.asarray(tokens), prefill, decode)


def check_prompt(cfg: MoEConfig, prompt: npt.ArrayLike, steps: int, length: int = 0) -> npt.NDArray[np.int32]:
    """Gives the prompt as [B, T] int32, or raises SpecmdError; see `generate`."""
    ids = np.asarray(prompt)
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise SpecmdError(f"prompt: expected token ids of shape [sequences, tokens], got {ids.dtype} {ids.shape}")
    wrong = np.argwhere((ids < 0) | (ids >= cfg.vocabulary))
    if wrong.size:
        row, column = wrong[0]
        raise SpecmdError(
            f"prompt: sequence {row}, token {column}: id {ids[row, column]} is outside the vocabulary "
            f"0..{cfg.vocabulary - 1}"
        )
    if steps < 1:
        raise SpecmdError(f"steps: expected at least 1 token to generate, got {steps}")
    needed, room = ids.shape[1] + steps - 1, min(length or cfg.max_positions, cfg.max_positions)
    if needed > room:
        raise SpecmdError(f"prompt of {ids.shape[1]} and {steps} new tokens need {needed} positions, there are {room}")
    return ids.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    cfg: MoEConfig, steps: int, length: int, params: Params, stacks: tuple[Expert, ...], ids: jax.Array
) -> tuple[jax.Array, jax.Array, PassRouting, PassRouting]:
    net, (batch, tokens) = build(cfg), ids.shape
    start = jnp.zeros((batch,), jnp.int32)
    x, cache, prefill = forward(net, params, stacks, ids, init_cache(cfg, batch, length), start)
    logits = net.head(params["head"], x[:, -1])
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def step(carry: Any, position: jax.Array) -> Any:
        token, cache = carry
        at = jnp.full((batch,), position, jnp.int32)
        token, logits, cache, routing = greedy_step(net, params, stacks, token, cache, at)
        return (token, cache), (token, jnp.isfinite(logits).all(axis=-1), routing)

    positions = jnp.arange(tokens, tokens + steps - 1, dtype=jnp.int32)
    _, (rest, finite, decode) = lax.scan(step, (first, cache), positions)
    all_tokens = jnp.concatenate([first[None], rest]).T
    return all_tokens, jnp.concatenate([jnp.isfinite(logits).all(axis=-1)[None], finite]), prefill, decode
