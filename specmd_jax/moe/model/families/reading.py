"""Reading the keys of a ``config.json`` that several families have, each checked."""

from __future__ import annotations

import dataclasses

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.moe.model.config import Rope, float_dtype
from specmd_jax.moe.model.families.family import Json
from specmd_jax.moe.model.rope import yarn_scale
from specmd_jax.specs.reading import get


def own_dtype(hf: Json) -> str:
    name = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    float_dtype(name)
    return name


def read_rope(hf: Json, head_dim: int, default_theta: float, interleaved: bool = False) -> Rope:
    """Reads both spellings: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters`` with both inside."""
    scaling = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or get(hf, "rope_theta", float, default_theta))
    partial = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise SpecmdError(f"config.json: partial_rotary_factor {partial} is not supported, expected 1")
    rope = Rope(kind="default", theta=theta, dim=head_dim, interleaved=interleaved)
    if kind == "default":
        return rope
    # a value outside the scaling takes precedence: families that have one keep the pre-training length there
    original = get(hf, "original_max_position_embeddings", int, 0) or get(
        scaling, "original_max_position_embeddings", int, hf.get("max_position_embeddings")
    )
    if kind == "linear":
        return dataclasses.replace(rope, kind="linear", factor=get(scaling, "factor", float))
    if kind == "yarn":
        factor = get(scaling, "factor", float)
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim) if mscale and all_dim else yarn_scale(factor)
        return dataclasses.replace(
            rope,
            kind="yarn",
            factor=factor,
            original_positions=original,
            beta_fast=float(scaling.get("beta_fast") or 32.0),
            beta_slow=float(scaling.get("beta_slow") or 1.0),
            truncate=get(scaling, "truncate", bool, True),
            scale=get(scaling, "attention_factor", float, scale),
        )
    if kind == "longrope":
        factors = {}
        for side in ("short", "long"):
            factors[side] = tuple(float(f) for f in get(scaling, f"{side}_factor", list))
            if len(factors[side]) != head_dim // 2:
                raise SpecmdError(
                    f"config.json: rope {side}_factor has {len(factors[side])} entries, expected {head_dim // 2}"
                )
        return dataclasses.replace(
            rope,
            kind="longrope",
            original_positions=original,
            short_factors=factors["short"],
            long_factors=factors["long"],
            short_scale=get(scaling, "short_mscale", float),
            long_scale=get(scaling, "long_mscale", float),
        )
    raise unknown("rope type", kind, ("default", "linear", "yarn", "longrope"))


def windows_by_type(hf: Json, window: int, default: list[str]) -> tuple[int, ...]:
    types = get(hf, "layer_types", list, default)
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise SpecmdError(f"config.json: layer_types[{layer}] is {kind!r}, expected full_ or sliding_attention")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
