"""The rest of a pass: what is dense in a layer, the policy's visit, the head, and what a launch and a loop cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from configs.calibrate import CalibrateConfig
from experiments.calibration.loops import Loop, Place
from experiments.calibration.subject import Subject
from experiments.calibration.visits import path
from specmd_jax import moe
from specmd_jax.moe.fused import placing
from specmd_jax.moe.kernels import decode, launch, policy
from specmd_jax.moe.kernels.decode import At
from specmd_jax.moe.kernels.placed import Book, Token, blank_log, make_frame
from specmd_jax.moe.model.experts import uncontracted
from specmd_jax.moe.model.forward import finish
from specmd_jax.moe.runtime.decider import GateOutput, Seen, columns
from specmd_jax.moe.runtime.policy import numbers_of
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.calibrate import point

LAUNCHES = (1, 9)
"""Empty operations of an iteration; a line through them tells a launch from the loop."""


def passes(own: Subject, config: CalibrateConfig) -> Iterator[Row]:
    """Times each part of a pass by itself."""
    for count in LAUNCHES:
        empty = _launches(own, count, config.visits)
        yield point("launch", count, path(own.kernels.experts), empty.seconds(None, config.loop_repeats))
    for tokens in (1, config.prompt):
        times = config.visits if tokens == 1 else config.prompt_visits
        one = tokens == 1
        how = path(own.kernels.dense and one)
        yield point("dense", tokens, how, _dense(own, config, tokens, times).seconds(_layers(own), config.loop_repeats))
        loop, given = _policy(own, tokens, times)
        yield point("policy", tokens, path(own.kernels.policy), loop.seconds(given, config.loop_repeats))
    head = _head(own, config.visits)
    yield point("head", 1, path(own.kernels.dense), head.seconds(own.params, config.loop_repeats))


def kernels_of_pass(own: Subject, config: CalibrateConfig) -> dict[str, int]:
    """Counts the kernels of a layer of a decode step beside its experts, by part."""
    loop, given = _policy(own, 1, 1)
    return {"dense": _dense(own, config, 1, 1).kernels(_layers(own)), "policy": loop.kernels(given)}


def _launches(own: Subject, count: int, times: int) -> Loop:
    kernels = own.kernels.experts

    def step(_: Any, state: Any, place: Place) -> Any:
        x, *_ = state
        for _ in range(count):
            x = launch.nothing(x, own.kernels.interpret) if kernels else lax.optimization_barrier(x * 0.5 + 1.0)
        return x, place.layer, place.slot

    state = jnp.zeros(8), jnp.int32(0), jnp.zeros(own.cfg.experts, jnp.int32)
    return Loop(step, state, times, own.layers, own.cfg.experts)


def _alike(own: Subject) -> list[int]:
    """Gives the layers with experts that are made as the first of them."""
    first, *_ = own.cfg.moe_layers
    return [layer for layer in own.cfg.moe_layers if own.cfg.windows[layer] == own.cfg.windows[first]]


def _layers(own: Subject) -> Any:
    """Gives the parameters of the layers that are made alike, stacked."""
    return _stacked([own.params["layers"][layer] for layer in _alike(own)])


def _stacked(rows: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def _row(stack: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), stack)


def _dense(own: Subject, config: CalibrateConfig, tokens: int, times: int) -> Loop:
    """Gives a loop of what is dense in a layer, up to the gate, with a shared expert and the residual stream behind."""
    cfg, (first, *_) = own.cfg, own.cfg.moe_layers
    kernels, fns = own.kernels.dense and tokens == 1, own.net(tokens).layers[first]
    both = decode.attend_route_fns(cfg, own.kernels.interpret)[first] if kernels else None
    start = jnp.full(1, config.prompt if tokens == 1 else 0, jnp.int32)

    def step(stack: Any, state: Any, place: Place) -> Any:
        x, caches, *_ = state
        if both is not None:
            params: Any = At(stack, place.layer)
            x, h, caches, ids, gates, _ = both(params, x, caches, start)
        else:
            assert fns.route is not None
            params = _row(stack, place.layer)
            x, h, cache = fns.attend(params, x, _row(caches, place.layer), start)
            caches = jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, place.layer, 0), caches, cache)
            ids, gates, _ = fns.route(params, h)
        parts = (h,) if fns.shared is None else (h, fns.shared(params, h))
        return finish(x, *parts), caches, ids.astype(jnp.int32), uncontracted(gates.astype(jnp.float32))

    alike = len(_alike(own))
    cache = moe.init_cache(cfg, 1, config.prompt + config.steps)
    x = jax.random.normal(jax.random.key(2), (1, tokens, cfg.width)).astype(cfg.np_dtype)
    chosen = jnp.zeros((tokens, cfg.top_k))
    state = x, _stacked(list(cache[:alike])), chosen.astype(jnp.int32), chosen
    return Loop(step, state, times, alike, cfg.experts)


def _policy(own: Subject, tokens: int, times: int) -> tuple[Loop, Any]:
    """Gives a loop of the policy's visits, and what it reads: routing of a token that misses some of its experts, or of
    several tokens that ask for all."""
    cfg, frame = own.cfg, make_frame(own.policy, own.cfg.top_k)
    kernels, one = own.kernels, tokens == 1
    fresh = max(cfg.top_k // 4, 1)  # experts of a visit that the one before did not have
    ids = np.arange(tokens * cfg.top_k, dtype=np.int32).reshape(tokens, cfg.top_k) % cfg.experts
    gates = np.full((tokens, cfg.top_k), 1 / cfg.top_k, np.float32)
    whole, real = columns(GateOutput(ids, gates), cfg.experts)
    count, rank, mass = whole[5 : 5 + cfg.experts], whole[5 + cfg.experts :], real[: cfg.experts]
    lane = np.arange(cfg.top_k, dtype=np.int32)

    def step(given: Any, state: Any, place: Place) -> Any:
        numbers, mix, (count, mass, rank), gates = given
        cache, book, *_ = state
        now = {"index": place.number, "layer": place.layer, "pass_id": place.number // own.layers}
        if one:
            turn = (place.number // own.layers * fresh + lane) % (cfg.experts - cfg.top_k + fresh)
            seen = Token(**now, ids=jnp.where(lane < cfg.top_k - fresh, lane, turn + cfg.top_k - fresh), gates=gates)
        else:
            ahead, zero = jnp.zeros(cfg.experts, jnp.float32), jnp.int32(0)
            several = {"tokens": jnp.int32(tokens), "count": count, "mass": mass, "rank": rank}
            seen = Seen(**now, **several, decode=zero, ahead=ahead)
        if not kernels.policy:
            return placing.visit(frame, numbers, mix, cache, seen)
        noted = book if one else None
        cache, placed, book = policy.visit(frame, numbers, mix, cache, seen, interpret=kernels.interpret, book=noted)
        return cache, book, placed

    given = jax.device_put((numbers_of(own.policy), own.policy.mix.traced(), (count, mass, rank), gates[0]))
    cache, book = (policy.begin if kernels.policy else placing.begin)(frame, given[0], given[1]), None
    if one and kernels.policy:
        rows = jnp.zeros((own.layers, 1, cfg.top_k), jnp.int32)
        book = Book(rows, rows.astype(jnp.float32), blank_log(frame, cfg.top_k, own.layers))
    _, *rest = jax.eval_shape(step, given, (cache, book), _no_place(cfg.experts))
    # nothing shared and nothing weakly typed: it is given away
    cache = jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), cache)
    return Loop(step, (cache, *_zeros(rest)), times, own.layers, cfg.experts), given


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _no_place(experts: int) -> Place:
    return Place(jnp.int32(0), jnp.int32(0), jnp.zeros(experts, jnp.int32))


def _head(own: Subject, times: int) -> Loop:
    """Gives a loop of what ends a pass and begins the next: the head, the likeliest token, its embedding."""
    net = own.net(1)

    def step(params: Any, state: Any, place: Place) -> Any:
        x, _ = state
        logits = net.head(params["head"], x[:, -1])[0]
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(1, 1)
        return net.embed(params["embed"], token), jnp.isfinite(logits).all()

    x = net.embed(own.params["embed"], jnp.zeros((1, 1), jnp.int32))
    return Loop(step, (x, jnp.asarray(True)), times, own.layers, own.cfg.experts)
