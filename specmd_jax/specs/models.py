"""`MODELS`: the shapes and sizes of published mixture-of-experts models, each with its source.

Every number comes from the model's ``config.json`` (`specmd_jax.specs.published`); the tests add them up to the
parameter count of the published weights, and hold them to the shapes of the models that can be run. Attention over the
context (its cache and its scores) is left out: it does not depend on where experts are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from specmd_jax.errors import find
from specmd_jax.specs.parameters import count
from specmd_jax.specs.published import PUBLISHED

BF16 = 16.0
MXFP4 = 4.25  # 4-bit values and one 8-bit scale for every 32
FP8_BLOCK = 8.0 + 32.0 / (128 * 128)  # 8-bit values and one float32 scale for every 128 x 128


@dataclass(frozen=True)
class ModelSpec:
    """One mixture-of-experts model. Layers are MoE layers only; leading dense layers are part of `dense_params`."""

    name: str
    layers: int  # L
    experts: int  # E, routed experts of a layer
    top_k: int  # K, routed experts of a token
    d_model: int
    d_ff: int  # hidden width of one expert (three matrices d_model x d_ff: gate, up, down)
    dense_params: float  # per MoE layer: attention, norms, router, shared experts, its share of leading dense layers
    head_params: int  # final norm and unembedding, read once per pass
    embed_params: int  # token embedding: one row per token is read, so it costs memory but no time
    source: str  # where the config is published
    weights_bits: float = BF16  # native bits of an expert weight, scales included
    expert_bias_params: int = 0  # biases of one expert, always 16 bits
    dense_bits: float = BF16
    head_bits: float = BF16
    notes: str = ""

    @property
    def expert_weights(self) -> int:
        """Weights of one expert without biases."""
        return 3 * self.d_model * self.d_ff

    @property
    def expert_params(self) -> int:
        return self.expert_weights + self.expert_bias_params

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as published."""
        return self.expert_bytes_at(self.weights_bits)

    def expert_bytes_at(self, bits: float) -> int:
        """Gives an expert's bytes if its weights take `bits` each, scales included, rounded up; biases take 16 bits."""
        return math.ceil(self.expert_weights * bits / 8) + 2 * self.expert_bias_params

    @property
    def expert_flops_per_token(self) -> int:
        """One multiplication and one addition per parameter."""
        return 2 * self.expert_params

    @property
    def dense_bytes(self) -> float:
        """Bytes that the dense part of one layer reads in a pass."""
        return self.dense_params * self.dense_bits / 8

    @property
    def dense_flops_per_token(self) -> float:
        """Per layer."""
        return 2 * self.dense_params

    @property
    def head_bytes(self) -> float:
        return self.head_params * self.head_bits / 8

    @property
    def head_flops_per_token(self) -> int:
        return 2 * self.head_params

    @property
    def token_cycle_bytes(self) -> int:
        """Bytes of the experts that one token uses: below this much cache, recency alone cannot hit."""
        return self.layers * self.top_k * self.expert_bytes

    @property
    def all_expert_bytes(self) -> int:
        return self.layers * self.experts * self.expert_bytes

    @property
    def total_params(self) -> int:
        """Parameters of the whole model."""
        per_layer = self.experts * self.expert_params + self.dense_params
        return round(self.layers * per_layer) + self.head_params + self.embed_params


def model(name: str) -> ModelSpec:
    """Gives the model called `name`, in any case. Raises `SpecmdError` listing the known ones."""
    return MODELS[find("model", name, MODELS)]


def _published(name: str, repository: str, **how: Any) -> ModelSpec:
    """Gives a row of `PUBLISHED`; ``how``: what its weights are stored as, and notes."""
    counts = count(PUBLISHED[name])
    return ModelSpec(
        name=name,
        layers=counts.layers,
        experts=counts.experts,
        top_k=counts.top_k,
        d_model=counts.d_model,
        d_ff=counts.d_ff,
        dense_params=counts.dense,
        head_params=counts.head,
        embed_params=counts.embed,
        source=f"https://huggingface.co/{repository}/blob/main/config.json",
        expert_bias_params=counts.expert_bias,
        **how,
    )


_GPT_OSS: dict[str, Any] = {"weights_bits": MXFP4, "notes": "experts in MXFP4, everything else in bf16"}

_SPECS = (
    _published("OLMoE-1B-7B", "allenai/OLMoE-1B-7B-0924"),
    _published("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
    _published(
        "Qwen1.5-MoE-A2.7B",
        "Qwen/Qwen1.5-MoE-A2.7B",
        notes="the shared expert (width 5632) and its gate count as dense",
    ),
    _published("Phi-3.5-MoE", "microsoft/Phi-3.5-MoE-instruct", notes="layer norms with biases; the head has a bias"),
    _published("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
    _published("gpt-oss-20b", "openai/gpt-oss-20b", **_GPT_OSS),
    _published("gpt-oss-120b", "openai/gpt-oss-120b", **_GPT_OSS),
    _published(
        "DeepSeek-V2-Lite",
        "deepseek-ai/DeepSeek-V2-Lite",
        notes="layer 0 of 27 is dense; two shared experts per layer count as dense",
    ),
    _published(
        "DeepSeek-V3",
        "deepseek-ai/DeepSeek-V3",
        weights_bits=FP8_BLOCK,
        dense_bits=FP8_BLOCK,
        notes="layers 0-2 of 61 are dense; one shared expert per layer counts as dense; the module that predicts "
        "several tokens is left out; the bf16 router and norms are counted as fp8",
    ),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}
