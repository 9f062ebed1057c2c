"""How an expert kernel is launched: the block that a program works on at a time, by what its matrix is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmd_jax.moe.model.quant import Leaf


@dataclass(frozen=True)
class Shape:
    """The work of a program: ``rows`` rows of a matrix, ``codes`` codes of each at a time (powers of two)."""

    rows: int
    codes: int
    num_warps: int = 4
    num_stages: int = 1

    @property
    def compiler_params(self) -> triton.CompilerParams:
        return triton.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


def is_encoded(leaf: Leaf) -> bool:
    """Says whether the matrix has codes and scales."""
    return hasattr(leaf, "codes")


def fit(shape: Shape, outputs: int) -> Shape:
    """Gives the shape with no more rows than divide the matrix's."""
    return Shape(math.gcd(shape.rows, outputs), shape.codes, shape.num_warps, shape.num_stages)


def nothing(x: jax.Array, interpret: bool = False) -> jax.Array:
    """Gives a small array halved and raised by 1: a kernel that does next to nothing, to time a launch."""

    def program(x_ref: Any, out_ref: Any) -> None:
        out_ref[:] = x_ref[:] * 0.5 + 1.0

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = triton.CompilerParams(num_warps=1, num_stages=1)
    return pl.pallas_call(program, out_shape=shape, compiler_params=params, interpret=interpret, name="nothing")(x)
