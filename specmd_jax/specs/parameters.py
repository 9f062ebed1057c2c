"""How many parameters a model has, counted from its ``config.json`` and what its family adds that the file leaves out.

D model width, E routed experts of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from specmd_jax.specs.attention import KeyValues

Json = Mapping[str, Any]


class Form(NamedTuple):
    """What the layers of a family have besides plain matrices; ``attention_bias`` of a config adds both biases."""

    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "full", "head"] = "none"  # over all heads at once, or each of them
    norm_vectors: int = 1  # 2: a layer norm's weight and bias
    sinks: bool = False  # one per head
    router_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False


FORMS: dict[str, Form] = {
    "olmoe": Form(qk_norm="full"),
    "mixtral": Form(),
    "qwen2_moe": Form(qkv_bias=True, shared_gate=True),
    "qwen3_moe": Form(qk_norm="head"),
    "phimoe": Form(norm_vectors=2),
    "gpt_oss": Form(qkv_bias=True, out_bias=True, sinks=True, router_bias=True, expert_bias=True),
    "deepseek_v2": Form(),
    "deepseek_v3": Form(router_bias=True),
}
"""By ``model_type``."""


class Counts(NamedTuple):
    """Layers and parameters of one model."""

    layers: int  # with routed experts
    experts: int  # E
    top_k: int
    d_model: int  # D
    d_ff: int  # of one expert
    expert_bias: int  # of one expert
    dense: float  # per layer with routed experts, leading dense layers shared out among them
    head: int
    embed: int
    shared: int  # of dense: the shared experts of one layer
    leading: int  # of layers * dense: all leading dense layers
    attention: tuple[KeyValues, ...]


def count(hf: Json) -> Counts:
    """Gives the parameters of the model that a ``config.json`` describes; its ``model_type`` must be in `FORMS`."""
    form, d, vocabulary = FORMS[hf["model_type"]], hf["hidden_size"], hf["vocab_size"]
    experts = next(hf[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in hf)
    d_ff = hf.get("moe_intermediate_size", hf["intermediate_size"])
    leading = hf.get("first_k_dense_replace", 0)
    layers = hf["num_hidden_layers"] - leading
    every = _attention(hf, form) + 2 * form.norm_vectors * d
    router = experts * d + form.router_bias * experts
    shared = hf.get("shared_expert_intermediate_size", 0) or hf.get("n_shared_experts", 0) * d_ff
    shared_params = _gated(d, shared) + form.shared_gate * d
    leading_params = leading * (every + _gated(d, hf["intermediate_size"])) if leading else 0
    return Counts(
        layers=layers,
        experts=experts,
        top_k=hf["num_experts_per_tok"],
        d_model=d,
        d_ff=d_ff,
        expert_bias=form.expert_bias * (2 * d_ff + d),
        dense=every + router + shared_params + leading_params / layers,
        head=vocabulary * d + hf.get("lm_head_bias", False) * vocabulary + form.norm_vectors * d,
        embed=vocabulary * d,
        shared=shared_params,
        leading=leading_params,
        attention=_key_values(hf),
    )


def _key_values(hf: Json) -> tuple[KeyValues, ...]:
    """Gives what each kind of layer keeps of a token, and what a query does with it."""
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    if "kv_lora_rank" in hf:
        rank, rope = hf["kv_lora_rank"], hf["qk_rope_head_dim"]
        return (KeyValues(layers, rank + rope, 2 * heads * (2 * rank + rope)),)
    head_dim = hf.get("head_dim", hf["hidden_size"] // heads)
    values, flops = 2 * hf["num_key_value_heads"] * head_dim, 4 * heads * head_dim
    window = hf.get("sliding_window") or 0
    sliding = layers // 2 if window else 0  # every second layer, the first one first
    kinds = KeyValues(layers - sliding, values, flops), KeyValues(sliding, values, flops, window)
    return tuple(kind for kind in kinds if kind.layers)


def _attention(hf: Json, form: Form) -> int:
    """Gives the parameters of attention: latent (DeepSeek) where the config has a rank for it, else grouped-query."""
    d, heads, kv_heads = hf["hidden_size"], hf["num_attention_heads"], hf["num_key_value_heads"]
    if "kv_lora_rank" in hf:
        return _latent_attention(hf)
    head_dim, bias = hf.get("head_dim", d // heads), hf.get("attention_bias", False)
    qkv_bias, out_bias = form.qkv_bias or bias, form.out_bias or bias
    total = 2 * d * (heads + kv_heads) * head_dim + qkv_bias * (heads + 2 * kv_heads) * head_dim + out_bias * d
    norms = {"none": 0, "full": (heads + kv_heads) * head_dim, "head": 2 * head_dim}[form.qk_norm]
    return total + norms + form.sinks * heads


def _latent_attention(hf: Json) -> int:
    """With its inner norms."""
    d, heads, q_rank, kv_rank = hf["hidden_size"], hf["num_attention_heads"], hf.get("q_lora_rank"), hf["kv_lora_rank"]
    plain, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    q_width = heads * (plain + rope)
    q = d * q_width if q_rank is None else (d + 1 + q_width) * q_rank
    kv = d * (kv_rank + rope) + kv_rank + kv_rank * heads * (plain + value)
    return q + kv + heads * value * d


def _gated(d: int, width: int) -> int:
    """Gives the parameters of a gated feed-forward block."""
    return 3 * d * width
