"""The attention of a model's layers, from its ``config.json``: parameters, and what it keeps of a context."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from specmd_jax.errors import SpecmdError, shown
from specmd_jax.specs.attention import KeyValues
from specmd_jax.specs.reading import Json, first_of, get, layer_count, listed, whole


class Form(NamedTuple):
    """What the layers of a family have besides plain matrices; ``attention_bias`` of a config adds its biases."""

    qkv_bias: bool = False
    out_bias: bool = False
    out_biased: bool = True  # whether ``attention_bias`` is of the output, too
    qk_norm: Literal["none", "full", "head"] = "none"  # over all heads at once, or each; ``use_qk_norm``: each
    norms: int = 2  # of a layer
    norm_vectors: int = 1  # 2: a layer norm's weight and bias
    sinks: bool = False  # one per head
    router_bias: bool = False
    router_scales: bool = False  # one per input and one per expert
    expert_bias: bool = False
    shared_gate: bool = False
    gated: bool = False  # queries bring a gate for the output
    beside: bool = False  # a feed-forward block of ``intermediate_size`` beside the routed experts of every layer
    full_every: int = 1  # every so many layers see the whole context where the config does not list them


class Attention(NamedTuple):
    """Attention of one layer."""

    params: int
    keeps: tuple[KeyValues, ...]  # of one layer


def attention(hf: Json, form: Form) -> list[Attention]:
    """Gives the attention of each layer, with its inner norms."""
    by_kind: dict[str | int, Attention] = {}
    kinds = _kinds(hf, form)
    for kind in kinds:
        if isinstance(kind, bool) or not isinstance(kind, str | int):
            raise SpecmdError(f"config.json: a layer's attention is {shown(kind)}, expected the name of a kind")
    for kind in kinds:
        if kind not in by_kind:
            by_kind[kind] = _of_kind(hf, form, kind)
    return [by_kind[kind] for kind in kinds]


def _kinds(hf: Json, form: Form) -> list[Any]:
    """Gives the kind of each layer: a name of ``layer_types``, or a ratio of compression."""
    layers = layer_count(hf)
    if hf.get("compress_ratios") is not None:
        ratios = get(hf, "compress_ratios", list)[:layers]  # modules that predict several tokens come behind
        return listed({"compress_ratios": ratios}, "compress_ratios", layers)
    if hf.get("layer_types") is not None:
        return listed(hf, "layer_types", layers)
    every = first_of(hf, ("full_attention_interval", "sliding_window_pattern", "no_rope_layer_interval"))
    interval = whole(hf, every, form.full_every)
    if hf.get("linear_num_value_heads") is not None:
        partial = "linear_attention"
    elif hf.get("attention_chunk_size") is not None:
        partial = "chunked_attention"
    elif hf.get("sliding_window") is not None and get(hf, "use_sliding_window", bool, True):
        partial = "sliding_attention"
        if interval == 1:
            return [partial] * layers
    else:
        return ["full_attention"] * layers
    return ["full_attention" if (layer + 1) % interval == 0 else partial for layer in range(layers)]


def _of_kind(hf: Json, form: Form, kind: Any) -> Attention:
    if isinstance(kind, int):
        return _compressed(hf, kind)
    if kind == "linear_attention":
        return _linear(hf)
    if hf.get("kv_lora_rank") is not None:
        return _latent(hf)
    return _grouped(hf, form, kind)


def _grouped(hf: Json, form: Form, kind: str) -> Attention:
    """Grouped-query attention; layers of some families that see the whole context have heads of their own."""
    d, heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
    kv_heads = whole(hf, "num_key_value_heads", heads)
    head_dim = whole(hf, "head_dim", max(1, d // heads))
    full, shares = kind == "full_attention", False
    if full:
        head_dim = whole(hf, "global_head_dim", head_dim)
        shares = get(hf, "attention_k_eq_v", bool, False)
        kv_heads = whole(hf, "num_global_key_value_heads", kv_heads) if shares else kv_heads
    bias = get(hf, "attention_bias", bool, False)
    qkv_bias, out_bias = form.qkv_bias or bias, form.out_bias or (bias and form.out_biased)
    wide, narrow = heads * head_dim, kv_heads * head_dim
    total = d * (wide * (2 + form.gated) + narrow * (1 if shares else 2))
    total += qkv_bias * (wide + 2 * narrow) + out_bias * d + form.sinks * heads
    qk_norm = "head" if form.qk_norm == "none" and get(hf, "use_qk_norm", bool, False) else form.qk_norm
    total += {"none": 0, "full": wide + narrow, "head": 2 * head_dim}[qk_norm]
    window = 0
    if kind in ("sliding_attention", "chunked_attention"):
        window = whole(hf, "sliding_window" if kind == "sliding_attention" else "attention_chunk_size")
    return Attention(total, (KeyValues(1, 2 * narrow, 4 * wide, window),))


def _latent(hf: Json) -> Attention:
    """Latent attention (DeepSeek-V2), and with an indexer the sparse kind (DeepSeek-V3.2, GLM-5)."""
    d, heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
    q_rank, kv_rank = whole(hf, "q_lora_rank", 0, least=0), whole(hf, "kv_lora_rank")
    plain, rope, value = (whole(hf, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_width = heads * (plain + rope)
    q = (d + 1 + q_width) * q_rank if q_rank else d * q_width
    kv = d * (kv_rank + rope) + kv_rank + kv_rank * heads * (plain + value)
    total = q + kv + heads * value * d
    keeps = KeyValues(1, kv_rank + rope, 2 * heads * (2 * kv_rank + rope), read=whole(hf, "index_topk", 0))
    if not keeps.read:
        return Attention(total, (keeps,))
    index_heads, index_dim = whole(hf, "index_n_heads"), whole(hf, "index_head_dim")
    total += q_rank * index_heads * index_dim + d * index_dim + 2 * index_dim + d * index_heads
    return Attention(total, (keeps, KeyValues(1, index_dim, 2 * index_heads * index_dim)))


def _linear(hf: Json) -> Attention:
    """A gated delta net (Qwen3-Next): a float32 state per value head, and the last inputs of a convolution."""
    d = whole(hf, "hidden_size")
    key_heads, value_heads = whole(hf, "linear_num_key_heads"), whole(hf, "linear_num_value_heads")
    key_dim, value_dim = whole(hf, "linear_key_head_dim"), whole(hf, "linear_value_head_dim")
    keys, values, kernel = key_heads * key_dim, value_heads * value_dim, whole(hf, "linear_conv_kernel_dim", 4)
    convolved = 2 * keys + values
    total = d * (convolved + values + 2 * value_heads) + convolved * kernel + 2 * value_heads + value_dim + values * d
    state = value_heads * key_dim * value_dim
    # the inputs of the convolution are 16-bit numbers: two of them count as one of the state
    kept = KeyValues(1, 0, 0, state=state + convolved * kernel // 2, state_flops=7 * state)
    return Attention(total, (kept,))


def _compressed(hf: Json, ratio: int) -> Attention:
    """DeepSeek-V4: shared keys and values in a window; beyond it one entry for every `ratio` tokens (0: nothing).

    A ratio of 4 (any below the window) overlaps and has an indexer that chooses ``index_topk`` entries. Two hyper
    connections of `hc_mult` streams belong to the layer.
    """
    d, heads, dim = whole(hf, "hidden_size"), whole(hf, "num_attention_heads"), whole(hf, "head_dim")
    q_rank, groups, out_rank = whole(hf, "q_lora_rank"), whole(hf, "o_groups"), whole(hf, "o_lora_rank")
    window, streams = whole(hf, "sliding_window"), whole(hf, "hc_mult", 1)
    total = d * q_rank + q_rank + q_rank * heads * dim + d * dim + dim + heads
    total += out_rank * heads * dim + groups * out_rank * d
    mixing = (2 + streams) * streams
    total += 2 * (mixing * streams * d + mixing + 3)
    keeps = [KeyValues(1, dim, 4 * heads * dim, window)]
    if ratio >= window:
        total += 2 * d * dim + ratio * dim + dim
        keeps.append(KeyValues(1, dim, 4 * heads * dim, every=ratio))
    elif ratio > 0:
        index_heads, index_dim, chosen = (whole(hf, f"index_{part}") for part in ("n_heads", "head_dim", "topk"))
        total += 4 * d * dim + 2 * ratio * dim + dim
        total += 4 * d * index_dim + 2 * ratio * index_dim + index_dim + q_rank * index_heads * index_dim
        total += d * index_heads
        keeps.append(KeyValues(1, dim, 4 * heads * dim, read=chosen, every=ratio))
        keeps.append(KeyValues(1, index_dim, 2 * index_heads * index_dim, every=ratio))
    elif ratio:
        raise SpecmdError(f"config.json: 'compress_ratios' has {ratio}, expected at least 0")
    return Attention(total, tuple(keeps))
