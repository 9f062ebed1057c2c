"""One compiled program per pass, for a model whose experts are copied from pinned host memory inside it; see `engine`.

What happens at a gate is `specmd_jax.moe.fused.visit`'s business.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.fused.arrays import (
    Active,
    Admission,
    Fixed,
    ForcedRouting,
    Form,
    Functions,
    Live,
    Made,
    Part,
    Record,
    Request,
    Routed,
)
from specmd_jax.moe.fused.visit import blank, put_row, visit
from specmd_jax.moe.kernels.decode import At
from specmd_jax.moe.model.experts import uncontracted
from specmd_jax.moe.model.forward import build, drop_padding, finish
from specmd_jax.moe.model.routing import IN_ORDER
from specmd_jax.moe.runtime.store import PINNED, sharding

GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,WHILE,CONDITIONAL,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CUBLAS,CUBLASLT"}
"""Has a GPU start a loop's launches as one graph: a layer's ten short ones are then not started one by one by the host.
Other devices' compilers take no notice."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3), compiler_options=GRAPHS)
def run(
    form: Form,
    fixed: Fixed,
    live: Live,
    request: Request,
    tokens: jax.Array,
    forced: ForcedRouting | None,
    part: Part = None,
) -> tuple[Live, Request, Made]:
    """Runs one pass: over ``tokens`` [1, T] of one sequence, a prefill if nothing of it is cached yet, else a decode
    step; or over [B, 1], a decode step of a batch. ``part``: whose tokens they are, in a batch."""
    own = form.one if tokens.shape[1] == 1 and part is None else form.many
    start, base = jnp.zeros(1, jnp.int32) if isinstance(part, Admission) else request.start, 0
    x, caches, record = build(form.cfg).embed(fixed.embed, tokens), [], blank(form, tokens.size)
    for number, segment in enumerate(own.segments):
        behind = fixed.segments[number + 1][0][-1] if number + 1 < len(own.segments) else None
        repeat = functools.partial(_repeat, form, own, fixed, number, behind, base, start, forced, part)
        carry = live, record, request.caches[number], x
        live, record, cache, x = lax.fori_loop(jnp.int32(0), jnp.int32(segment.repeats), repeat, carry)
        caches.append(cache)
        base += len(segment.spans) * segment.repeats
    tail = []
    for fns, params, whole in zip(own.tail, fixed.tail, request.tail, strict=True):
        x, h, cache = fns.attend(params, x, _own(whole, (), part), start)
        tail.append(_put_own(whole, cache, (), part))
        assert fns.mlp is not None
        x = finish(x, fns.mlp(params, h))
    logits = own.head(fixed.head, x[:, -1])
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    packed = jnp.stack([token, _finite(logits, record, part).astype(jnp.int32)], axis=1)
    made = Made(_fed(token, part), jax.device_put(packed, sharding(PINNED)), logits, record)
    request = Request(_cached(request.start, tokens.shape[1], part), tuple(caches), tuple(tail))
    return live._replace(pass_id=live.pass_id + 1), request, made


def _finite(logits: jax.Array, record: Record, part: Part) -> jax.Array:
    """Says of each token that is made [M] whether all that it comes from is finite."""
    rows = [logits[None], *(row for row in (record.gates, record.ahead, record.logits) if row is not None)]
    if isinstance(part, Active):
        return functools.reduce(jnp.logical_and, (jnp.isfinite(row).all(axis=(0, 2)) for row in rows))
    return functools.reduce(jnp.logical_and, (jnp.isfinite(row).all() for row in rows)).reshape(1)


def _fed(token: jax.Array, part: Part) -> jax.Array:
    """Gives what is fed next [B, 1] where a pass made ``token`` [M]."""
    made = token[:, None]
    return lax.dynamic_update_slice(part.fed, made, (part.place, 0)) if isinstance(part, Admission) else made


def _cached(start: jax.Array, tokens: int, part: Part) -> jax.Array:
    """Gives how many positions are cached [B] behind a pass of so many tokens per sequence."""
    if isinstance(part, Admission):
        return lax.dynamic_update_slice(start, jnp.full(1, tokens, jnp.int32), (part.place,))
    return start + (part.rows.astype(jnp.int32) if isinstance(part, Active) else tokens)


def _repeat(
    form: Form,
    own: Functions,
    fixed: Fixed,
    number: int,
    behind: Any,
    base: int,
    start: jax.Array,
    forced: ForcedRouting | None,
    part: Part,
    index: jax.Array,
    carry: tuple[Live, Record, Any, jax.Array],
) -> tuple[Live, Record, Any, jax.Array]:
    """One repeat of a segment: its spans one after the other. ``behind``: parameters of the layer with the first gate
    of the next segment, None at the last."""
    (live, record, caches, x), segment, stacks = carry, own.segments[number], fixed.segments[number]
    caches = [list(row) for row in caches]
    in_order, real = form.cfg.router in IN_ORDER, part.rows if isinstance(part, Active) else None
    decode = start[0] > 0 if part is None else jnp.asarray(isinstance(part, Active))
    for at, span in enumerate(segment.spans):
        h, found = x, None
        params: Any = None
        for place, (fns, attend_route) in enumerate(span):
            params, cache = _at(own, stacks[at][place], index), caches[at][place]
            cache = cache if own.stacked else _own(cache, (index,), part)
            if attend_route is not None:
                x, h, cache, *found = attend_route(params, x, cache, start)
            else:
                x, h, cache = fns.attend(params, x, cache, start)
                if fns.route is None:
                    assert fns.mlp is not None
                    x = finish(x, fns.mlp(params, h))
                else:
                    found = fns.route(params, h)
            caches[at][place] = cache if own.stacked else _put_own(caches[at][place], cache, (index,), part)
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
            if forced.logits is not None:
                logits = _row(forced.logits, layer)
        if real is not None:
            (ids, gates), seen_gates = drop_padding(ids, gates, real), jnp.where(real[:, None], seen_gates, 0.0)
        routed = Routed(h, ids, gates, seen_gates, ahead, logits, in_order, real)
        live, record, y = visit(form, fixed, live, record, layer, decode, routed)
        shared = span[-1].fns.shared
        x = finish(x, y) if shared is None else finish(x, y, shared(params, h))
    return live, record, tuple(tuple(row) for row in caches), x


def _at(own: Functions, stack: Any, index: jax.Array) -> Any:
    """Gives a layer's parameters, or where they are."""
    return At(stack, index) if own.stacked else _row(stack, index)


def _own(caches: Any, at: tuple[jax.Array, ...], part: Part) -> Any:
    """Gives the caches of a pass out of those of all places [..., B, S, ...], one of the stack if ``at`` says which."""
    if not isinstance(part, Admission):
        return _row(caches, *at) if at else caches
    place = (*at, part.place)

    def cut(leaf: jax.Array) -> jax.Array:
        rest = leaf.shape[len(place) :]
        return lax.dynamic_slice(leaf, (*place, *[0] * len(rest)), (*[1] * len(place), *rest)).reshape(1, *rest)

    return jax.tree.map(cut, caches)


def _put_own(caches: Any, own: Any, at: tuple[jax.Array, ...], part: Part) -> Any:
    """Writes the caches of a pass back to where `_own` found them."""
    if not isinstance(part, Admission):
        return put_row(caches, own, *at) if at else own
    place = (*at, part.place)

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        lead = [1] * (len(place) - 1)
        return lax.dynamic_update_slice(leaf, new.reshape(*lead, *new.shape), (*place, *[0] * (new.ndim - 1)))

    return jax.tree.map(put, caches, own)


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
