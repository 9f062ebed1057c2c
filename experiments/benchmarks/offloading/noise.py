"""Experts of few bits made of noise, a layer at a time: encoding billions of random numbers would take minutes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.experts import Expert, expert_spec
from specmd_jax.moe.model.quant import MXFP4, Int4, Int8

RMS = {Int8: 73.0, Int4: 4.3, MXFP4: 2.7}
"""Of the values that random codes stand for, before they are scaled."""


def noisy_layers(cfg: MoEConfig, precision: str) -> Iterator[Expert]:
    """Gives experts [E, ...] of every routed layer (numpy leaves), whose products keep the variance of their input."""
    spec = expert_spec(cfg, precision)
    for layer in range(len(cfg.moe_layers)):
        rng = np.random.default_rng((0, layer))
        yield Expert(
            *(_noisy(rng, cfg.experts, leaf) for leaf in (spec.gate_up, spec.down)),
            *(_biases(rng, cfg.experts, leaf) for leaf in (spec.gate_up_bias, spec.down_bias)),
        )


def _noisy(rng: np.random.Generator, experts: int, leaf: Any) -> Any:
    rows, columns = leaf.codes.shape
    codes = np.frombuffer(rng.bytes(experts * rows * columns), leaf.codes.dtype).reshape(experts, rows, columns)
    entries = columns * (1 if isinstance(leaf, Int8) else 2)
    scale = entries**-0.5 / RMS[type(leaf)]
    if isinstance(leaf, MXFP4):
        scale = 127 + round(math.log2(scale))
    return type(leaf)(codes, np.full((experts, *leaf.scales.shape), scale, leaf.scales.dtype))


def _biases(rng: np.random.Generator, experts: int, leaf: jax.ShapeDtypeStruct | None) -> npt.NDArray[Any] | None:
    return None if leaf is None else rng.uniform(-0.1, 0.1, (experts, *leaf.shape)).astype(leaf.dtype)
