"""How many parameters a model has, counted from its ``config.json`` and what its family adds that the file leaves out.

D model width, E routed experts of a layer, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from specmd_jax.errors import SpecmdError
from specmd_jax.specs.attention import KeyValues
from specmd_jax.specs.layers import Form, attention
from specmd_jax.specs.reading import EXPERTS, TOP_K, Json, first_of, get, layer_count, sparse_layers, whole

_QWEN_NEXT = Form(qk_norm="head", shared_gate=True, gated=True, full_every=4)

FORMS: dict[str, Form] = {
    "olmoe": Form(qk_norm="full"),
    "mixtral": Form(),
    "qwen2_moe": Form(qkv_bias=True, shared_gate=True),
    "qwen3_moe": Form(qk_norm="head"),
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_moe": _QWEN_NEXT,
    "phimoe": Form(norm_vectors=2),
    "gpt_oss": Form(qkv_bias=True, out_bias=True, sinks=True, router_bias=True, expert_bias=True, full_every=2),
    "deepseek_v2": Form(),
    "deepseek_v3": Form(router_bias=True),
    "deepseek_v4": Form(router_bias=True),
    "kimi_k2": Form(router_bias=True),
    "glm4_moe": Form(router_bias=True, out_biased=False),
    "glm_moe_dsa": Form(router_bias=True),
    "minimax_m2": Form(qk_norm="full", router_bias=True),
    "gemma4": Form(qk_norm="head", norms=7, router_scales=True, beside=True, full_every=6),
    "llama4": Form(beside=True, full_every=4),
}
"""By ``model_type``, of the text part. What has no row here is counted as a plain one."""


class Counts(NamedTuple):
    """Layers and parameters of one model."""

    layers: int  # with routed experts
    experts: int  # E
    top_k: int
    d_model: int  # D
    d_ff: int  # of one expert
    expert_bias: int  # of one expert
    dense: float  # per layer with routed experts, layers without them shared out among them
    head: int
    embed: int  # 0 if the head is the embedding
    shared: int  # of dense: the shared experts of one layer
    leading: int  # of layers * dense: all layers without routed experts
    attention: tuple[KeyValues, ...]
    hashed: int  # of the layers: those that route by a hash of the token


def form_of(hf: Json) -> Form | None:
    """Gives what is known of the config's family; None for an unknown one."""
    return FORMS.get(str(hf.get("model_type")).removesuffix("_text"))


def count(hf: Json) -> Counts:
    """Gives the parameters of the model that a ``config.json`` describes.

    Raises SpecmdError naming the key where a number is missing or cannot be.
    """
    form, d, vocabulary = form_of(hf) or Form(), whole(hf, "hidden_size"), whole(hf, "vocab_size")
    experts, top_k = whole(hf, first_of(hf, EXPERTS)), whole(hf, first_of(hf, TOP_K))
    d_ff = whole(hf, first_of(hf, ("moe_intermediate_size", "intermediate_size")))
    if top_k > experts:
        raise SpecmdError(f"config.json: {first_of(hf, TOP_K)!r} is {top_k}, expected at most the {experts} experts")
    sparse = sparse_layers(hf)
    if not sparse:
        raise SpecmdError("config.json: no layer has routed experts")
    own, norms = attention(hf, form), form.norms * form.norm_vectors * d
    router = experts * d + form.router_bias * experts + form.router_scales * (d + experts)
    shared = whole(hf, "intermediate_size") if form.beside else _shared_width(hf, d_ff)
    shared_params = _gated(d, shared) + (form.shared_gate and shared > 0) * d
    leading_params = 0
    rest = set(range(layer_count(hf))) - set(sparse)
    if rest:
        width = whole(hf, first_of(hf, ("intermediate_size_mlp", "intermediate_size")))
        leading_params = sum(own[layer].params + norms + _gated(d, width) for layer in rest)
    beside = len(sparse) * (norms + router + shared_params) + sum(own[layer].params for layer in sparse)
    streams = whole(hf, "hc_mult", 0)  # the head mixes them into one
    return Counts(
        layers=len(sparse),
        experts=experts,
        top_k=top_k,
        d_model=d,
        d_ff=d_ff,
        expert_bias=form.expert_bias * (2 * d_ff + d),
        dense=(beside + leading_params) / len(sparse),
        head=vocabulary * d
        + get(hf, "lm_head_bias", bool, False) * vocabulary
        + form.norm_vectors * d
        + (streams * (streams * d + 1) + 1 if streams else 0),
        embed=0 if get(hf, "tie_word_embeddings", bool, False) else vocabulary * d,
        shared=shared_params,
        leading=leading_params,
        attention=_together([kept for one in own for kept in one.keeps]),
        hashed=_hashed(hf, len(sparse)),
    )


def _shared_width(hf: Json, d_ff: int) -> int:
    """Gives the width of what every token passes beside the routed experts of a layer."""
    if hf.get("shared_expert_intermediate_size") is not None:
        return whole(hf, "shared_expert_intermediate_size", least=0)
    names = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
    return whole(hf, first_of(hf, names), 0, least=0) * d_ff


def _hashed(hf: Json, layers: int) -> int:
    """Gives how many layers choose experts by a hash of the token."""
    if hf.get("mlp_layer_types") is not None:
        return get(hf, "mlp_layer_types", list).count("hash_moe")
    return min(whole(hf, "num_hash_layers", 0, least=0), layers)


def _together(kinds: list[KeyValues]) -> tuple[KeyValues, ...]:
    """Adds up layers of the same kind, in the order in which the kinds appear."""
    return tuple(kind._replace(layers=layers) for kind, layers in Counter(kinds).items())


def _gated(d: int, width: int) -> int:
    """Gives the parameters of a gated feed-forward block."""
    return 3 * d * width
