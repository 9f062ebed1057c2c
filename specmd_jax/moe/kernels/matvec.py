"""One row through a norm and several matrices in one launch; nothing is written but the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from specmd_jax.loops import next_power_of_two
from specmd_jax.moe.kernels.rows import Tile, choose_tile, fit, normed, normed_row, place, stacked, weigh
from specmd_jax.moe.model.forward import Params


class Row(NamedTuple):
    """A row [1, D] and the norm that it goes through; see `Norm` in `specmd_jax.moe.model.layers`."""

    x: Any  # [1, D]
    norm: Params | None = None  # weight [D], bias [D]: a LayerNorm; None: none


class Projected(NamedTuple):
    outputs: tuple[Any, ...]  # [1, out] each
    normed: Any  # [1, D]: the row behind its norm; None unless asked for
    zeros: Any  # [n] int32: counters for a kernel that follows


class _Given(NamedTuple):
    row: Row
    linears: tuple[Params, ...]
    residual: Any
    index: Any


def project(
    row: Row,
    linears: Sequence[Params],
    eps: float = 0.0,
    *,
    residual: jax.Array | None = None,
    dtype: Any = None,
    keep_normed: bool = False,
    zeros: int = 0,
    index: jax.Array | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Projected:
    """Multiplies a row by matrices: ``norm(x) @ weight.T + bias`` for each of ``linears``, all [1, out].

    Each program norms the row for itself and takes a block of rows of one matrix. Sums are float32.

    Args:
        row: the row [1, D] and its norm. ``eps`` is the norm's.
        linears: dictionaries with ``weight`` [out, D] and maybe ``bias`` [out].
        residual: [1, out] to add to the only output, after that is rounded to ``dtype``.
        dtype: of the outputs; None: of ``x``.
        keep_normed: whether to give the normed row, too.
        zeros: how many counters to clear on the way.
        index: [1] int32; then all parameters have a leading axis of layers, and this is the layer.
    """
    dtype, width = jnp.dtype(dtype or row.x.dtype), row.x.shape[-1]
    outs = [linear["weight"].shape[-2] for linear in linears]
    tile = fit(tile or choose_tile(outs, width), outs, width)
    ends = [sum(outs[: n + 1]) // tile.rows for n in range(len(outs))]
    given = _Given(Row(row.x, stacked(row.norm, index)), tuple(stacked(list(linears), index)), residual, index)
    shapes = Projected(
        tuple(jax.ShapeDtypeStruct((1, out), dtype) for out in outs),
        jax.ShapeDtypeStruct((1, width), row.x.dtype) if keep_normed else None,
        jax.ShapeDtypeStruct((next_power_of_two(zeros),), jnp.int32) if zeros else None,
    )

    def project_rows(given: _Given, made: Projected) -> None:
        block, at = pl.program_id(0), place(given.index)

        def prepare() -> Any:
            return normed(given.row.x, given.row.norm, at, eps, tile.columns)

        def run(linear: Params, output: Any, begin: int) -> None:
            first = (block - begin) * tile.rows
            mine = pl.ds(first, tile.rows)
            (sums,) = weigh([linear["weight"]], at, first, tile, prepare)
            if "bias" in linear:
                sums = sums + linear["bias"][at, mine].astype(jnp.float32)
            value = sums.astype(dtype)
            output[0, mine] = value if given.residual is None else given.residual[0, mine] + value

        for begin, end, linear, output in zip([0, *ends], ends, given.linears, made.outputs, strict=False):
            if len(ends) == 1:
                run(linear, output, 0)
            else:
                pl.when((block >= begin) & (block < end))(lambda a=linear, b=output, c=begin: run(a, b, c))

        @pl.when(block == 0)
        def _() -> None:
            if made.normed is not None:
                normed_row(given.row.x, given.row.norm, at, eps, made.normed)
            if made.zeros is not None:
                made.zeros[:] = jnp.zeros(made.zeros.shape, jnp.int32)

    return pl.pallas_call(
        project_rows,
        grid=(ends[-1],),
        out_shape=(shapes,),
        compiler_params=tile.compiler_params,
        interpret=interpret,
        name="project",
    )(given)[0]


def normalize(row: Row, eps: float, *, index: jax.Array | None = None, interpret: bool = False) -> jax.Array:
    """Gives the row [1, D] behind its norm, in its dtype; see `project`."""

    def norm_row(row: Row, index_ref: Any, out: Any) -> None:
        normed_row(row.x, row.norm, place(index_ref), eps, out)

    return pl.pallas_call(
        norm_row,
        out_shape=jax.ShapeDtypeStruct(row.x.shape, row.x.dtype),
        compiler_params=Tile(1, 1).compiler_params,
        interpret=interpret,
        name="norm_row",
    )(Row(row.x, stacked(row.norm, index)), index)
