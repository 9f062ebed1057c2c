"""`MODELS`: the shapes and sizes of published mixture-of-experts models, each with its source.

Every number comes from the model's ``config.json``; the tests add them up to the parameter count of the published
weights. Attention over the context (its cache and its scores) is left out: it does not depend on where experts are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from specmd_jax.errors import unknown

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
    head_params: int  # final norm and unembedding, read once a pass
    embed_params: int  # token embedding: one row a token is read, so it costs memory but no time
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
        """Bytes of one expert when its weights take `bits` each (scales included), rounded up; biases keep 16 bits."""
        return math.ceil(self.expert_weights * bits / 8) + 2 * self.expert_bias_params

    @property
    def expert_flops_per_token(self) -> int:
        """One multiplication and one addition a parameter."""
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
    """The model called `name`, in any case. Raises `SpecmdError` listing the known ones."""
    by_name = {spec.name.lower(): spec for spec in MODELS.values()}
    if (spec := by_name.get(str(name).strip().lower())) is None:
        raise unknown("model", name, MODELS)
    return spec


def _gqa(
    d_model: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool = False, out_bias: bool = False
) -> int:
    """Parameters of grouped-query attention."""
    weights = 2 * d_model * (heads + kv_heads) * head_dim
    return weights + qkv_bias * (heads + 2 * kv_heads) * head_dim + out_bias * d_model


def _mla(d_model: int, heads: int, *, q_rank: int | None, kv_rank: int, nope: int, rope: int, value: int) -> int:
    """Parameters of multi-head latent attention (DeepSeek), with its inner norms."""
    q_width = heads * (nope + rope)
    q = d_model * q_width if q_rank is None else (d_model + 1 + q_width) * q_rank
    kv = d_model * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value)
    return q + kv + heads * value * d_model


def _glu(d_model: int, width: int) -> int:
    """Parameters of a gated feed-forward block."""
    return 3 * d_model * width


def _dense_params(per_moe_layer: int, moe_layers: int, per_dense_layer: int, dense_layers: int) -> float:
    """Mean over the MoE layers, with the leading dense layers shared out among them."""
    return per_moe_layer + dense_layers * per_dense_layer / moe_layers


def _gpt_oss(name: str, layers: int, experts: int) -> ModelSpec:
    d, vocab = 2880, 201_088
    sinks = 64
    router = experts * d + experts
    return ModelSpec(
        name=name,
        layers=layers,
        experts=experts,
        top_k=4,
        d_model=d,
        d_ff=2880,
        dense_params=_gqa(d, 64, 8, 64, qkv_bias=True, out_bias=True) + sinks + 2 * d + router,
        head_params=vocab * d + d,
        embed_params=vocab * d,
        source=f"https://huggingface.co/openai/{name}/blob/main/config.json",
        weights_bits=MXFP4,
        expert_bias_params=2 * 2880 + d,
        notes="experts in MXFP4, everything else in bf16",
    )


def _deepseek_v2_lite() -> ModelSpec:
    d, vocab, moe_layers = 2048, 102_400, 26
    attention = _mla(d, 16, q_rank=None, kv_rank=512, nope=128, rope=64, value=128) + 2 * d
    return ModelSpec(
        name="DeepSeek-V2-Lite",
        layers=moe_layers,
        experts=64,
        top_k=6,
        d_model=d,
        d_ff=1408,
        dense_params=_dense_params(attention + _glu(d, 2 * 1408) + 64 * d, moe_layers, attention + _glu(d, 10_944), 1),
        head_params=vocab * d + d,
        embed_params=vocab * d,
        source="https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json",
        notes="layer 0 of 27 is dense; two shared experts a layer count as dense",
    )


def _deepseek_v3() -> ModelSpec:
    d, vocab, moe_layers = 7168, 129_280, 58
    attention = _mla(d, 128, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128) + 2 * d
    router = 256 * d + 256
    return ModelSpec(
        name="DeepSeek-V3",
        layers=moe_layers,
        experts=256,
        top_k=8,
        d_model=d,
        d_ff=2048,
        dense_params=_dense_params(attention + _glu(d, 2048) + router, moe_layers, attention + _glu(d, 18_432), 3),
        head_params=vocab * d + d,
        embed_params=vocab * d,
        source="https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json",
        weights_bits=FP8_BLOCK,
        dense_bits=FP8_BLOCK,
        notes="layers 0-2 of 61 are dense; one shared expert a layer counts as dense; the module that predicts several "
        "tokens is left out; the bf16 router and norms are counted as fp8",
    )


_SPECS = (
    ModelSpec(
        name="OLMoE-1B-7B",
        layers=16,
        experts=64,
        top_k=8,
        d_model=2048,
        d_ff=1024,
        dense_params=_gqa(2048, 16, 16, 128) + 2 * 2048 + 2 * 2048 + 64 * 2048,  # norms of q and k span all heads
        head_params=50_304 * 2048 + 2048,
        embed_params=50_304 * 2048,
        source="https://huggingface.co/allenai/OLMoE-1B-7B-0924/blob/main/config.json",
    ),
    ModelSpec(
        name="Mixtral-8x7B",
        layers=32,
        experts=8,
        top_k=2,
        d_model=4096,
        d_ff=14_336,
        dense_params=_gqa(4096, 32, 8, 128) + 2 * 4096 + 8 * 4096,
        head_params=32_000 * 4096 + 4096,
        embed_params=32_000 * 4096,
        source="https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json",
    ),
    ModelSpec(
        name="Qwen1.5-MoE-A2.7B",
        layers=24,
        experts=60,
        top_k=4,
        d_model=2048,
        d_ff=1408,
        dense_params=_gqa(2048, 16, 16, 128, qkv_bias=True) + 2 * 2048 + 60 * 2048 + _glu(2048, 5632) + 2048,
        head_params=151_936 * 2048 + 2048,
        embed_params=151_936 * 2048,
        source="https://huggingface.co/Qwen/Qwen1.5-MoE-A2.7B/blob/main/config.json",
        notes="the shared expert (width 5632) and its gate count as dense",
    ),
    ModelSpec(
        name="Phi-3.5-MoE",
        layers=32,
        experts=16,
        top_k=2,
        d_model=4096,
        d_ff=6400,
        dense_params=_gqa(4096, 32, 8, 128, qkv_bias=True, out_bias=True) + 4 * 4096 + 16 * 4096,
        head_params=32_064 * 4096 + 32_064 + 2 * 4096,
        embed_params=32_064 * 4096,
        source="https://huggingface.co/microsoft/Phi-3.5-MoE-instruct/blob/main/config.json",
        notes="layer norms with biases; the head has a bias",
    ),
    ModelSpec(
        name="Qwen3-30B-A3B",
        layers=48,
        experts=128,
        top_k=8,
        d_model=2048,
        d_ff=768,
        dense_params=_gqa(2048, 32, 4, 128) + 2 * 128 + 2 * 2048 + 128 * 2048,
        head_params=151_936 * 2048 + 2048,
        embed_params=151_936 * 2048,
        source="https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json",
    ),
    _gpt_oss("gpt-oss-20b", 24, 32),
    _gpt_oss("gpt-oss-120b", 36, 128),
    _deepseek_v2_lite(),
    _deepseek_v3(),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}
