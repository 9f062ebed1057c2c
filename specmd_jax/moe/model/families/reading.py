"""Reading the keys of a ``config.json`` that several families have, each checked."""

from __future__ import annotations

import dataclasses

from specmd_jax.errors import SpecmdError, shown, unknown
from specmd_jax.moe.model.config import Rope, float_dtype
from specmd_jax.moe.model.families.family import Json
from specmd_jax.moe.model.rope import yarn_scale
from specmd_jax.specs.reading import get, number, table, whole


def own_dtype(hf: Json) -> str:
    name = get(hf, "dtype", str, "") or get(hf, "torch_dtype", str, "") or "float32"
    float_dtype(name)
    return name


def scaling_of(hf: Json) -> Json:
    """Gives what the config says of its rotary embedding, under either name."""
    return table(hf, "rope_scaling") | table(hf, "rope_parameters")


def read_rope(hf: Json, head_dim: int, default_theta: float, interleaved: bool = False) -> Rope:
    """Reads both spellings: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters`` with both inside."""
    scaling = scaling_of(hf)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = number(scaling, "rope_theta", 0.0, above=1) or number(hf, "rope_theta", default_theta, above=1)
    partial = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise SpecmdError(f"config.json: partial_rotary_factor {shown(partial)} is not supported, expected 1")
    rope = Rope(kind="default", theta=theta, dim=head_dim, interleaved=interleaved)
    if kind == "default":
        return rope
    # a value outside the scaling takes precedence: families that have one keep the pre-training length there
    original = whole(hf, "original_max_position_embeddings", 0) or whole(
        scaling, "original_max_position_embeddings", whole(hf, "max_position_embeddings")
    )
    if kind == "linear":
        return dataclasses.replace(rope, kind="linear", factor=number(scaling, "factor", above=0))
    if kind == "yarn":
        factor = number(scaling, "factor", above=0)
        mscale, all_dim = number(scaling, "mscale", 0.0), number(scaling, "mscale_all_dim", 0.0)
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim) if mscale and all_dim else yarn_scale(factor)
        return dataclasses.replace(
            rope,
            kind="yarn",
            factor=factor,
            original_positions=original,
            beta_fast=number(scaling, "beta_fast", 32.0, above=0),
            beta_slow=number(scaling, "beta_slow", 1.0, above=0),
            truncate=get(scaling, "truncate", bool, True),
            scale=number(scaling, "attention_factor", scale),
        )
    if kind == "longrope":
        factors = {}
        for side in ("short", "long"):
            given = get(scaling, f"{side}_factor", list)
            factors[side] = tuple(number({"factor": one}, "factor", above=0) for one in given)
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
            short_scale=number(scaling, "short_mscale", above=0),
            long_scale=number(scaling, "long_mscale", above=0),
        )
    raise unknown("rope type", kind, ("default", "linear", "yarn", "longrope"))


def windows_by_type(hf: Json, window: int, default: list[str]) -> tuple[int, ...]:
    types = get(hf, "layer_types", list, default)
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise SpecmdError(
                f"config.json: layer_types[{layer}] is {shown(kind)}, expected full_ or sliding_attention"
            )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
