"""Matrices of a checkpoint at 4 or 8 bits, in safetensors: ``NAME.int8.codes`` beside ``NAME.int8.scales``.

Codes and scales are those of `quant.Int8` (a scale per row) and `quant.Int4` (a scale per 32 columns). Read as the
floats that they stand for, rounded to bfloat16, so that whoever reads the checkpoint need not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.model import quant

KINDS = ("int8", "int4")
CODES, SCALES = "codes", "scales"


def pack(name: str, matrix: npt.NDArray[Any], kind: str) -> dict[str, npt.NDArray[Any]]:
    """Gives the tensors that stand for a float matrix [out, in]. Raises `SpecmdError` as `quant.quantize`."""
    # halves of a row that 32 does not divide, of a toy's experts, share a scale among fewer columns
    group = math.gcd(quant.INT4_GROUP, matrix.shape[1] // 2) if kind == "int4" else None
    leaf = quant.quantize(matrix, kind, group)
    return {f"{name}.{kind}.{CODES}": leaf.codes, f"{name}.{kind}.{SCALES}": leaf.scales}


def kind_of(name: str, tensors: Mapping[str, Any]) -> str | None:
    """Gives the precision at which ``tensors`` hold a matrix; None: they hold it as it is, or not at all."""
    if name in tensors:
        return None
    return next((kind for kind in KINDS if f"{name}.{kind}.{CODES}" in tensors), None)


def plain_name(name: str) -> str:
    """Gives the name of the matrix that a tensor of a file belongs to; of any other tensor its own."""
    for kind in KINDS:
        for part in (CODES, SCALES):
            name = name.removesuffix(f".{kind}.{part}")
    return name


def unpack(name: str, kind: str, read: Callable[..., npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Gives the matrix [out, in] as bfloat16; ``read`` gives a tensor by its name and the types that it may have."""
    codes = read(f"{name}.{kind}.{CODES}", dtypes=("I8" if kind == "int8" else "U8",))
    scales = read(f"{name}.{kind}.{SCALES}", dtypes=("BF16",)).astype(np.float32)
    if kind == "int8":
        values = codes.astype(np.float32)
    else:
        values = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float32) - 8
    grouped = values.reshape(values.shape[0], scales.shape[-1], -1) * scales[..., None]
    return grouped.reshape(values.shape).astype(ml_dtypes.bfloat16)
