"""The tables that eviction policies keep, and `scored`, which makes a policy from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from specmd_jax.policies.base import Arrival, Column, Curve, Eviction, Keys, Now, Rows, Start, Use


def full(value: float, dtype: Any) -> Callable[[Start], Shaped[Array, "L E"]]:
    return lambda start: jnp.full(start.first_use.shape, value, dtype)


def never(start: Start) -> Int32[Array, "L E"]:
    """Fills a column of touches: -1, or below by the rank of a warm start, so that what counts least leaves first."""
    return jnp.full(start.first_use.shape, -1, jnp.int32) if start.rank is None else -1 - start.rank


def on_demand(old: Shaped[Array, " E"], use: Use, new: Shaped[Array, " *#E"]) -> Shaped[Array, " E"]:
    return jnp.where(use.demand, new, old)


TOUCH = Column(
    never,
    lambda row, use: on_demand(row, use, use.touch),
    lambda rows, a: jnp.where(a.arrived, a.touch, rows),
)
LOADED = Column(
    never,
    lambda row, use: jnp.where(use.loaded, use.touch, row),
    lambda rows, a: jnp.where(a.arrived, a.touch, rows),
)
LAST_VISIT = Column(
    full(-1, jnp.int32),
    lambda row, use: on_demand(row, use, use.now.visit),
    lambda rows, a: jnp.where(a.arrived, a.visit, rows),
)
COUNT = Column(full(0, jnp.int32), lambda row, use: row + use.demand.astype(jnp.int32))
COUNT_SINCE_LOAD = Column(
    full(0, jnp.int32),
    lambda row, use: jnp.where(use.loaded, 1, row + use.demand.astype(jnp.int32)),
    lambda rows, a: jnp.where(a.arrived, 0, rows),
)
TOP_COUNT = Column(full(0, jnp.int32), lambda row, use: row + use.top.astype(jnp.int32))
MASS = Column(full(0, jnp.float32), lambda row, use: on_demand(row, use, row + use.mass))
MARK = Column(
    full(-1, jnp.int32),
    lambda row, use: on_demand(row, use, use.now.pass_id),
    lambda rows, a: jnp.where(a.selected, a.pass_id[:, None], rows),
)
LAST_PASS = Column(
    full(-1, jnp.int32),
    lambda row, use: on_demand(row, use, use.now.pass_id),
    lambda rows, a: jnp.where(a.arrived, a.pass_id[:, None], rows),
)
SEGMENT = Column(
    full(0, jnp.int32),
    lambda row, use: jnp.where(use.loaded, 0, jnp.where(use.hit, 1, row)),
    lambda rows, a: jnp.where(a.arrived, 0, rows),
)
FLAT = Column(
    lambda start: jnp.arange(start.first_use.size, dtype=jnp.int32).reshape(start.first_use.shape), lambda row, use: row
)
NEXT_USE = Column(lambda start: start.first_use, lambda row, use: on_demand(row, use, use.next_use))


def fading(decay: float | Float[Array, ""], new: Callable[[Use], Shaped[Array, " E"]]) -> Column:
    """Makes a column that fades by `decay` at every visit of its layer."""

    def fade(row: Float32[Array, " E"], use: Use) -> Float32[Array, " E"]:
        # (value + new) * decay, not value * decay + new: no fused multiply-add can round it differently elsewhere;
        # and some devices flush what is below the smallest normal number, so all of them do
        value = (row + new(use).astype(jnp.float32)) * jnp.float32(decay)
        return jnp.where(value < jnp.finfo(jnp.float32).tiny, 0.0, value)

    return Column(full(0, jnp.float32), fade)


def scored(
    keep: Callable[..., Keys],
    *,
    static_rows: bool = True,
    bypass: bool = False,
    oracle: bool = False,
    curve: Curve | None = None,
    **columns: Column,
) -> Eviction:
    """Makes a policy that keeps `columns` and scores `keep(now, layer, **columns)`."""

    def init(start: Start) -> dict[str, Shaped[Array, "L E"]]:
        return {name: column.fill(start) for name, column in columns.items()}

    def observe(state: dict[str, Shaped[Array, "L E"]], use: Use) -> dict[str, Shaped[Array, "L E"]]:
        layer = use.now.layer
        return {
            name: state[name].at[layer].set(column.used(state[name][layer], use)) for name, column in columns.items()
        }

    def arrive(state: dict[str, Shaped[Array, "L E"]], arrival: Arrival) -> dict[str, Shaped[Array, "L E"]]:
        rows = arrival.rows
        return {
            name: state[name].at[rows].set(column.arrived(state[name][rows], arrival))
            for name, column in columns.items()
        }

    def keep_score(state: dict[str, jax.Array], now: Now, layer: jax.Array) -> Keys:
        return keep(now, layer, **state)

    return Eviction(init, observe, arrive, keep_score, bypass, static_rows, oracle, Rows(columns, keep), curve)


def cyclic_distance(now: Now, layer: Int32[Array, " *n"]) -> Int32[Array, " *n"]:
    """Gives the layers until `layer` is visited again; a full cycle for the layer being visited."""
    return jnp.mod(layer - now.layer - 1, now.layers) + 1
