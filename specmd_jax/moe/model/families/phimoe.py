"""Phi-3.5-MoE (arXiv:2409.12136)."""

from __future__ import annotations

from typing import Any

from specmd_jax.moe.model.families.family import NUMBERED, Family, Json
from specmd_jax.specs.reading import expert_count, get, number, whole


def _phimoe(hf: Json) -> dict[str, Any]:
    bias = get(hf, "attention_bias", bool, False)
    return {
        "norm": "layer",
        "norm_eps": number(hf, "rms_norm_eps", 1e-5),
        "experts": expert_count(hf),
        "expert_width": whole(hf, "intermediate_size"),
        "router": "sparsemixer",
        "router_jitter": number(hf, "router_jitter_noise", 0.01),
        "qkv_bias": bias,
        "out_bias": bias,
        "head_bias": get(hf, "lm_head_bias", bool, False),
    }


PHIMOE = Family(
    extra=_phimoe,
    theta=1e6,
    router="block_sparse_moe.gate",
    experts=NUMBERED,
    shared="",
    stacked=False,
    tiny={
        "num_local_experts": 8,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.2,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "long_factor": [1.0 + 0.8 * i for i in range(8)],
            "short_mscale": 1.2,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 128,
        },
    },
)
