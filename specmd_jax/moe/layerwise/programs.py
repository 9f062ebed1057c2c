"""The compiled programs of a model whose experts come from slots: everything between two gates is one of them.

A layer with routed experts splits the model: what follows its experts up to the next gate (shared expert, residual
sum, dense layers, next attention, next router) is one program with the experts, so a decode step of L such layers is
L + 1 programs and L small read-backs. Compiled once for each kind of layer, not for each layer.

A read-back is one int32 vector, `read_back` gives its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.model.forward import LayerFns, build, finish
from specmd_jax.moe.model.layers import LayerCache
from specmd_jax.moe.model.routing import weigh
from specmd_jax.moe.runtime.store import PINNED, sharding


class Kind(NamedTuple):
    """Static part of the programs that end at a gate, or at the head (``layers`` all dense or empty)."""

    cfg: MoEConfig
    layers: tuple[LayerFns, ...]  # dense layers, then the one with the gate
    routed: bool  # False: what is left behind the last routed layer
    ahead: Callable[..., Any] | None  # the next gate, to be asked with this one's input
    logits: bool  # read the router's logits back
    hidden: bool = False  # read back what the experts get, for those that run on the host


class Gated(NamedTuple):
    """The model stopped at a gate."""

    x: jax.Array  # [1, T, D] residual stream
    h: jax.Array  # [T, D] what the experts get
    ids: jax.Array  # [T, K]
    gates: jax.Array  # [T, K]
    caches: tuple[LayerCache, ...]  # of the layers of its `Kind`
    packed: jax.Array  # int32 in host memory


class Token(NamedTuple):
    """The end of a pass."""

    token: jax.Array  # [1, 1] int32, the most likely next one
    good: jax.Array  # [1] int32: 1 where all logits are finite
    logits: jax.Array  # [V] float32
    caches: tuple[LayerCache, ...]


class Inputs(NamedTuple):
    """Arrays of a `Kind`."""

    layers: tuple[Any, ...]  # parameters of its layers
    ahead: Any  # of the layer with the next gate; None without
    head: Any = None  # of the head, where a pass ends


def read_back(packed: npt.NDArray[np.int32], kind: Kind, tokens: int) -> tuple[npt.NDArray[Any], ...]:
    """(ids [T, K], gates [T, K], ahead [T, E] or None, logits [T, E] or None, h [T, D] or None, (token, good)) of a
    read-back; all but ids and token as float32."""
    cfg, parts, at = kind.cfg, [], 0
    widths = [cfg.top_k, cfg.top_k, cfg.experts if kind.ahead else 0, cfg.experts if kind.logits else 0]
    for number, width in enumerate([*widths, cfg.width if kind.hidden else 0]):
        part = packed[at : at + tokens * width].reshape(tokens, width)
        parts.append((part if number == 0 else part.view(np.float32)) if width else None)
        at += tokens * width
    return (*parts, packed[at:])


def _enter(
    kind: Kind, inputs: Inputs, x: jax.Array, caches: Any, start: jax.Array, extra: tuple[jax.Array, ...]
) -> Gated:
    """Runs the layers of `kind` up to and including the gate."""
    kept = []
    h = ids = gates = logits = x
    for fns, params, cache in zip(kind.layers, inputs.layers, caches, strict=True):
        x, h, cache = fns.attend(params, x, cache, start)
        kept.append(cache)
        if fns.route is None:
            assert fns.mlp is not None
            x = finish(x, fns.mlp(params, h))
        else:
            ids, gates, logits = fns.route(params, h)
    parts = [ids.astype(jnp.int32), _bits(gates)]
    if kind.ahead is not None:
        parts.append(_bits(jax.nn.softmax(kind.ahead(inputs.ahead, h)[2], axis=-1)))
    if kind.logits:
        parts.append(_bits(logits))
    if kind.hidden:
        parts.append(_bits(h))
    packed = jnp.concatenate([part.reshape(-1) for part in (*parts, *extra)])
    # written to pinned host memory by the program itself: reading it is then no transfer of its own
    return Gated(x, h, ids, gates, tuple(kept), jax.device_put(packed, sharding(PINNED)))


def _bits(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


@functools.cache
def first(kind: Kind) -> Callable[..., Gated]:
    """Gives the program from tokens to the first gate; its read-back ends with the last token and ``good``.

    Takes (inputs, params["embed"], tokens [1, T], good [1], caches, start [1]).
    """

    def run(inputs: Inputs, embed: Any, tokens: jax.Array, good: jax.Array, caches: Any, start: jax.Array) -> Gated:
        x = build(kind.cfg).embed(embed, tokens)
        return _enter(kind, inputs, x, caches, start, (tokens[0, -1:], good))

    return jax.jit(run, donate_argnums=4)


@functools.cache
def advance(kind: Kind, shared: Callable[..., jax.Array] | None) -> Callable[..., Any]:
    """Gives the program from a gate, through its experts, to the next gate (`Gated`) or the end of the pass (`Token`).

    ``kind`` is what comes next; ``shared`` is the gate's own layer's. Takes (inputs, here, x, h, ids, gates, source,
    caches, start): ``here`` are the parameters of the gate's layer if ``shared`` is not None; ``source`` is a tuple of
    K experts in the order of ``ids`` (one token; -1: left out, whatever its place in ``source`` holds), or the outputs
    [T, K, D] that `part` or `pairs` gathered.
    """
    cfg = kind.cfg

    def run(
        inputs: Inputs,
        here: Any,
        x: jax.Array,
        h: jax.Array,
        ids: jax.Array,
        gates: jax.Array,
        source: Any,
        caches: Any,
        start: jax.Array,
    ) -> Gated | Token:
        if isinstance(source, tuple):
            # experts are arguments of their own, not cut out of a larger one: compilers would fuse the cut into the
            # product and might then sum in another order than the all-resident model
            in_order = iter(source)
            y = moe_experts.experts(cfg, h, ids, gates, lambda _: next(in_order))
        else:
            h, ids, gates = lax.optimization_barrier((h, ids, gates))
            y = moe_experts.combine(source, ids, gates).astype(h.dtype)
        x = finish(x, y) if shared is None else finish(x, y, shared(here, h))
        if kind.routed:
            return _enter(kind, inputs, x, caches, start, ())
        kept = []
        for fns, params, cache in zip(kind.layers, inputs.layers, caches, strict=True):
            x, h, cache = fns.attend(params, x, cache, start)
            kept.append(cache)
            assert fns.mlp is not None
            x = finish(x, fns.mlp(params, h))
        logits = build(cfg).head(inputs.head, x[:, -1])[0]
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(1, 1)
        return Token(token, jnp.isfinite(logits).all().astype(jnp.int32)[None], logits, tuple(kept))

    return jax.jit(run, donate_argnums=7)


@functools.cache
def part(kind: Kind) -> Callable[..., jax.Array]:
    """Gives the program that adds one expert's outputs to a pass of several tokens; see `experts.pair_outputs`.

    Takes (h, ids, number, expert, out [T, K, D]).
    """
    cfg = kind.cfg

    def run(h: jax.Array, ids: jax.Array, number: jax.Array, expert: Expert, out: jax.Array) -> jax.Array:
        return moe_experts.pair_outputs(cfg, h, ids, lambda _: expert, jnp.arange(cfg.experts) == number, out)

    return jax.jit(run, donate_argnums=4)


@functools.cache
def pairs(kind: Kind) -> Callable[..., jax.Array]:
    """Gives the program that adds the outputs of experts of one precision on one token to those of others.

    Takes (h [1, D], ids [1, K], source, out [1, K, D]): ``source`` are K experts in the order of ``ids``; where an id
    is -1, the expert is left out and ``out`` kept.
    """
    cfg = kind.cfg

    def run(h: jax.Array, ids: jax.Array, source: tuple[Expert, ...], out: jax.Array) -> jax.Array:
        in_order = iter(source)
        return moe_experts.pair_outputs(cfg, h, ids, lambda _: next(in_order), out=out)

    return jax.jit(run, donate_argnums=3)


@functools.cache
def weights(cfg: MoEConfig) -> Callable[..., jax.Array]:
    """Gives the program that weighs experts that the policy chose: (logits [T, E], ids [T, K]) -> gates [T, K]."""
    return jax.jit(functools.partial(weigh, cfg))


@functools.cache
def alone(kind: Kind) -> Callable[..., jax.Array]:
    """Gives the program of one expert on one token: (h [1, D], expert) -> [1, D] float32."""
    return jax.jit(functools.partial(_alone, kind.cfg))


def _alone(cfg: MoEConfig, h: jax.Array, expert: Expert) -> jax.Array:
    return moe_experts.apply(cfg, expert, h)


@functools.partial(jax.jit, donate_argnums=0)
def merge(out: jax.Array, other: jax.Array, there: jax.Array) -> jax.Array:
    """Gives outputs [T, K, D], from ``other`` where ``there`` [T, K]."""
    return jnp.where(there[:, :, None], other, out)
