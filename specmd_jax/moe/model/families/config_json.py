"""From the dictionary of a ``config.json`` to a configuration."""

from __future__ import annotations

from typing import Any

from specmd_jax.errors import SpecmdError, shown, unknown
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.families.family import Json
from specmd_jax.moe.model.families.reading import own_dtype, read_rope
from specmd_jax.moe.model.families.table import FAMILIES
from specmd_jax.specs.reading import get, layer_count, number, table, whole

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


def from_hf(hf: Json, dtype: str | None = None) -> MoEConfig:
    """Gives a configuration from the dictionary of a Hugging Face ``config.json``.

    Args:
        dtype: type of dense weights and activations; None: the checkpoint's own.
    Raises:
        SpecmdError: unknown ``model_type``, a key that is missing or of the wrong type, an option that is left out.
    """
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise unknown("model_type", name, FAMILIES)
    family = FAMILIES[name]
    if get(hf, "hidden_act", str, "silu") != "silu":
        raise SpecmdError(f"config.json: hidden_act {shown(hf['hidden_act'])} is not supported, expected 'silu'")
    quantised = table(hf, "quantization_config")
    method = quantised.get("quant_method", family.quantised)
    if quantised and (family.quantised is None or method != family.quantised):
        raise SpecmdError(f"config.json: checkpoints quantised by {shown(method)} are not supported for {name}")
    layers, heads, width = layer_count(hf), whole(hf, "num_attention_heads"), whole(hf, "hidden_size")
    head_dim = whole(hf, "head_dim", 0, least=0) or width // heads
    if not head_dim:
        raise SpecmdError(f"config.json: 'hidden_size' is {width}, expected at least its {heads} heads")
    common: dict[str, Any] = {
        "family": name,
        "dtype": dtype or own_dtype(hf),
        "vocabulary": whole(hf, "vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": whole(hf, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_positions": whole(hf, "max_position_embeddings"),
        "rope": read_rope(hf, head_dim, family.theta),
        "attention_scale": head_dim**-0.5,
        "windows": (whole(hf, "sliding_window", 0, least=0),) * layers,
        "moe_layers": tuple(range(layers)),
        "top_k": whole(hf, "num_experts_per_tok"),
        "norm_eps": number(hf, "rms_norm_eps", 1e-6),
        "tied": get(hf, "tie_word_embeddings", bool, False),
    }
    cfg = MoEConfig(**(common | family.extra(hf)))
    _check(cfg)
    return cfg


def tiny(family: str, dtype: str = "float32", **changes: Any) -> MoEConfig:
    """Gives a configuration of a family small enough for tests; ``changes`` replaces keys of its ``config.json``."""
    return from_hf(tiny_hf(family, **changes), dtype)


def tiny_hf(family: str, **changes: Any) -> dict[str, Any]:
    """Gives the ``config.json`` dictionary behind `tiny`."""
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    return _TINY | {"model_type": family} | FAMILIES[family].tiny | changes


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
