"""`PUBLISHED`: shapes of published models, as the keys of their ``config.json``. Each number is written here only.

`specmd_jax.specs.models.MODELS` counts parameters from them, `specmd_jax.moe.model.published` builds the models that
can be run. Only what shapes and computation depend on is kept. Phi-3.5-MoE's table of long-context factors is left out:
up to 4096 positions its timing is the same without.
"""

from __future__ import annotations

from typing import Any


def _config(family: str, size: tuple[int, int, int, int, int], k: int, positions: int, **rest: Any) -> dict[str, Any]:
    """``size``: width, layers, heads, key-value heads, vocabulary."""
    width, layers, heads, kv_heads, vocabulary = size
    return {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "num_experts_per_tok": k,
        "max_position_embeddings": positions,
        **rest,
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    return _config(
        "gpt_oss",
        (2880, layers, 64, 8, 201_088),
        4,
        131_072,
        num_local_experts=experts,
        intermediate_size=2880,
        head_dim=64,
        sliding_window=128,
        rope_theta=150_000.0,
        rope_scaling=yarn,
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": _config(
        "olmoe", (2048, 16, 16, 16, 50_304), 8, 4096, num_experts=64, intermediate_size=1024, rope_theta=1e4
    ),
    "Mixtral-8x7B": _config(
        "mixtral", (4096, 32, 32, 8, 32_000), 2, 32_768, num_local_experts=8, intermediate_size=14_336, rope_theta=1e6
    ),
    "Qwen1.5-MoE-A2.7B": _config(
        "qwen2_moe",
        (2048, 24, 16, 16, 151_936),
        4,
        8192,
        num_experts=60,
        moe_intermediate_size=1408,
        intermediate_size=5632,
        shared_expert_intermediate_size=5632,
        rope_theta=1e6,
    ),
    "Phi-3.5-MoE": _config(
        "phimoe",
        (4096, 32, 32, 8, 32_064),
        2,
        4096,
        num_local_experts=16,
        intermediate_size=6400,
        attention_bias=True,
        lm_head_bias=True,
        rope_theta=1e4,
    ),
    "Qwen3-30B-A3B": _config(
        "qwen3_moe",
        (2048, 48, 32, 4, 151_936),
        8,
        40_960,
        num_experts=128,
        moe_intermediate_size=768,
        intermediate_size=6144,
        head_dim=128,
        norm_topk_prob=True,
        rope_theta=1e6,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "DeepSeek-V2-Lite": _config(
        "deepseek_v2",
        (2048, 27, 16, 16, 102_400),
        6,
        163_840,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        intermediate_size=10_944,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=1e4,
        rope_scaling={
            "type": "yarn",
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    "DeepSeek-V3": _config(
        "deepseek_v3",
        (7168, 61, 128, 128, 129_280),
        8,
        163_840,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        intermediate_size=18_432,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=1e4,
        rope_scaling={
            "type": "yarn",
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    ),
}
"""config.json dictionaries by model name."""
