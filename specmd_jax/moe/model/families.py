"""The supported model families: how each one's ``config.json`` and tensor names read. One row of `FAMILIES` a family.

Left out, each with a clear error: activations other than SiLU, rotary embeddings of other kinds than those of
`config.Rope` or on a part of the head (but for latent attention), quantised checkpoints other than gpt-oss's mxfp4,
biases in dense MLPs, DeepSeek-V2 with renormalised gates. Dropout, router jitter in training and auxiliary losses do
not concern inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.moe.model.config import Latent, MoEConfig, Rope, float_dtype
from specmd_jax.moe.model.rope import yarn_scale

Json = Mapping[str, Any]


class Family(NamedTuple):
    """One row of the table.

    extra: what the family adds to the common reading of its config.
    theta: default base of the rotary embedding.
    block: where a layer keeps its experts, ``router`` its router, ``experts`` names of (gate, up, down) with ``{e}``,
        or of the stacked (gate_up, down) when ``fused``; ``shared`` its shared expert.
    tiny: a small config.json for tests.
    """

    extra: Callable[[Json], dict[str, Any]]
    theta: float
    router: str
    experts: tuple[str, ...]
    shared: str
    fused: bool
    tiny: dict[str, Any]


def from_hf(hf: Json, dtype: str | None = None) -> MoEConfig:
    """A configuration from the dictionary of a Hugging Face ``config.json``.

    Args:
        dtype: type of dense weights and activations; None: the checkpoint's own.
    Raises:
        SpecmdError: unknown ``model_type``, a key that is missing or of the wrong type, an option that is left out.
    """
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise unknown("model_type", name, FAMILIES)
    family = FAMILIES[name]
    if _get(hf, "hidden_act", str, "silu") != "silu":
        raise SpecmdError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported, expected 'silu'")
    method = (hf.get("quantization_config") or {}).get("quant_method", "mxfp4" if name == "gpt_oss" else None)
    if hf.get("quantization_config") and (name, method) != ("gpt_oss", "mxfp4"):
        raise SpecmdError(f"config.json: checkpoints quantised by {method!r} are not supported for {name}")
    layers, heads = _get(hf, "num_hidden_layers", int), _get(hf, "num_attention_heads", int)
    width = _get(hf, "hidden_size", int)
    head_dim = _get(hf, "head_dim", int, 0) or width // heads
    common: dict[str, Any] = {
        "family": name,
        "dtype": dtype or _own_dtype(hf),
        "vocabulary": _get(hf, "vocab_size", int),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": _get(hf, "num_key_value_heads", int, heads),
        "head_dim": head_dim,
        "max_positions": _get(hf, "max_position_embeddings", int),
        "rope": _rope(hf, head_dim, family.theta),
        "attention_scale": head_dim**-0.5,
        "windows": (_get(hf, "sliding_window", int, 0),) * layers,
        "moe_layers": tuple(range(layers)),
        "top_k": _get(hf, "num_experts_per_tok", int),
        "norm_eps": _get(hf, "rms_norm_eps", float, 1e-6),
        "tied": _get(hf, "tie_word_embeddings", bool, False),
    }
    cfg = MoEConfig(**(common | family.extra(hf)))
    _check(cfg)
    return cfg


def tiny(family: str, dtype: str = "float32", **changes: Any) -> MoEConfig:
    """A configuration of a family small enough for tests; ``changes`` replaces keys of its ``config.json``."""
    return from_hf(tiny_hf(family, **changes), dtype)


def tiny_hf(family: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` dictionary behind `tiny`."""
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    return _TINY | {"model_type": family} | FAMILIES[family].tiny | changes


def dense_names(cfg: MoEConfig, spec: Mapping[str, Any]) -> dict[tuple[str | int, ...], str]:
    """Checkpoint name of every dense parameter of `model.param_spec`, by its path. A tied head has no entry."""
    names = {}
    for path in _paths(spec):
        if not (cfg.tied and path == ("head", "project", "weight")):
            names[path] = _dense_name(cfg, path)
    return names


def expert_names(cfg: MoEConfig, layer: int, expert: int) -> tuple[str, ...]:
    """Checkpoint names of one expert's (gate, up, down) matrices; gpt-oss: the layer's stacked (gate_up, down)."""
    prefix = f"model.layers.{layer}."
    return tuple(prefix + name.format(e=expert) for name in FAMILIES[cfg.family].experts)


