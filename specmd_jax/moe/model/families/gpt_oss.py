"""gpt-oss: experts stored together, in mxfp4 as published."""

from __future__ import annotations

from typing import Any

from specmd_jax.moe.model.families.family import Family, Json
from specmd_jax.moe.model.families.reading import windows_by_type
from specmd_jax.specs.reading import expert_count, get, layer_count, number, whole


def _gpt_oss(hf: Json) -> dict[str, Any]:
    layers, bias = layer_count(hf), get(hf, "attention_bias", bool, True)
    alternate = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return {
        "windows": windows_by_type(hf, whole(hf, "sliding_window", 128), alternate),
        "norm_eps": number(hf, "rms_norm_eps", 1e-5),
        "experts": expert_count(hf),
        "expert_width": whole(hf, "intermediate_size"),
        "router": "topk_softmax",
        "router_bias": True,
        "expert_bias": True,
        "activation": "clamped_swiglu",
        "swiglu_alpha": number(hf, "swiglu_alpha", 1.702),
        "swiglu_limit": number(hf, "swiglu_limit", 7.0),
        "qkv_bias": bias,
        "out_bias": bias,
        "sinks": True,
    }


_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

GPT_OSS = Family(
    extra=_gpt_oss,
    theta=150000.0,
    router="mlp.router",
    experts=_EXPERTS,
    shared="",
    stacked=True,
    tiny={
        "num_local_experts": 8,
        "head_dim": 16,
        "sliding_window": 8,
        "swiglu_limit": 1.0,  # low enough to clamp
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    quantised="mxfp4",
)
