"""The architecture of a decoder whose feed-forward layers are mixtures of experts, as one frozen, hashable value.

`families.from_hf` builds it from the ``config.json`` of a checkpoint. Axis letters used throughout `specmd_jax.moe`,
beside those of `specmd_jax.types`::

    B  sequences of a batch    T  tokens of a pass, per sequence    N  = B * T    S  positions a KV cache can hold
    D  model width             F  width of one expert               V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from specmd_jax.errors import unknown

FLOATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Floating-point types that dense weights and unquantised experts may have."""


def float_dtype(name: str) -> np.dtype[Any]:
    """Gives the numpy dtype of a name in `FLOATS`; raises SpecmdError for any other name."""
    if name not in FLOATS:
        raise unknown("floating-point type", name, FLOATS)
    return FLOATS[name]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. ``dim`` entries of each head are rotated; frequencies depend on ``kind``."""

    kind: Literal["default", "linear", "yarn", "longrope"]
    theta: float
    dim: int
    interleaved: bool = False  # pairs are (0,1),(2,3).. instead of (i, i + dim/2)
    factor: float = 1.0  # linear, yarn
    original_positions: int = 0  # yarn, longrope: positions of the pre-training
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    scale: float = 1.0  # yarn: factor on cos and sin
    short_factors: tuple[float, ...] = ()  # longrope, [dim / 2]
    long_factors: tuple[float, ...] = ()  # longrope, [dim / 2]
    short_scale: float = 1.0  # longrope: factor on cos and sin with the short factors
    long_scale: float = 1.0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are kept as one low-rank vector and one shared rotary key."""

    query_rank: int  # 0: queries are projected in one step
    kv_rank: int
    plain_dim: int  # entries of a query or key head without position
    rope_dim: int  # entries with position, shared by all heads on the key side
    value_dim: int


@dataclass(frozen=True)
class MoEConfig:
    """Static description of a model; every shape in `specmd_jax.moe` follows from it."""

    family: str
    dtype: str  # a key of FLOATS: dense weights, activations and KV cache
    vocabulary: int
    width: int  # D
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope: Rope
    attention_scale: float
    windows: tuple[int, ...]  # [layers] positions a query sees; 0: all
    moe_layers: tuple[int, ...]  # layers with routed experts; the rest have a dense MLP
    experts: int  # E
    top_k: int  # K
    expert_width: int  # F
    router: str  # a key of routing.ROUTERS
    renormalize: bool = False  # gates of the chosen experts sum to 1
    gate_scale: float = 1.0
    router_bias: bool = False
    router_jitter: float = 0.0  # sparsemixer: relative distance below which a rival counts
    groups: int = 1  # grouped router: groups of experts ...
    groups_kept: int = 1  # ... and how many of them a token may use
    expert_bias: bool = False
    activation: Literal["swiglu", "clamped_swiglu"] = "swiglu"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    dense_width: int = 0  # MLP of the layers that are not in moe_layers
    shared_width: int = 0  # expert that sees every token; 0: none
    shared_gate: bool = False  # ... weighted by a sigmoid
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "full", "head"] = "none"
    qkv_clip: float = 0.0  # 0: none
    qkv_bias: bool = False
    out_bias: bool = False
    head_bias: bool = False
    sinks: bool = False
    tied: bool = False  # the head is the embedding
    latent: Latent | None = None

    @property
    def np_dtype(self) -> np.dtype[Any]:
        return float_dtype(self.dtype)

    def moe_index(self, layer: int) -> int:
        """Gives the position of a layer among those with routed experts (the L axis of traces and expert stores)."""
        return self.moe_layers.index(layer)
