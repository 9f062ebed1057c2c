"""`FAMILIES`: one row per family."""

from __future__ import annotations

from specmd_jax.moe.model.families.deepseek import DEEPSEEK_V2
from specmd_jax.moe.model.families.family import Family
from specmd_jax.moe.model.families.gpt_oss import GPT_OSS
from specmd_jax.moe.model.families.mixtral import MIXTRAL
from specmd_jax.moe.model.families.olmoe import OLMOE
from specmd_jax.moe.model.families.phimoe import PHIMOE
from specmd_jax.moe.model.families.qwen import QWEN2_MOE, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "olmoe": OLMOE,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "phimoe": PHIMOE,
    "gpt_oss": GPT_OSS,
    "deepseek_v2": DEEPSEEK_V2,
}
"""Supported families by the ``model_type`` of their config."""
