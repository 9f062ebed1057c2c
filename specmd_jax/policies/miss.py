"""Miss handling: what happens to a demanded expert that is not resident at the precision it needs (CONTRACT.md).

A rule sees the visited layer's row and returns a `Plan`. To add one: write a function that returns a `Miss` and give it
a line in `MISS`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from specmd_jax.policies.base import Miss, Plan, Row
from specmd_jax.policies.numbers import Count, Share


def _plan(row: Row, need: jax.Array | int, fetch: jax.Array | int) -> Plan:
    shape = row.demand.shape
    return Plan(
        jnp.broadcast_to(jnp.asarray(need, jnp.int32), shape),
        jnp.broadcast_to(jnp.asarray(fetch, jnp.int32), shape),
        jnp.zeros(shape, bool),
        jnp.full(shape, -1, jnp.int32),
    )


def fetch() -> Miss:
    """Copy it at the highest stored precision and wait."""
    return Miss(lambda row: _plan(row, row.levels, row.levels), fetches_all=True)


def fetch_lowest_bit() -> Miss:
    """Copy it at the cheapest stored precision; any resident precision will do."""
    return Miss(lambda row: _plan(row, 1, 1), least_levels=2)


def fetch_priority(bottom: Share = 0.6) -> Miss:
    """Important experts at the highest precision; the `bottom` share of the demand by gate mass at the cheapest."""

    def rule(row: Row) -> Plan:
        n = jnp.sum(row.demand).astype(jnp.float32)
        low = row.order.astype(jnp.float32) >= (1.0 - bottom) * n - 1e-4
        level = jnp.where(low, 1, row.levels)
        return _plan(row, level, level)

    return Miss(rule, least_levels=2)


def cascade(high: Share = 0.6, low: Share = 0.2) -> Miss:
    """HOBBIT: precision by gate share, highest from `high` on, middle from `low` on, cheapest below."""

    def rule(row: Row) -> Plan:
        share = row.mass / jnp.maximum(jnp.sum(jnp.where(row.demand, row.mass, 0.0)), 1e-30)
        level = jnp.where(share >= high - 1e-6, row.levels, jnp.where(share >= low - 1e-6, (row.levels + 1) // 2, 1))
        return _plan(row, level, level)

    return Miss(rule, least_levels=2)


def drop(keep: Count = 2) -> Miss:
    """Skip a missing expert unless it is among the visit's `keep` most important ones."""

    def rule(row: Row) -> Plan:
        return _plan(row, row.levels, jnp.where(row.order >= keep, 0, row.levels))

    return Miss(rule)


def substitute(tolerance: Share = 0.1) -> Miss:
    """Run the likeliest resident expert whose router probability is within `tolerance` of the missing one's instead.

    One expert may stand in for several. A pass of several tokens has no single probability: there, and if none
    qualifies, fetch.
    """

    def rule(row: Row) -> Plan:
        assert row.probability is not None
        spare, likely = (row.arrived & ~row.demand)[None], row.probability[None]
        near = spare & (jnp.abs(likely - row.probability[:, None]) <= tolerance)  # [missing, stand-in]
        best = jnp.argmax(jnp.where(near, likely, -1.0), axis=1).astype(jnp.int32)
        found = jnp.any(near, axis=1)
        return _plan(row, row.levels, jnp.where(found, 0, row.levels))._replace(instead=jnp.where(found, best, -1))

    return Miss(rule, needs_logits=True)


def cpu() -> Miss:
    """Fills, then is static: copy it while the pool has room without an eviction, else run it on the host."""

    def rule(row: Row) -> Plan:
        missing = row.demand & (row.level < row.levels)
        before = missing[None] & (row.order[None] < row.order[:, None])  # [missing, those of more gate mass]
        fills = jnp.sum(before, axis=1, dtype=jnp.int32) < row.room
        return _plan(row, row.levels, jnp.where(fills, row.levels, 0))._replace(host=~fills)

    return Miss(rule, hosts=True)


def split() -> Miss:
    """Copy it or run it on the host, whichever ends the visit first; only what is copied is admitted."""

    def rule(row: Row) -> Plan:
        return _plan(row, row.levels, row.levels)._replace(host=jnp.ones(row.demand.shape, bool))

    return Miss(rule, hosts=True, divides=True)


MISS: dict[str, Callable[..., Miss]] = {
    "fetch": fetch,
    "fetch_lowest_bit": fetch_lowest_bit,
    "fetch_priority": fetch_priority,
    "cascade": cascade,
    "drop": drop,
    "substitute": substitute,
    "cpu": cpu,
    "split": split,
}
