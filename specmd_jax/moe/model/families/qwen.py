"""Qwen's mixtures: Qwen1.5-MoE (`qwen2_moe`) and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from specmd_jax.moe.model.families.family import SPLIT, Family, Json
from specmd_jax.moe.model.families.reading import windows_by_type
from specmd_jax.specs.reading import expert_count, get, layer_count, sparse_layers, whole


def _qwen(hf: Json) -> dict[str, Any]:
    return {
        "moe_layers": sparse_layers(hf),
        "experts": expert_count(hf),
        "expert_width": whole(hf, "moe_intermediate_size"),
        "dense_width": whole(hf, "intermediate_size", 0),
        "router": "softmax_topk",
        "renormalize": get(hf, "norm_topk_prob", bool, False),
    }


def _qwen2_moe(hf: Json) -> dict[str, Any]:
    layers, used = layer_count(hf), get(hf, "use_sliding_window", bool, False)
    below = whole(hf, "max_window_layers", 28, least=0)
    # the family's own rule: of the layers below the border, every second one starting with the first
    default = ["sliding_attention" if used and i < below and i % 2 == 0 else "full_attention" for i in range(layers)]
    return _qwen(hf) | {
        "windows": windows_by_type(hf, whole(hf, "sliding_window", 4096) if used else 0, default),
        "qkv_bias": get(hf, "qkv_bias", bool, True),
        "shared_width": whole(hf, "shared_expert_intermediate_size"),
        "shared_gate": True,
    }


def _qwen3_moe(hf: Json) -> dict[str, Any]:
    bias, used = get(hf, "attention_bias", bool, False), get(hf, "use_sliding_window", bool, False)
    return _qwen(hf) | {
        "windows": (whole(hf, "sliding_window", 4096) if used else 0,) * layer_count(hf),
        "qk_norm": "head",
        "qkv_bias": bias,
        "out_bias": bias,
    }


QWEN2_MOE = Family(
    extra=_qwen2_moe,
    theta=1e4,
    router="mlp.gate",
    experts=SPLIT,
    shared="mlp.shared_expert",
    stacked=False,
    tiny={
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "mlp_only_layers": [1],
        "num_experts_per_tok": 4,
    },
)

QWEN3_MOE = Family(
    extra=_qwen3_moe,
    theta=1e4,
    router="mlp.gate",
    experts=SPLIT,
    shared="",
    stacked=False,
    tiny={"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 24, "norm_topk_prob": True},
)
