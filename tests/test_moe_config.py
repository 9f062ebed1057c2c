"""Configurations: published shapes read right, and what is not supported says so."""

import dataclasses

import jax
import numpy as np
import pytest

from specmd_jax import moe
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.model import families, rope
from specmd_jax.moe.model.forward import param_spec
from specmd_jax.specs.models import MODELS
from specmd_jax.specs.published import PUBLISHED


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_tiny_configurations_are_hashable_values(family):
    cfg = moe.tiny(family)
    assert cfg == moe.tiny(family) and hash(cfg) == hash(moe.tiny(family))
    assert cfg.family == family and cfg.top_k <= cfg.experts and len(cfg.windows) == cfg.layers
    assert moe.tiny(family, "bfloat16") == dataclasses.replace(cfg, dtype="bfloat16")


def test_both_spellings_of_rope_read_the_same():
    old = families.tiny_hf("gpt_oss")
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert moe.from_hf(old) == moe.from_hf(new)


def test_layers_without_routed_experts():
    assert moe.tiny("deepseek_v2", first_k_dense_replace=2).moe_layers == (2,)
    sparse = moe.tiny("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=6, mlp_only_layers=[3])
    assert sparse.moe_layers == (1, 5) and sparse.moe_index(5) == 1


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones():
    yarn = moe.tiny("gpt_oss").rope
    scaled, scale = rope.frequencies(yarn, 256)
    plain, _ = rope.frequencies(dataclasses.replace(yarn, kind="default"), 256)
    assert scale == pytest.approx(0.1 * np.log(8) + 1)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)
    assert (np.diff(plain / scaled) >= -1e-6).all() and scaled[0] > plain[0] / 2


def test_every_published_model_of_a_known_family_can_be_built():
    assert set(moe.PUBLISHED) == {name for name, hf in PUBLISHED.items() if hf["model_type"] in families.FAMILIES}
    assert set(MODELS) - set(moe.PUBLISHED) >= {"DeepSeek-V3"}
    with pytest.raises(SpecmdError, match="unknown published model 'DeepSeek-V3'"):
        moe.published("DeepSeek-V3")


@pytest.mark.parametrize("name", sorted(moe.PUBLISHED))
def test_published_shapes_add_up_to_the_published_models(name):
    cfg, spec = moe.published(name), MODELS[name]
    params = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(param_spec(cfg)))
    assert params == round(spec.dense_params * spec.layers) + spec.head_params + spec.embed_params
    assert (len(cfg.moe_layers), cfg.experts, cfg.top_k) == (spec.layers, spec.experts, spec.top_k)
    assert (cfg.width, cfg.expert_width) == (spec.d_model, spec.d_ff)
    assert moe.expert_bytes(cfg, "mxfp4" if cfg.family == "gpt_oss" else None) == spec.expert_bytes


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({}, "unknown model_type None .known: deepseek_v2, gpt_oss, mixtral, olmoe, phimoe, qwen2_moe, qwen3_moe"),
        ({"model_type": "qwen_moe"}, "unknown model_type 'qwen_moe'; did you mean 'qwen"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, expected 'silu'"),
        ({"num_experts": None}, "'num_experts' is missing .olmoe., expected int"),
        ({"num_experts": "8"}, "'num_experts' is '8', expected int"),
        ({"num_experts": True}, "'num_experts' is True, expected int"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is not within 1..8 experts"),
        ({"num_key_value_heads": 3}, "4 heads are not a multiple of 3 key-value heads"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq' are not supported for olmoe"),
        ({"dtype": "float64"}, "unknown floating-point type 'float64'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "unknown rope type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_unsupported_configurations(hf, message):
    base = families.tiny_hf("olmoe") if hf.get("model_type", "olmoe") == "olmoe" and hf else {}
    with pytest.raises(SpecmdError, match=message) as caught:
        moe.from_hf(base | hf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob true is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "unknown topk_method 'noaux_tc'"),
        ("deepseek_v2", {"n_group": 3}, "2 of 3 groups of 8 experts cannot give 3"),
        ("phimoe", {"num_experts_per_tok": 3}, "the sparsemixer router chooses 2 experts, not 3"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected 3"),
        ("gpt_oss", {"layer_types": ["chunked"] * 3}, r"layer_types\[0\] is 'chunked'"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer has routed experts"),
        ("nonesuch", {}, "unknown family 'nonesuch'"),
    ],
)
def test_unsupported_options_of_families(family, changes, message):
    with pytest.raises(SpecmdError, match=message):
        moe.tiny(family, **changes)
