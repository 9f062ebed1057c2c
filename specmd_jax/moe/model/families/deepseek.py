"""DeepSeek-V2 (arXiv:2405.04434): latent attention, shared experts, leading dense layers."""

from __future__ import annotations

from typing import Any, Literal

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.moe.model.config import Latent
from specmd_jax.moe.model.families.family import SPLIT, Family, Json
from specmd_jax.moe.model.families.reading import read_rope, scaling_of
from specmd_jax.moe.model.rope import yarn_scale
from specmd_jax.specs.reading import expert_count, get, layer_count, number, whole


def _deepseek_v2(hf: Json) -> dict[str, Any]:
    if get(hf, "norm_topk_prob", bool, False):
        raise SpecmdError("config.json: deepseek_v2 with norm_topk_prob true is not supported, expected false")
    if get(hf, "mlp_bias", bool, False):
        raise SpecmdError("config.json: deepseek_v2 with mlp_bias true is not supported, expected false")
    if whole(hf, "moe_layer_freq", 1) != 1:
        raise SpecmdError(f"config.json: moe_layer_freq {hf['moe_layer_freq']} is not supported, expected 1")
    routers: dict[str, Literal["softmax_topk", "grouped"]] = {
        "greedy": "softmax_topk",
        "group_limited_greedy": "grouped",
    }
    method = get(hf, "topk_method", str, "greedy")
    if method not in routers:
        raise unknown("topk_method", method, routers)
    latent = Latent(
        query_rank=whole(hf, "q_lora_rank", 0, least=0),
        kv_rank=whole(hf, "kv_lora_rank"),
        plain_dim=whole(hf, "qk_nope_head_dim"),
        rope_dim=whole(hf, "qk_rope_head_dim"),
        value_dim=whole(hf, "v_head_dim"),
    )
    rope = read_rope(hf, latent.rope_dim, 10000.0, interleaved=True)
    all_dim = number(scaling_of(hf), "mscale_all_dim", 0.0)
    temperature = yarn_scale(rope.factor, all_dim) ** 2 if rope.kind != "default" and all_dim else 1.0
    bias = get(hf, "attention_bias", bool, False)
    first = whole(hf, "first_k_dense_replace", 0, least=0)
    return {
        "head_dim": latent.plain_dim + latent.rope_dim,
        "rope": rope,
        "attention_scale": (latent.plain_dim + latent.rope_dim) ** -0.5 * temperature,
        "latent": latent,
        "windows": (0,) * layer_count(hf),
        "moe_layers": tuple(range(first, layer_count(hf))),
        "experts": expert_count(hf),
        "expert_width": whole(hf, "moe_intermediate_size"),
        "dense_width": whole(hf, "intermediate_size", 0),
        "shared_width": whole(hf, "moe_intermediate_size") * whole(hf, "n_shared_experts", 0, least=0),
        "router": routers[method],
        "gate_scale": number(hf, "routed_scaling_factor", 1.0, above=0),
        "groups": whole(hf, "n_group", 1) if method != "greedy" else 1,
        "groups_kept": whole(hf, "topk_group", 1) if method != "greedy" else 1,
        "qkv_bias": bias,
        "out_bias": bias,
    }


DEEPSEEK_V2 = Family(
    extra=_deepseek_v2,
    theta=1e4,
    router="mlp.gate",
    experts=SPLIT,
    shared="mlp.shared_experts",
    stacked=False,
    tiny={
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 32,
        },
    },
)
