"""A dense MLP or a shared expert for one row, in two launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from specmd_jax.moe.kernels.rows import Tile, choose_tile, fit, lanes, load, normed, place, stacked, weigh
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import activation
from specmd_jax.moe.model.forward import Params


class _Up(NamedTuple):
    h: Any  # [1, D]
    gate: Any  # [L, F, D]
    up: Any  # [L, F, D]
    index: Any


class _Down(NamedTuple):
    hidden: Any  # [1, F]
    down: Any  # [L, D, F]
    h: Any  # [1, D]
    weigher: Any  # [L, 1, D]; None: the result is not weighed
    index: Any


def mlp(
    cfg: MoEConfig,
    params: Params,
    h: jax.Array,
    weigher: Params | None = None,
    *,
    index: jax.Array | None = None,
    tiles: tuple[Tile | None, Tile | None] = (None, None),
    interpret: bool = False,
) -> jax.Array:
    """Computes ``down(activation(gate(h), up(h)))`` of one row [1, D] -> [1, D].

    Args:
        params: dictionaries ``gate``, ``up`` and ``down`` with ``weight`` [out, in]; no biases.
        weigher: the shared expert's gate, ``weight`` [1, D], whose sigmoid weighs the result; None: none.
        index: [1] int32; then all parameters have a leading axis of layers, and this is the layer.
        tiles: of the two launches.
    """
    gate, up, down = (stacked(params[name]["weight"], index) for name in ("gate", "up", "down"))
    (_, inner, width), dtype = gate.shape, h.dtype
    first = fit(tiles[0] or choose_tile([inner], width, 2), [inner], width)
    second = fit(tiles[1] or choose_tile([width], inner), [width], inner)

    def gate_up(given: _Up, out: Any) -> None:
        at, row = place(given.index), pl.program_id(0) * first.rows
        wide = weigh([given.gate, given.up], at, row, first, lambda: normed(given.h, None, at, 0.0, first.columns))
        out[0, pl.ds(row, first.rows)] = activation(cfg, *wide).astype(dtype)

    def down_rows(given: _Down, out: Any) -> None:
        at, row = place(given.index), pl.program_id(0) * second.rows
        (sums,) = weigh([given.down], at, row, second, lambda: normed(given.hidden, None, at, 0.0, second.columns))
        value = sums.astype(dtype)
        if given.weigher is not None:
            lane, mask = lanes(width)
            logit = jnp.sum(load(given.h, (0, lane), mask) * load(given.weigher, (at, 0, lane), mask))
            value = (value.astype(jnp.float32) * jax.nn.sigmoid(logit)).astype(dtype)
        out[0, pl.ds(row, second.rows)] = value

    hidden = pl.pallas_call(
        gate_up,
        grid=(inner // first.rows,),
        out_shape=jax.ShapeDtypeStruct((1, inner), dtype),
        compiler_params=first.compiler_params,
        interpret=interpret,
        name="gate_up",
    )(_Up(h, gate, up, index))
    weight = None if weigher is None else stacked(weigher["weight"], index)
    return pl.pallas_call(
        down_rows,
        grid=(width // second.rows,),
        out_shape=jax.ShapeDtypeStruct((1, width), dtype),
        compiler_params=second.compiler_params,
        interpret=interpret,
        name="down_rows",
    )(_Down(hidden, down, h, weight, index))
