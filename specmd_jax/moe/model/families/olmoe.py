"""OLMoE (arXiv:2409.02060)."""

from __future__ import annotations

from typing import Any

from specmd_jax.moe.model.families.family import SPLIT, Family, Json
from specmd_jax.specs.reading import expert_count, get, number, whole


def _olmoe(hf: Json) -> dict[str, Any]:
    bias = get(hf, "attention_bias", bool, False)
    return {
        "norm_eps": number(hf, "rms_norm_eps", 1e-5),
        "experts": expert_count(hf),
        "expert_width": whole(hf, "intermediate_size"),
        "router": "softmax_topk",
        "renormalize": get(hf, "norm_topk_prob", bool, False),
        "qk_norm": "full",
        "qkv_clip": number(hf, "clip_qkv", 0.0),
        "qkv_bias": bias,
        "out_bias": bias,
    }


OLMOE = Family(
    extra=_olmoe,
    theta=1e4,
    router="mlp.gate",
    experts=SPLIT,
    shared="",
    stacked=False,
    tiny={"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5},
)