def _dense_name(cfg: MoEConfig, path: tuple[str | int, ...]) -> str:
    top, leaf = path[0], path[-1]
    if top == "embed":
        return "model.embed_tokens.weight"
    if top == "head":
        return f"model.norm.{leaf}" if path[1] == "norm" else f"lm_head.{leaf}"
    family, parts = FAMILIES[cfg.family], [str(part) for part in path[2:]]
    head = {
        "attention_norm": "input_layernorm",
        "experts_norm": "post_attention_layernorm",
        "attention": "self_attn",
        "router": family.router,
        "shared": family.shared,
        "shared_gate": "mlp.shared_expert_gate",
        "mlp": "mlp",
    }[parts[0]]
    inner = _LATENT if cfg.latent and parts[0] == "attention" else _INNER
    return ".".join([f"model.layers.{path[1]}", head, *(inner.get(part, part) for part in parts[1:])])


_INNER = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
_LATENT = {
    "query": "q_proj",
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}


def _paths(tree: Mapping[Any, Any], prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = []
    for key, value in tree.items():
        found += _paths(value, (*prefix, key)) if isinstance(value, Mapping) else [(*prefix, key)]
    return found


_MISSING = object()


def _get(hf: Json, key: str, kind: type, default: Any = _MISSING) -> Any:
    """A value of the config, checked; a key that is absent or null takes the default."""
    value = hf.get(key)
    if value is None:
        if default is _MISSING:
            raise SpecmdError(f"config.json: {key!r} is missing ({hf.get('model_type')}), expected {kind.__name__}")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SpecmdError(f"config.json: {key!r} is {value!r}, expected {kind.__name__}")
    return value


def _experts(hf: Json) -> int:
    """The number of routed experts, under any of the names that configs use for it."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return _get(hf, next((name for name in names if hf.get(name) is not None), names[0]), int)


def _own_dtype(hf: Json) -> str:
    name = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    float_dtype(name)
    return name


def _rope(hf: Json, head_dim: int, default_theta: float, interleaved: bool = False) -> Rope:
    """Both spellings: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters`` with both inside."""
    scaling = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or _get(hf, "rope_theta", float, default_theta))
    partial = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise SpecmdError(f"config.json: partial_rotary_factor {partial} is not supported, expected 1")
    rope = Rope(kind="default", theta=theta, dim=head_dim, interleaved=interleaved)
    if kind == "default":
        return rope
    # a value outside the scaling takes precedence: families that have one keep the pre-training length there
    original = _get(hf, "original_max_position_embeddings", int, 0) or _get(
        scaling, "original_max_position_embeddings", int, hf.get("max_position_embeddings")
    )
    if kind == "linear":
        return dataclasses.replace(rope, kind="linear", factor=_get(scaling, "factor", float))
    if kind == "yarn":
        factor = _get(scaling, "factor", float)
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim) if mscale and all_dim else yarn_scale(factor)
        return dataclasses.replace(
            rope,
            kind="yarn",
            factor=factor,
            original_positions=original,
            beta_fast=float(scaling.get("beta_fast") or 32.0),
            beta_slow=float(scaling.get("beta_slow") or 1.0),
            truncate=_get(scaling, "truncate", bool, True),
            scale=_get(scaling, "attention_factor", float, scale),
        )
    if kind == "longrope":
        factors = {}
        for side in ("short", "long"):
            factors[side] = tuple(float(f) for f in _get(scaling, f"{side}_factor", list))
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
            short_scale=_get(scaling, "short_mscale", float),
            long_scale=_get(scaling, "long_mscale", float),
        )
    raise unknown("rope type", kind, ("default", "linear", "yarn", "longrope"))


def _check(cfg: MoEConfig) -> None:
    """Relations that every family must keep; the message says which does not hold."""
    rules = (
        (cfg.heads % cfg.kv_heads == 0, f"{cfg.heads} heads are not a multiple of {cfg.kv_heads} key-value heads"),
        (1 <= cfg.top_k <= cfg.experts, f"num_experts_per_tok {cfg.top_k} is not within 1..{cfg.experts} experts"),
        (cfg.rope.dim % 2 == 0, f"rotary dimension {cfg.rope.dim} is not even"),
        (bool(cfg.moe_layers), "no layer has routed experts"),
        (len(cfg.windows) == cfg.layers, f"layer_types has {len(cfg.windows)} entries, expected {cfg.layers}"),
        (cfg.router != "sparsemixer" or cfg.top_k == 2, f"the sparsemixer router chooses 2 experts, not {cfg.top_k}"),
        (
            cfg.experts % cfg.groups == 0 and cfg.groups_kept * (cfg.experts // cfg.groups) >= cfg.top_k,
            f"{cfg.groups_kept} of {cfg.groups} groups of {cfg.experts} experts cannot give {cfg.top_k}",
        ),
    )
    for holds, complaint in rules:
        if not holds:
            raise SpecmdError(f"config.json ({cfg.family}): {complaint}")


def _sparse_layers(hf: Json) -> tuple[int, ...]:
    """Qwen: every ``decoder_sparse_step``-th layer, without those listed as dense."""
    step, dense = _get(hf, "decoder_sparse_step", int, 1), _get(hf, "mlp_only_layers", list, [])
    return tuple(i for i in range(hf["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def _windows_by_type(hf: Json, window: int, default: list[str]) -> tuple[int, ...]:
    types = _get(hf, "layer_types", list, default)
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise SpecmdError(f"config.json: layer_types[{layer}] is {kind!r}, expected full_ or sliding_attention")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _olmoe(hf: Json) -> dict[str, Any]:
    bias = _get(hf, "attention_bias", bool, False)
    return {
        "norm_eps": _get(hf, "rms_norm_eps", float, 1e-5),
        "experts": _experts(hf),
        "expert_width": _get(hf, "intermediate_size", int),
        "router": "softmax_topk",
        "renormalize": _get(hf, "norm_topk_prob", bool, False),
        "qk_norm": "full",
        "qkv_clip": _get(hf, "clip_qkv", float, 0.0),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _mixtral(hf: Json) -> dict[str, Any]:
    return {
        "norm_eps": _get(hf, "rms_norm_eps", float, 1e-5),
        "experts": _experts(hf),
        "expert_width": _get(hf, "intermediate_size", int),
        "router": "softmax_topk",
        "renormalize": True,
    }


def _qwen(hf: Json) -> dict[str, Any]:
    return {
        "moe_layers": _sparse_layers(hf),
        "experts": _experts(hf),
        "expert_width": _get(hf, "moe_intermediate_size", int),
        "dense_width": _get(hf, "intermediate_size", int, 0),
        "router": "softmax_topk",
        "renormalize": _get(hf, "norm_topk_prob", bool, False),
    }


def _qwen2_moe(hf: Json) -> dict[str, Any]:
    layers, used = hf["num_hidden_layers"], _get(hf, "use_sliding_window", bool, False)
    below = _get(hf, "max_window_layers", int, 28)
    # the family's own rule: of the layers below the border, every second one starting with the first
    default = ["sliding_attention" if used and i < below and i % 2 == 0 else "full_attention" for i in range(layers)]
    return _qwen(hf) | {
        "windows": _windows_by_type(hf, _get(hf, "sliding_window", int, 4096) if used else 0, default),
        "qkv_bias": _get(hf, "qkv_bias", bool, True),
        "shared_width": _get(hf, "shared_expert_intermediate_size", int),
        "shared_gate": True,
    }


def _qwen3_moe(hf: Json) -> dict[str, Any]:
    bias, used = _get(hf, "attention_bias", bool, False), _get(hf, "use_sliding_window", bool, False)
    return _qwen(hf) | {
        "windows": (_get(hf, "sliding_window", int, 4096) if used else 0,) * hf["num_hidden_layers"],
        "qk_norm": "head",
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _phimoe(hf: Json) -> dict[str, Any]:
    bias = _get(hf, "attention_bias", bool, False)
    return {
        "norm": "layer",
        "norm_eps": _get(hf, "rms_norm_eps", float, 1e-5),
        "experts": _experts(hf),
        "expert_width": _get(hf, "intermediate_size", int),
        "router": "sparsemixer",
        "router_jitter": _get(hf, "router_jitter_noise", float, 0.01),
        "qkv_bias": bias,
        "out_bias": bias,
        "head_bias": _get(hf, "lm_head_bias", bool, False),
    }


def _gpt_oss(hf: Json) -> dict[str, Any]:
    layers, bias = hf["num_hidden_layers"], _get(hf, "attention_bias", bool, True)
    alternate = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return {
        "windows": _windows_by_type(hf, _get(hf, "sliding_window", int, 128), alternate),
        "norm_eps": _get(hf, "rms_norm_eps", float, 1e-5),
        "experts": _experts(hf),
        "expert_width": _get(hf, "intermediate_size", int),
        "router": "topk_softmax",
        "router_bias": True,
        "expert_bias": True,
        "activation": "clamped_swiglu",
        "swiglu_alpha": _get(hf, "swiglu_alpha", float, 1.702),
        "swiglu_limit": _get(hf, "swiglu_limit", float, 7.0),
        "qkv_bias": bias,
        "out_bias": bias,
        "sinks": True,
    }


def _deepseek_v2(hf: Json) -> dict[str, Any]:
    if _get(hf, "norm_topk_prob", bool, False):
        raise SpecmdError("config.json: deepseek_v2 with norm_topk_prob true is not supported, expected false")
    if _get(hf, "mlp_bias", bool, False):
        raise SpecmdError("config.json: deepseek_v2 with mlp_bias true is not supported, expected false")
    if _get(hf, "moe_layer_freq", int, 1) != 1:
        raise SpecmdError(f"config.json: moe_layer_freq {hf['moe_layer_freq']} is not supported, expected 1")
    routers: dict[str, Literal["softmax_topk", "grouped"]] = {
        "greedy": "softmax_topk",
        "group_limited_greedy": "grouped",
    }
    method = _get(hf, "topk_method", str, "greedy")
    if method not in routers:
        raise unknown("topk_method", method, routers)
    latent = Latent(
        query_rank=_get(hf, "q_lora_rank", int, 0),
        kv_rank=_get(hf, "kv_lora_rank", int),
        plain_dim=_get(hf, "qk_nope_head_dim", int),
        rope_dim=_get(hf, "qk_rope_head_dim", int),
        value_dim=_get(hf, "v_head_dim", int),
    )
    rope = _rope(hf, latent.rope_dim, 10000.0, interleaved=True)
    scaling = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    all_dim = float(scaling.get("mscale_all_dim") or 0.0)
    temperature = yarn_scale(rope.factor, all_dim) ** 2 if rope.kind != "default" and all_dim else 1.0
    bias = _get(hf, "attention_bias", bool, False)
    first = _get(hf, "first_k_dense_replace", int, 0)
    return {
        "head_dim": latent.plain_dim + latent.rope_dim,
        "rope": rope,
        "attention_scale": (latent.plain_dim + latent.rope_dim) ** -0.5 * temperature,
        "latent": latent,
        "windows": (0,) * hf["num_hidden_layers"],
        "moe_layers": tuple(range(first, hf["num_hidden_layers"])),
        "experts": _experts(hf),
        "expert_width": _get(hf, "moe_intermediate_size", int),
        "dense_width": _get(hf, "intermediate_size", int, 0),
        "shared_width": _get(hf, "moe_intermediate_size", int) * _get(hf, "n_shared_experts", int, 0),
        "router": routers[method],
        "gate_scale": _get(hf, "routed_scaling_factor", float, 1.0),
        "groups": _get(hf, "n_group", int, 1) if method != "greedy" else 1,
        "groups_kept": _get(hf, "topk_group", int, 1) if method != "greedy" else 1,
        "qkv_bias": bias,
        "out_bias": bias,
    }


_TINY: dict[str, Any] = {
    "dtype": "float32",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SPLIT = ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight")
_NUMBERED = tuple(f"block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3", "w2"))
_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

FAMILIES: dict[str, Family] = {
    "olmoe": Family(
        _olmoe, 1e4, "mlp.gate", _SPLIT, "", False, {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5}
    ),
    "mixtral": Family(
        _mixtral, 1e6, "block_sparse_moe.gate", _NUMBERED, "", False, {"num_local_experts": 8, "sliding_window": 12}
    ),
    "qwen2_moe": Family(
        _qwen2_moe,
        1e4,
        "mlp.gate",
        _SPLIT,
        "mlp.shared_expert",
        False,
        {
            "num_experts": 8,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
            "mlp_only_layers": [1],
            "num_experts_per_tok": 4,
        },
    ),
    "qwen3_moe": Family(
        _qwen3_moe,
        1e4,
        "mlp.gate",
        _SPLIT,
        "",
        False,
        {"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 24, "norm_topk_prob": True},
    ),
    "phimoe": Family(
        _phimoe,
        1e6,
        "block_sparse_moe.gate",
        _NUMBERED,
        "",
        False,
        {
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
    ),
    "gpt_oss": Family(
        _gpt_oss,
        150000.0,
        "mlp.router",
        _FUSED,
        "",
        True,
        {
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
    ),
    "deepseek_v2": Family(
        _deepseek_v2,
        1e4,
        "mlp.gate",
        _SPLIT,
        "mlp.shared_experts",
        False,
        {
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
    ),
}
"""Supported families by the ``model_type`` of their config."""
