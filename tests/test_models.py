"""The model presets: sizes against published ones, derived numbers, look-up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.specs.models import MODELS, ModelSpec, model
from specmd_jax.specs.parameters import FORMS
from specmd_jax.specs.published import PUBLISHED
from specmd_jax.units import GIB, MIB

# Parameters in the published safetensors files (DeepSeek-V3: without its multi-token-prediction module).
PUBLISHED_PARAMS = {
    "OLMoE-1B-7B": 6_919_161_856,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Phi-3.5-MoE": 41_873_153_344,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,
}
# In billions, as their owners or others publish them; text alone, without modules that predict several tokens.
PUBLISHED_BILLIONS = {
    "Kimi-K2": 1026.4,
    "DeepSeek-V4-Flash": 284,
    "Qwen3-235B-A22B": 235.09,
    "Qwen3-Next-80B-A3B": 80,
    "Qwen3.5-35B-A3B": 34.66,
    "Qwen3.6-35B-A3B": 34.66,
    "Qwen3.8-Flash-Next": 125,
    "GLM-4.5-Air": 106.85,
    "GLM-4.6": 353,
    "GLM-4.7": 353,
    "GLM-5": 744,
    "MiniMax-M2": 228.7,
    "gemma-4-26B-A4B": 25.2,
    "Llama-4-Scout": 107.77,
}

# Table 3 of SpecMD (arXiv:2602.03921), fp16: layers, experts, top-k, MiB of an expert, GiB of all experts, of the rest,
# of what one token uses.
SPECMD_TABLE = {
    "OLMoE-1B-7B": (16, 64, 8, 12.0, 12.0, 0.89, 2.39),
    "Mixtral-8x7B": (32, 8, 2, 336.0, 84.0, 2.99, 23.99),
    "Qwen1.5-MoE-A2.7B": (24, 60, 4, 16.5, 23.2, 3.46, 5.01),
    "Phi-3.5-MoE": (32, 16, 2, 150.0, 75.0, 2.99, 12.37),
}


def test_every_published_shape_is_a_model_and_every_form_is_used() -> None:
    assert set(MODELS) - set(PUBLISHED) == {"Qwen3.8-Flash-Next"} and not set(PUBLISHED) - set(MODELS)
    assert {hf["model_type"].removesuffix("_text") for hf in PUBLISHED.values()} == set(FORMS)


def test_every_model_adds_up_to_its_published_parameters() -> None:
    assert {name: MODELS[name].total_params for name in PUBLISHED_PARAMS} == PUBLISHED_PARAMS
    found = {name: MODELS[name].total_params / 1e9 for name in MODELS.keys() - PUBLISHED_PARAMS.keys()}
    assert found == pytest.approx(PUBLISHED_BILLIONS, rel=0.005)


@pytest.mark.parametrize("name", SPECMD_TABLE)
def test_sizes_equal_those_of_the_paper(name: str) -> None:
    layers, experts, top_k, expert_mib, all_gib, rest_gib, active_gib = SPECMD_TABLE[name]
    spec = model(name)
    assert (spec.layers, spec.experts, spec.top_k) == (layers, experts, top_k)
    assert spec.expert_bytes / MIB == expert_mib
    assert spec.all_expert_bytes / GIB == pytest.approx(all_gib, abs=0.05)
    rest = spec.layers * spec.dense_bytes + spec.head_bytes + 2 * spec.embed_params
    assert rest / GIB == pytest.approx(rest_gib, abs=0.01)
    assert (rest + spec.token_cycle_bytes) / GIB == pytest.approx(active_gib, abs=0.02)


def test_quantised_experts_count_their_scales_and_biases() -> None:
    oss = model("gpt-oss-20b")
    blocks = oss.expert_weights // 32
    assert oss.expert_bytes == blocks * (16 + 1) + 2 * (2 * 2880 + 2880)
    v3 = model("DeepSeek-V3")
    assert v3.expert_bytes == v3.expert_weights + 4 * 3 * (7168 // 128) * (2048 // 128)


def test_derived_numbers_follow_their_fields() -> None:
    spec = model("OLMoE-1B-7B")
    assert spec.expert_flops_per_token == 2 * 3 * 2048 * 1024
    assert spec.token_cycle_bytes == 16 * 8 * 12 * MIB
    assert spec.expert_bytes_at(4) == 3 * MIB
    assert replace(spec, weights_bits=8.0).token_cycle_bytes == spec.token_cycle_bytes // 2
    assert replace(spec, d_ff=2048).expert_bytes == 2 * spec.expert_bytes
    assert spec.dense_flops_per_token == 2 * spec.dense_params
    assert spec.head_flops_per_token == 2 * spec.head_params


def test_bytes_round_up() -> None:
    odd = replace(model("OLMoE-1B-7B"), d_model=1, d_ff=1)  # 3 weights
    assert odd.expert_bytes_at(4) == math.ceil(3 * 4 / 8) == 2


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_every_model_is_hashable_sourced_and_sane(spec: ModelSpec) -> None:
    assert MODELS[spec.name] is spec
    assert hash(spec) == hash(replace(spec))
    assert spec.source.startswith("https://")
    assert 0 < spec.top_k <= spec.experts
    assert 0 < spec.dense_params < spec.experts * spec.expert_params
    assert spec.layers * spec.shared_params + spec.leading_params < spec.layers * spec.dense_params
    assert not spec.attention or sum(kind.layers for kind in spec.attention if not kind.read) >= spec.layers


def test_names_match_in_any_case() -> None:
    assert model(" olmoe-1b-7B ") is MODELS["OLMoE-1B-7B"]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SpecmdError, match=r"unknown model 'gpt-oss-20'; did you mean 'gpt-oss-20b'\?.*Mixtral-8x7B"):
        model("gpt-oss-20")
