"""Mixtral (arXiv:2401.04088)."""

from __future__ import annotations

from typing import Any

from specmd_jax.moe.model.families.family import NUMBERED, Family, Json
from specmd_jax.specs.reading import expert_count, number, whole


def _mixtral(hf: Json) -> dict[str, Any]:
    return {
        "norm_eps": number(hf, "rms_norm_eps", 1e-5),
        "experts": expert_count(hf),
        "expert_width": whole(hf, "intermediate_size"),
        "router": "softmax_topk",
        "renormalize": True,
    }


MIXTRAL = Family(
    extra=_mixtral,
    theta=1e6,
    router="block_sparse_moe.gate",
    experts=NUMBERED,
    shared="",
    stacked=False,
    tiny={"num_local_experts": 8, "sliding_window": 12},
)
