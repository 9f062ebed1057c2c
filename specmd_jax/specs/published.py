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


def _glm(layers: int, width: int, experts: int, dense: int, inner: int, leading: int, **rest: Any) -> dict[str, Any]:
    return _config(
        "glm4_moe",
        (width, layers, 96, 8, 151_552),
        8,
        202_752,
        head_dim=128,
        attention_bias=True,
        n_routed_experts=experts,
        n_shared_experts=1,
        moe_intermediate_size=inner,
        intermediate_size=dense,
        first_k_dense_replace=leading,
        **rest,
    )


def _qwen_next(family: str, vocabulary: int, layers: int, experts: int, k: int) -> dict[str, Any]:
    return _config(
        family,
        (2048, layers, 16, 2, vocabulary),
        k,
        262_144,
        head_dim=256,
        num_experts=experts,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        full_attention_interval=4,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        rope_theta=1e7,
    )


_GLM_4_6 = _glm(92, 5120, 160, 12_288, 1536, 3, use_qk_norm=True)
_QWEN_3_5 = _qwen_next("qwen3_5_moe", 248_320, 40, 256, 8)

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
    "Kimi-K2": _config(
        "kimi_k2",
        (7168, 61, 64, 64, 163_840),
        8,
        131_072,
        n_routed_experts=384,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        intermediate_size=18_432,
        first_k_dense_replace=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=5e4,
    ),
    "DeepSeek-V4-Flash": _config(
        "deepseek_v4",
        (4096, 43, 64, 1, 129_280),
        6,
        1_048_576,
        head_dim=512,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        num_hash_layers=3,
        hc_mult=4,
        sliding_window=128,
        compress_ratios=[0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(2, 43))],
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
    ),
    "Qwen3-235B-A22B": _config(
        "qwen3_moe",
        (4096, 94, 64, 4, 151_936),
        8,
        40_960,
        num_experts=128,
        moe_intermediate_size=1536,
        intermediate_size=12_288,
        head_dim=128,
        norm_topk_prob=True,
        rope_theta=1e6,
    ),
    "Qwen3-Next-80B-A3B": _qwen_next("qwen3_next", 151_936, 48, 512, 10),
    "Qwen3.5-35B-A3B": _QWEN_3_5,
    "Qwen3.6-35B-A3B": _QWEN_3_5,
    "GLM-4.5-Air": _glm(46, 4096, 128, 10_944, 1408, 1),
    "GLM-4.6": _GLM_4_6,
    "GLM-4.7": _GLM_4_6,
    "GLM-5": _config(
        "glm_moe_dsa",
        (6144, 78, 64, 64, 154_880),
        8,
        202_752,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        intermediate_size=12_288,
        first_k_dense_replace=3,
        q_lora_rank=2048,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        index_topk=2048,
        index_head_dim=128,
        index_n_heads=32,
    ),
    "MiniMax-M2": _config(
        "minimax_m2",
        (3072, 62, 48, 8, 200_064),
        8,
        196_608,
        head_dim=128,
        num_local_experts=256,
        intermediate_size=1536,
        rope_theta=5e6,
    ),
    "gemma-4-26B-A4B": _config(
        "gemma4_text",
        (2816, 30, 16, 8, 262_144),
        8,
        262_144,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        sliding_window=1024,
        num_experts=128,
        moe_intermediate_size=704,
        intermediate_size=2112,
        tie_word_embeddings=True,
    ),
    "Llama-4-Scout": _config(
        "llama4_text",
        (5120, 48, 40, 8, 202_048),
        1,
        10_485_760,
        head_dim=128,
        num_local_experts=16,
        intermediate_size=8192,
        intermediate_size_mlp=16_384,
        attention_chunk_size=8192,
        rope_theta=5e5,
    ),
}
"""config.json dictionaries by model name."""
