"""The dense part of a decode step of one sequence as few kernels: functions in place of those of `model.forward`.

`net` gives a model whose layers and head take one token, and compute what those of `build` do, to rounding. Per layer
that is four launches before the experts: norm and projections, attention, output projection, and norm with the router's
logits; then one that chooses the experts.

Where a layer's ``params`` are `At`, all layers lie in one array with a leading axis, so that a loop over layers reads
them where they are: a kernel's operand that is a slice of an array would be copied first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.kernels.attention import attention, choose_share
from specmd_jax.moe.kernels.matvec import Row, normalize, project
from specmd_jax.moe.kernels.mlp import mlp
from specmd_jax.moe.kernels.router import SERVED, choose_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.forward import LayerFns, Net, Params, build
from specmd_jax.moe.model.layers import LayerCache
from specmd_jax.moe.model.routing import ROUTERS

MOST_WIDE = 8192  # entries of a row that a program holds at once


class At(NamedTuple):
    """Parameters of one of several layers in stacked arrays; then the layer's cache is that of all of them, too."""

    params: Params  # leaves [L, ...]
    layer: jax.Array  # [] int32


class Routed(NamedTuple):
    """What `AttendRoute` gives: the results of ``attend``, then those of ``route``."""

    x: jax.Array  # [1, 1, D]
    h: jax.Array  # [1, D]
    cache: LayerCache
    ids: jax.Array  # [1, K] int32
    gates: jax.Array  # [1, K] float32
    logits: jax.Array  # [1, E] float32


AttendRoute = Callable[[Any, jax.Array, LayerCache, jax.Array], Routed]


def serves(cfg: MoEConfig) -> str | None:
    """Gives None, or the reason why the kernels cannot run this model's dense layers."""
    if cfg.latent is not None:
        return "latent attention keeps no keys per head"
    if cfg.heads % cfg.kv_heads:
        return f"{cfg.heads} query heads do not share {cfg.kv_heads} key heads evenly"
    if cfg.head_dim % 2 or cfg.rope.dim != cfg.head_dim:
        return f"{cfg.rope.dim} of a head's {cfg.head_dim} entries are rotated: it rotates all, in pairs"
    widest = max(cfg.width, cfg.heads * cfg.head_dim if cfg.qk_norm == "full" else 0)
    if widest > MOST_WIDE:
        return f"rows of {widest} entries are normed, it holds up to {MOST_WIDE}"
    return None


@functools.lru_cache(maxsize=64)
def layer_fns(cfg: MoEConfig, interpret: bool = False) -> tuple[LayerFns, ...]:
    """Gives `LayerFns` of every layer for one token; ``params`` may be `At`.

    Raises:
        SpecmdError: the model is not served (`serves`); when called: more than one token.
    """
    _check(cfg)
    kinds: dict[Any, LayerFns] = {}
    for index, window in enumerate(cfg.windows):
        routed = index in cfg.moe_layers
        kinds.setdefault((routed, window), _layer_fns(cfg, window, routed, interpret))
    return tuple(kinds[index in cfg.moe_layers, window] for index, window in enumerate(cfg.windows))


@functools.lru_cache(maxsize=64)
def attend_route_fns(cfg: MoEConfig, interpret: bool = False) -> tuple[AttendRoute | None, ...]:
    """Gives ``attend`` and ``route`` of every layer as one function, with a launch less; None for a dense layer.

    Raises:
        SpecmdError: as `layer_fns`.
    """
    _check(cfg)
    kinds = {window: _attend_route(cfg, window, interpret) for window in cfg.windows}
    return tuple(kinds[window] if index in cfg.moe_layers else None for index, window in enumerate(cfg.windows))


@functools.lru_cache(maxsize=64)
def head_fn(cfg: MoEConfig, interpret: bool = False) -> Callable[[Params, jax.Array], jax.Array]:
    """Gives `Net.head` for one token: (params["head"], x [1, D]) -> logits [1, V] float32."""

    def head(params: Params, x: jax.Array) -> jax.Array:
        _check_row(x, (1, cfg.width))
        row = Row(x, params["norm"])
        return project(row, [params["project"]], cfg.norm_eps, dtype=jnp.float32, interpret=interpret).outputs[0]

    return head


