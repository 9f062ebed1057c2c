"""One compiled program per pass, for a model whose experts are copied from pinned host memory inside it; see `engine`.

What happens at a gate is `specmd_jax.moe.fused.visit`'s business.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.fused.arrays import Fixed, ForcedRouting, Form, Live, Made, Record, Request, Segment
from specmd_jax.moe.fused.visit import visit
from specmd_jax.moe.model.experts import uncontracted
from specmd_jax.moe.model.forward import build, finish
from specmd_jax.moe.runtime.store import PINNED, sharding


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def run(
    form: Form, fixed: Fixed, live: Live, request: Request, tokens: jax.Array, forced: ForcedRouting | None
) -> tuple[Live, Request, Made]:
    """Runs one pass over ``tokens`` [1, T]: a prefill if nothing is cached yet, else a decode step."""
    cfg, start, base = form.cfg, request.start, 0
    x, records, caches = build(cfg).embed(fixed.embed, tokens), [], []
    for number, segment in enumerate(form.segments):
        behind = fixed.segments[number + 1][0][-1] if number + 1 < len(form.segments) else None
        body = functools.partial(_repeat, form, fixed, number, behind, base, start, forced)
        carry = live, request.caches[number], x
        (live, cache, x), record = lax.scan(body, carry, jnp.arange(segment.repeats, dtype=jnp.int32))
        caches.append(cache)
        records.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), record))
        base += len(segment.spans) * segment.repeats
    tail = []
    for fns, params, cache in zip(form.tail, fixed.tail, request.tail, strict=True):
        x, h, cache = fns.attend(params, x, cache, start)
        tail.append(cache)
        assert fns.mlp is not None
        x = finish(x, fns.mlp(params, h))
    record = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *records)
    logits = build(cfg).head(fixed.head, x[:, -1])[0]
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(1, 1)
    good = jnp.isfinite(logits).all() & record.finite.all()
    packed = jax.device_put(jnp.stack([token[0, 0], good.astype(jnp.int32)]), sharding(PINNED))
    request = Request(start + tokens.shape[1], tuple(caches), tuple(tail))
    return live._replace(pass_id=live.pass_id + 1), request, Made(token, packed, logits, record)


def _repeat(
    form: Form,
    fixed: Fixed,
    number: int,
    behind: Any,
    base: int,
    start: jax.Array,
    forced: ForcedRouting | None,
    carry: tuple[Live, Any, jax.Array],
    index: jax.Array,
) -> tuple[tuple[Live, Any, jax.Array], Record]:
    """One repeat of a segment: its spans one after the other. ``behind``: parameters of the layer with the first gate
    of the next segment, None at the last."""
    (live, caches, x), segment, stacks = carry, form.segments[number], fixed.segments[number]
    caches, records = [list(row) for row in caches], []
    for at, span in enumerate(segment.spans):
        h, routing = x, None
        params: Any = None
        for place, fns in enumerate(span):
            params = _row(stacks[at][place], index)
            x, h, cache = fns.attend(params, x, _row(caches[at][place], index), start)
            caches[at][place] = jax.tree.map(
                lambda whole, row: lax.dynamic_update_index_in_dim(whole, row, index, 0), caches[at][place], cache
            )
            if fns.route is None:
                assert fns.mlp is not None
                x = finish(x, fns.mlp(params, h))
            else:
                routing = fns.route(params, h)
        assert routing is not None
        (ids, gates, logits), layer = routing, base + index * len(segment.spans) + at
        ids, seen_gates, ahead = ids.astype(jnp.int32), uncontracted(gates.astype(jnp.float32)), None
        if form.ahead:
            ahead = _ask_ahead(segment, stacks, at, index, behind, h)
        finite = jnp.isfinite(gates).all()
        if ahead is not None:
            finite &= jnp.isfinite(ahead).all()
        if forced is not None:
            ids, gates = _row(forced.ids, layer), _row(forced.gates, layer)
            seen_gates = gates
            if ahead is not None and forced.ahead is not None:
                ahead = _row(forced.ahead, layer)
        live, y, record = visit(form, fixed, live, layer, start[0] > 0, h, ids, gates, seen_gates, ahead)
        records.append(record._replace(logits=logits if form.logits else None, finite=finite))
        shared = span[-1].shared
        x = finish(x, y) if shared is None else finish(x, y, shared(params, h))
    carry = live, tuple(tuple(row) for row in caches), x
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)


def _row(stack: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), stack)


def _ask_ahead(segment: Segment, stacks: Any, at: int, index: jax.Array, behind: Any, h: jax.Array) -> jax.Array:
    """Gives what the next gate makes of this one's input, as probabilities [T, E]; 0 at the last gate."""
    last = index == segment.repeats - 1
    if at + 1 < len(segment.spans):
        fns, params, known = segment.spans[at + 1][-1], _row(stacks[at + 1][-1], index), jnp.asarray(True)
    elif behind is not None:
        fns, params, known = segment.spans[at][-1], _row(behind, jnp.int32(0)), jnp.asarray(True)
    else:
        fns, params, known = segment.spans[0][-1], _row(stacks[0][-1], jnp.where(last, index, index + 1)), ~last
    assert fns.route is not None
    return jnp.where(known, uncontracted(jax.nn.softmax(fns.route(params, h)[2], axis=-1)), 0.0)
