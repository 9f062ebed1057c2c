"""One visit inside a program: what the policy decides and where everybody is put, copies, experts.

Shapes: T tokens of the pass, K experts per token (-1: a row without a token), L routed layers of E experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specmd_jax.moe.fused import placing, streaming
from specmd_jax.moe.fused.arrays import Fixed, Form, Live, Record, Routed
from specmd_jax.moe.kernels import many_tokens, one_token, policy
from specmd_jax.moe.kernels.placed import Book, Placed, Token, blank_log
from specmd_jax.moe.model import experts as moe_experts
from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.runtime.decider import Decision, Seen
from specmd_jax.replay.totals import DROPPED, SUBSTITUTED


def visit(
    form: Form, fixed: Fixed, live: Live, record: Record, layer: jax.Array, decode: jax.Array, routed: Routed
) -> tuple[Live, Record, jax.Array]:
    """Decides, copies and computes one layer's experts: also their weighted sum [T, D]. The visit is noted in the
    layer's row of the record."""
    see = _token if routed.ids.shape[0] == 1 else _seen
    seen = see(form, live, layer, decode, routed)
    cache, placed, note, record = _place(form, fixed, live.cache, seen, record, routed)
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


def _place(
    form: Form, fixed: Fixed, cache: Any, seen: Seen | Token, record: Record, routed: Routed
) -> tuple[Any, Placed, Any, Record]:
    """Takes one step of the cache, by the kernel or by XLA's operations, and notes it."""
    given = form.frame, fixed.numbers, fixed.mix, cache, seen
    interpret, wholes = form.kernels.interpret, (record.ids, record.gates, record.note)
    if form.kernels.policy and isinstance(seen, Token):
        cache, placed, book = policy.visit(*given, interpret=interpret, book=Book(*wholes))
        return cache, placed, book.log, record._replace(ids=book.ids, gates=book.gates, note=book.log)
    if form.kernels.policy:
        cache, placed, log = policy.visit(*given, interpret=interpret)
        note = jax.tree.map(lambda leaf: leaf[0], log)
    else:
        cache, placed, note = placing.visit(*given)
    wholes = put_row(wholes, (routed.ids, routed.seen_gates, note), seen.layer)
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
    form: Form, layer: jax.Array, h: jax.Array, ids: jax.Array, placed: Placed, host: Expert, slots: Expert
) -> tuple[jax.Array, Expert]:
    """Gives the output of every pair [T, K, D] float32, and the slots."""
    cfg, interpret = form.cfg, form.kernels.interpret
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
    cfg, ids, gates = form.cfg, routed.ids, routed.seen_gates
    tokens, top_k = ids.shape
    choice = jnp.arange(top_k, dtype=jnp.int32)
    larger = gates[:, None, :] > gates[:, :, None]  # [T, K, K]: the last one's gate is above the one's before
    equal = (gates[:, None, :] == gates[:, :, None]) & (choice[None, :] < choice[:, None])[None]
    place = jnp.sum(larger | equal, axis=-1, dtype=jnp.int32)  # in falling order
    place = place + top_k * jnp.arange(tokens, dtype=jnp.int32)[:, None]
    chosen = ids[:, :, None] == jnp.arange(cfg.experts, dtype=jnp.int32)[None, None]  # [T, K, E]
    last = jnp.max(jnp.where(chosen, place[:, :, None], -1), axis=(0, 1))
    count = jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)
    before = (last[None, :] < last[:, None]) & (last >= 0)[None, :]
    number, first, ahead = jnp.int32(tokens), 0, routed.ahead
    if routed.real is not None:  # rows without a token are none of the simulator's
        number, first = jnp.sum(routed.real, dtype=jnp.int32), jnp.argmax(routed.real)
        ahead = None if ahead is None else jnp.where(routed.real[:, None], ahead, 0.0)
    return Seen(
        index=_index(form, live, layer),
        layer=layer,
        pass_id=live.pass_id,
        tokens=number,
        decode=decode.astype(jnp.int32),
        count=count,
        mass=_in_order(jnp.sum(jnp.where(chosen, gates[:, :, None], 0.0), axis=1)),
        rank=jnp.where(count > 0, jnp.sum(before, axis=1, dtype=jnp.int32), -1),
        ahead=jnp.zeros(cfg.experts, jnp.float32) if ahead is None else _in_order(ahead),
        logits=routed.logits[first] if form.reads_logits else None,
    )


def _in_order(rows: jax.Array) -> jax.Array:
    """Gives the sum of [T, E] over the tokens, one after the other, as the schedule has it."""
    return lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(rows[0]), rows, unroll=16)[0]