def net(cfg: MoEConfig, interpret: bool = False) -> Net:
    """Gives the model of `build` for decode steps of one sequence: layers and head are these kernels.

    Raises:
        SpecmdError: as `layer_fns`.
    """
    return build(cfg)._replace(layers=layer_fns(cfg, interpret), head=head_fn(cfg, interpret))


def _check(cfg: MoEConfig) -> None:
    reason = serves(cfg)
    if reason:
        raise SpecmdError(f"{cfg.family}: the decode kernels do not serve this model: {reason}")


def _check_row(x: jax.Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise SpecmdError(f"decode kernels: expected one token, a row of shape {list(shape)}, got {list(x.shape)}")


def _taken(params: Params | At) -> tuple[Params, jax.Array | None]:
    if isinstance(params, At):
        return params.params, params.layer.reshape(1)
    return params, None


def _attended(
    cfg: MoEConfig, window: int, interpret: bool, params: Params, index: Any, x: Any, cache: Any, start: Any
) -> tuple[jax.Array, LayerCache]:
    """Gives the residual stream [1, D] behind attention, and the cache."""
    _check_row(x, (1, 1, cfg.width))
    own, share = params["attention"], choose_share(cache.key.shape[-3])
    row = Row(x[0], params["attention_norm"])
    qkv = project(
        row,
        [own["query"], own["key"], own["value"]],
        cfg.norm_eps,
        zeros=cfg.heads if share.splits > 1 else 0,
        index=index,
        interpret=interpret,
    )
    query, key, value = qkv.outputs
    out, cache = attention(
        cfg,
        window,
        own,
        (query, key, value),
        cache,
        start,
        counters=qkv.zeros,
        index=index,
        share=share,
        interpret=interpret,
    )
    return project(Row(out), [own["out"]], residual=x[0], index=index, interpret=interpret).outputs[0], cache


def _layer_fns(cfg: MoEConfig, window: int, routed: bool, interpret: bool) -> LayerFns:
    def attend(params: Params | At, x: jax.Array, cache: LayerCache, start: jax.Array) -> Any:
        own, index = _taken(params)
        row, cache = _attended(cfg, window, interpret, own, index, x, cache, start)
        h = normalize(Row(row, own["experts_norm"]), cfg.norm_eps, index=index, interpret=interpret)
        return row[None], h, cache

    def route(params: Params | At, h: jax.Array) -> Any:
        own, index = _taken(params)
        _check_row(h, (1, cfg.width))
        made = project(Row(h), [own["router"]], dtype=jnp.float32, index=index, interpret=interpret)
        return (*_chosen(cfg, made.outputs[0], interpret), made.outputs[0])

    def shared(params: Params | At, h: jax.Array) -> jax.Array:
        own, index = _taken(params)
        _check_row(h, (1, cfg.width))
        return mlp(cfg, own["shared"], h, own.get("shared_gate"), index=index, interpret=interpret)

    def feed_forward(params: Params | At, h: jax.Array) -> jax.Array:
        own, index = _taken(params)
        _check_row(h, (1, cfg.width))
        return mlp(cfg, own["mlp"], h, index=index, interpret=interpret)

    return LayerFns(
        attend=attend,
        route=route if routed else None,
        shared=shared if routed and cfg.shared_width else None,
        mlp=None if routed else feed_forward,
    )


def _attend_route(cfg: MoEConfig, window: int, interpret: bool) -> AttendRoute:
    def attend_route(params: Params | At, x: jax.Array, cache: LayerCache, start: jax.Array) -> Routed:
        own, index = _taken(params)
        row, cache = _attended(cfg, window, interpret, own, index, x, cache, start)
        made = project(
            Row(row, own["experts_norm"]),
            [own["router"]],
            cfg.norm_eps,
            dtype=jnp.float32,
            keep_normed=True,
            index=index,
            interpret=interpret,
        )
        ids, gates = _chosen(cfg, made.outputs[0], interpret)
        return Routed(row[None], made.normed, cache, ids, gates, made.outputs[0])

    return attend_route


def _chosen(cfg: MoEConfig, logits: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Chooses experts by the kernel, or by XLA where the router is none of the kernel's."""
    if cfg.router in SERVED:
        return choose_experts(cfg, logits, interpret=interpret)
    return ROUTERS[cfg.router](cfg, logits)
