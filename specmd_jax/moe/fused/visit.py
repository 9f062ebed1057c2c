"""One visit inside a program: what the policy decides and where everybody is put, copies, experts.

Shapes: T tokens of the pass, K experts per token (-1: a row without a token), L routed layers of E experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.loops import in_order
from specmd_jax.moe.fused import levels, pages, placing, streaming
from specmd_jax.moe.fused.arrays import Fixed, Form, Live, Record, Routed
from specmd_jax.moe.kernels import many_tokens, one_token, policy
from specmd_jax.moe.kernels.placed import Book, Placed, Token, blank_log
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.routing import weigh
from specmd_jax.moe.runtime.decider import Decision, Seen
from specmd_jax.replay.routing import choose, demanded
from specmd_jax.replay.totals import DROPPED, SUBSTITUTED


def visit(
    form: Form, fixed: Fixed, live: Live, record: Record, layer: jax.Array, decode: jax.Array, routed: Routed
) -> tuple[Live, Record, jax.Array]:
    """Decides, copies and computes one layer's experts: also their weighted sum [T, D]. The visit is noted in the
    layer's row of the record, with the router's own choice."""
    own = routed
    if form.reroutes:
        live, routed = _rerouted(form, fixed, live, layer, own)
    see = _token if routed.ids.shape[0] == 1 else _seen
    seen = see(form, live, layer, decode, routed)
    cache, placed, note, record = _place(form, fixed, live.cache, seen, record, own)
    ids = routed.ids if form.fetches_all else _runs(routed, note)
    out, slots = _experts(form, layer, routed.h, ids, placed, fixed.host, live.slots)
    rows = {"ahead": routed.ahead, "logits": routed.logits if form.logits else None}
    record = record._replace(**{name: put_row(getattr(record, name), row, layer) for name, row in rows.items()})
    y = _weighted(form, out, ids, routed.gates).astype(routed.h.dtype)
    return live._replace(cache=cache, slots=slots), record, y


def blank(form: Form, tokens: int) -> Record:
    """Gives the record of a pass that has visited nothing."""
    cfg, setup = form.cfg, form.frame.setup
    layers, experts, horizon = setup.layers, setup.experts, setup.horizon

    def zeros(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((layers, *shape), dtype)

    if form.kernels.policy:
        note = blank_log(form.frame, cfg.top_k if tokens == 1 else experts, layers)
    else:
        note = Decision(
            level=zeros(jnp.int8, layers, experts),
            outcome=zeros(jnp.int8, experts),
            collision=zeros(bool, experts),
            evictions=zeros(jnp.int32, layers),
            prefetched=zeros(jnp.int32, horizon, experts),
            row=zeros(jnp.int8, experts),
            instead=zeros(jnp.int32, experts),
        )
    return Record(
        ids=zeros(jnp.int32, tokens, cfg.top_k),
        gates=zeros(jnp.float32, tokens, cfg.top_k),
        ahead=zeros(jnp.float32, tokens, experts) if form.ahead else None,
        logits=zeros(jnp.float32, tokens, experts) if form.logits else None,
        note=note,
    )


def put_row(stack: Any, row: Any, index: jax.Array) -> Any:
    """Writes a row of every leaf [L, ...]."""
    return jax.tree.map(lambda whole, new: lax.dynamic_update_index_in_dim(whole, new, index, 0), stack, row)


def _rerouted(form: Form, fixed: Fixed, live: Live, layer: jax.Array, own: Routed) -> tuple[Live, Routed]:
    """Lets the policy choose the experts; the model's own rule weighs them."""
    cache = policy if form.kernels.policy else placing
    resident, logits = cache.resident(form.frame, live.cache, layer), own.logits
    if own.real is not None:
        logits = jnp.where(own.real[:, None], logits, jnp.nan)  # no token
    memory, (ids, seen_gates) = choose(fixed.routing.build(), live.routing, layer, logits, resident, form.cfg.top_k)
    gates = jnp.where(ids >= 0, weigh(form.cfg, own.logits, ids), 0.0)
    return live._replace(routing=memory), own._replace(ids=ids, gates=gates, seen_gates=seen_gates, in_order=True)


