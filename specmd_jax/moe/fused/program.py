"""One compiled program per pass, for a model whose experts are copied from pinned host memory inside it; see `engine`.

What happens at a gate is `specmd_jax.moe.fused.visit`'s business.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.fused.arrays import Fixed, ForcedRouting, Form, Functions, Live, Made, Record, Request, Routed
from specmd_jax.moe.fused.visit import blank, put_row, visit
from specmd_jax.moe.kernels.decode import At
from specmd_jax.moe.model.experts import uncontracted
from specmd_jax.moe.model.forward import build, finish
from specmd_jax.moe.model.routing import IN_ORDER
from specmd_jax.moe.runtime.store import PINNED, sharding

GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,WHILE,CONDITIONAL,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CUBLAS,CUBLASLT"}
"""Has a GPU start a loop's launches as one graph: a layer's ten short ones are then not started one by one by the host.
Other devices' compilers take no notice."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3), compiler_options=GRAPHS)
def run(
    form: Form, fixed: Fixed, live: Live, request: Request, tokens: jax.Array, forced: ForcedRouting | None
) -> tuple[Live, Request, Made]:
    """Runs one pass over ``tokens`` [1, T]: a prefill if nothing is cached yet, else a decode step."""
    own = form.one if tokens.shape[1] == 1 else form.many
    start, base = request.start, 0
    x, caches, record = build(form.cfg).embed(fixed.embed, tokens), [], blank(form, tokens.shape[1])
    for number, segment in enumerate(own.segments):
        behind = fixed.segments[number + 1][0][-1] if number + 1 < len(own.segments) else None
        repeat = functools.partial(_repeat, form, own, fixed, number, behind, base, start, forced)
        carry = live, record, request.caches[number], x
        live, record, cache, x = lax.fori_loop(jnp.int32(0), jnp.int32(segment.repeats), repeat, carry)
        caches.append(cache)
        base += len(segment.spans) * segment.repeats
    tail = []
    for fns, params, cache in zip(own.tail, fixed.tail, request.tail, strict=True):
        x, h, cache = fns.attend(params, x, cache, start)
        tail.append(cache)
        assert fns.mlp is not None
        x = finish(x, fns.mlp(params, h))
    logits = own.head(fixed.head, x[:, -1])[0]
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(1, 1)
    good = jnp.isfinite(logits).all() & jnp.isfinite(record.gates).all()
    for rows in (record.ahead, record.logits):
        good &= True if rows is None else jnp.isfinite(rows).all()
    packed = jax.device_put(jnp.stack([token[0, 0], good.astype(jnp.int32)]), sharding(PINNED))
    request = Request(start + tokens.shape[1], tuple(caches), tuple(tail))
    return live._replace(pass_id=live.pass_id + 1), request, Made(token, packed, logits, record)


def _repeat(
    form: Form,
    own: Functions,
    fixed: Fixed,
    number: int,
    behind: Any,
    base: int,
    start: jax.Array,
    forced: ForcedRouting | None,
    index: jax.Array,
    carry: tuple[Live, Record, Any, jax.Array],
) -> tuple[Live, Record, Any, jax.Array]:
    """One repeat of a segment: its spans one after the other. ``behind``: parameters of the layer with the first gate
    of the next segment, None at the last."""
    (live, record, caches, x), segment, stacks = carry, own.segments[number], fixed.segments[number]
    caches = [list(row) for row in caches]
    in_order = form.cfg.router in IN_ORDER
    for at, span in enumerate(segment.spans):
        h, found = x, None
        params: Any = None
        for place, (fns, attend_route) in enumerate(span):
            params, cache = _at(own, stacks[at][place], index), caches[at][place]
            cache = cache if own.stacked else _row(cache, index)
            if attend_route is not None:
                x, h, cache, *found = attend_route(params, x, cache, start)
            else:
                x, h, cache = fns.attend(params, x, cache, start)
                if fns.route is None:
                    assert fns.mlp is not None
                    x = finish(x, fns.mlp(params, h))
                else:
                    found = fns.route(params, h)
            caches[at][place] = cache if own.stacked else put_row(caches[at][place], cache, index)
        assert found is not None
        (ids, gates, logits), layer = found, base + index * len(segment.spans) + at
        ids, seen_gates, ahead = ids.astype(jnp.int32), uncontracted(gates.astype(jnp.float32)), None
        if form.ahead:
            ahead = _ask_ahead(own, number, stacks, at, index, behind, h)
        if forced is not None:
            ids, gates = _row(forced.ids, layer), _row(forced.gates, layer)
            seen_gates, in_order = gates, True
            if ahead is not None and forced.ahead is not None:
                ahead = _row(forced.ahead, layer)
        routed = Routed(h, ids, gates, seen_gates, ahead, logits, in_order)
        live, record, y = visit(form, fixed, live, record, layer, start[0] > 0, routed)
        shared = span[-1].fns.shared
        x = finish(x, y) if shared is None else finish(x, y, shared(params, h))
    return live, record, tuple(tuple(row) for row in caches), x


def _at(own: Functions, stack: Any, index: jax.Array) -> Any:
    """Gives a layer's parameters, or where they are."""
    return At(stack, index) if own.stacked else _row(stack, index)


def _row(stack: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), stack)


def _ask_ahead(
    own: Functions, number: int, stacks: Any, at: int, index: jax.Array, behind: Any, h: jax.Array
) -> jax.Array:
    """Gives what the next gate makes of this one's input, as probabilities [T, E]; 0 at the last gate."""
    segment = own.segments[number]
    last = index == segment.repeats - 1
    if at + 1 < len(segment.spans):
        block, stack, row, known = segment.spans[at + 1][-1], stacks[at + 1][-1], index, jnp.asarray(True)
    elif behind is not None:
        block, stack, row = own.segments[number + 1].spans[0][-1], behind, jnp.int32(0)
        known = jnp.asarray(True)
    else:
        block, stack, row = segment.spans[0][-1], stacks[0][-1], jnp.where(last, index, index + 1)
        known = ~last
    route = block.fns.route
    assert route is not None
    logits = route(_at(own, stack, row), h)[2]
    return jnp.where(known, uncontracted(jax.nn.softmax(logits, axis=-1)), 0.0)
