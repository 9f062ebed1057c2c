"""The tensor names of a family's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.families.table import FAMILIES


def dense_names(cfg: MoEConfig, spec: Mapping[str, Any]) -> dict[tuple[str | int, ...], str]:
    """Names every dense parameter of `forward.param_spec` in a checkpoint, by its path. A tied head has no entry."""
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