def _place(
    form: Form, fixed: Fixed, cache: Any, seen: Seen | Token, record: Record, own: Routed
) -> tuple[Any, Placed | pages.Placed, Any, Record]:
    """Takes one step of the cache, by the kernel or by XLA's operations, and notes it beside the router's ``own``
    choice."""
    given = form.frame, fixed.numbers, fixed.mix, cache, seen
    interpret, wholes = form.kernels.interpret, (record.ids, record.gates, record.note)
    if form.kernels.policy and isinstance(seen, Token) and not form.reroutes:  # it writes what it sees into the book
        cache, placed, book = policy.visit(*given, interpret=interpret, book=Book(*wholes))
        return cache, placed, book.log, record._replace(ids=book.ids, gates=book.gates, note=book.log)
    if form.kernels.policy:
        cache, placed, log = policy.visit(*given, interpret=interpret)
        note = jax.tree.map(lambda leaf: leaf[0], log)
    elif form.pool is not None:
        cache, placed, note = pages.visit(form.pool, *given)
    else:
        cache, placed, note = placing.visit(*given)
    wholes = put_row(wholes, (own.ids, own.seen_gates, note), seen.layer)
    return cache, placed, note, record._replace(ids=wholes[0], gates=wholes[1], note=wholes[2])


def _weighted(form: Form, out: jax.Array, ids: jax.Array, gates: jax.Array) -> jax.Array:
    """Gives the weighted sum over the choices, [T, D] float32. Beside the expert kernels nothing has to be kept apart
    for the sake of equal bits: every pass of one length is the same program."""
    if not form.kernels.experts:
        return moe_experts.combine(out, ids, gates)
    return jnp.sum(jnp.where(ids[:, :, None] >= 0, gates[:, :, None] * out, 0.0), axis=1)


def _runs(routed: Routed, decision: Decision) -> jax.Array:
    """Gives the experts that run in place of those routed to [T, K]; -1: none."""
    ids = routed.ids
    outcome = decision.outcome[ids]
    ids = jnp.where(outcome == SUBSTITUTED, decision.instead[ids], jnp.where(outcome == DROPPED, -1, ids))
    return ids if routed.real is None else jnp.where(routed.real[:, None], ids, -1)


def _experts(
    form: Form, layer: jax.Array, h: jax.Array, ids: jax.Array, placed: Placed | pages.Placed, host: Any, slots: Any
) -> tuple[jax.Array, Any]:
    """Gives the output of every pair [T, K, D] float32, and the slots."""
    cfg, interpret = form.cfg, form.kernels.interpret
    if isinstance(placed, pages.Placed):
        assert form.pool is not None
        return levels.run(cfg, form.pool, layer, h, ids, placed, host, slots)
    if not form.kernels.experts:
        run = streaming.one_token if ids.shape[0] == 1 else streaming.many_tokens
        return run(cfg, layer, h, ids, placed, host, slots)
    if ids.shape[0] == 1:
        visit = one_token.Visit(layer.reshape(1), ids[0], placed)
        return one_token.experts(cfg, h, visit, host, slots, interpret=interpret)
    return many_tokens.visit_experts(cfg, layer.reshape(1), h, ids, placed, host, slots, interpret=interpret)


def _index(form: Form, live: Live, layer: jax.Array) -> jax.Array:
    """Gives the visit's number: every pass visits all layers."""
    return live.pass_id * form.frame.setup.layers + layer


def _token(form: Form, live: Live, layer: jax.Array, decode: jax.Array, routed: Routed) -> Token:
    """Gives a visit of one token as the policy sees it; ``decode`` is of no account."""
    del decode
    ids, gates = routed.ids[0], routed.seen_gates[0]
    if not routed.in_order:
        order = jnp.argsort(-gates, stable=True)
        ids, gates = ids[order], gates[order]
    return Token(
        index=_index(form, live, layer),
        layer=layer,
        pass_id=live.pass_id,
        ids=ids,
        gates=gates,
        ahead=None if routed.ahead is None else routed.ahead[0],
        logits=routed.logits[0] if form.reads_logits else None,
    )


def _seen(form: Form, live: Live, layer: jax.Array, decode: jax.Array, routed: Routed) -> Seen:
    """Gives a visit of several tokens as the policy sees it: `decider.columns` on the device."""
    experts, ids, gates = form.cfg.experts, routed.ids, routed.seen_gates
    if not routed.in_order:
        order = jnp.argsort(-gates, axis=-1, stable=True)
        ids, gates = jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(gates, order, axis=-1)
    nothing, number, first, ahead = jnp.zeros(experts, jnp.float32), jnp.int32(ids.shape[0]), 0, routed.ahead
    if routed.real is not None:  # rows without a token are none of the simulator's
        number, first = jnp.sum(routed.real, dtype=jnp.int32), jnp.argmax(routed.real)
        ahead = None if ahead is None else jnp.where(routed.real[:, None], ahead, 0.0)
    return Seen(
        index=_index(form, live, layer),
        layer=layer,
        pass_id=live.pass_id,
        tokens=number,
        decode=decode.astype(jnp.int32),
        **demanded(ids, gates, experts)._asdict(),
        ahead=nothing if ahead is None else in_order(ahead, nothing),
        logits=routed.logits[first] if form.reads_logits else None,
    )
