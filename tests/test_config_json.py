"""A model from its ``config.json``: equal to the listed one, other precisions and families, and hostile files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import small_trace

from configs.options import MODELS as NAMES
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.specs.models import MODELS, model
from specmd_jax.specs.published import PUBLISHED
from specmd_jax.specs.record import META_KEY, from_record, to_record
from specmd_jax.trace import load_trace, save_trace

# What the published files say besides the numbers that the product keeps.
SAID: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": {"torch_dtype": "bfloat16", "attention_bias": False, "tie_word_embeddings": False, "clip_qkv": None},
    "gpt-oss-20b": {
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "experts_per_token": 4,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    },
    "Qwen3-30B-A3B": {
        "torch_dtype": "bfloat16",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 48,
    },
    "DeepSeek-V3": {
        "torch_dtype": "bfloat16",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "Qwen3.5-35B-A3B": {
        "dtype": "bfloat16",
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
        "attn_output_gate": True,
    },
    "GLM-4.5-Air": {"torch_dtype": "bfloat16", "use_qk_norm": False, "partial_rotary_factor": 0.5},
}


def written(folder: Path, hf: Any, name: str = "config.json") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(hf if isinstance(hf, str) else json.dumps(hf), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", SAID)
def test_a_published_file_is_the_listed_model(name: str, tmp_path: Path) -> None:
    found = model(written(tmp_path / name, PUBLISHED[name] | SAID[name]))
    listed = MODELS[name]
    assert replace(found, source=listed.source, notes=listed.notes) == listed and not found.notes


def test_a_file_or_its_folder_stands_for_a_name(tmp_path: Path) -> None:
    path = written(tmp_path / "mine", PUBLISHED["OLMoE-1B-7B"])
    assert model(path) == replace(model(str(Path(path).parent)), source=path) and model(path).name == "mine"
    assert NAMES.find(path) == path and NAMES.find(str(Path(path).parent)) == str(Path(path).parent)
    other = written(tmp_path, PUBLISHED["OLMoE-1B-7B"], "own.json")
    assert model(NAMES.find(other)).name == "own"
    for name in (str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(SpecmdError):
            model(NAMES.find(name))


def test_the_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    text = {key: value for key, value in PUBLISHED["gemma-4-26B-A4B"].items() if key != "tie_word_embeddings"}
    whole = {"model_type": "gemma4", "vision_config": {"hidden_size": 1152}, "tie_word_embeddings": True}
    found = model(written(tmp_path, whole | {"text_config": text | {"num_experts_per_tok": None, "top_k_experts": 8}}))
    assert found.total_params == MODELS["gemma-4-26B-A4B"].total_params


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, (4.125, 4.125, 16)),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}},
            (4.15625, 4.15625, 16),
        ),
        ({"quantization": {"bits": 4, "group_size": 64}}, (4.5, 4.5, 4.5)),  # MLX
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, (4.5, 4.5, 16)),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": None}}},
                    "ignore": ["lm_head", "re:.*self_attn.*"],
                }
            },
            (8, 16, 16),
        ),
        ({"quantization_config": {"quant_method": "own"}}, (16, 16, 16)),
        ({"torch_dtype": "float32"}, (32, 32, 32)),
    ],
    ids=str,
)
def test_bits_of_quantised_weights(how: dict[str, Any], bits: tuple[float, ...], tmp_path: Path) -> None:
    found = model(written(tmp_path, PUBLISHED["Qwen3-30B-A3B"] | how))
    assert (found.weights_bits, found.dense_bits, found.head_bits) == bits
    assert ("not said" in found.notes) == ("own" in str(how))


def test_layers_without_experts_and_other_names(tmp_path: Path) -> None:
    hf = {
        "model_type": "hunyuan_v1_moe", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "vocab_size": 100, "num_local_experts": 8, "moe_topk": [2] * 6, "moe_intermediate_size": 32,
        "intermediate_size": 128, "num_shared_expert": [1] * 6, "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "mlp_only_layers": [3], "tie_word_embeddings": True,
    }  # fmt: skip
    found = model(written(tmp_path, hf))
    assert (found.layers, found.experts, found.top_k, found.d_ff) == (4, 8, 2, 32) and found.embed_params == 0
    attention, norms, expert = 4 * 64 * 64, 2 * 64, 3 * 64 * 32
    assert found.shared_params == expert and found.leading_params == 2 * (attention + norms + 3 * 64 * 128)
    assert found.total_params == 4 * (attention + norms + 9 * expert + 8 * 64) + found.leading_params + 101 * 64
    assert "hunyuan_v1_moe" in found.notes and found.kv_bytes(10) == 6 * 10 * 2 * 64 * 2


BASE = PUBLISHED["OLMoE-1B-7B"]


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (BASE | {"num_experts": None}, "'num_experts' is missing"),
        (BASE | {"num_experts_per_tok": None}, "'num_experts_per_tok' is missing"),
        (BASE | {"intermediate_size": None}, "'moe_intermediate_size' is missing"),
        (BASE | {"hidden_size": "2048"}, "'hidden_size' is '2048', expected int"),
        (BASE | {"num_experts": 0}, "'num_experts' is 0, expected 1 to"),
        (BASE | {"num_hidden_layers": -3}, "'num_hidden_layers' is -3"),
        (BASE | {"num_hidden_layers": 10**12}, "'num_hidden_layers' is 1000000000000, expected 1 to"),
        (BASE | {"vocab_size": 10**40}, "beyond 64 bits"),
        (BASE | {"num_experts_per_tok": 65}, "is 65, expected at most the 64 experts"),
        (BASE | {"num_experts": True}, "'num_experts' is True"),
        (BASE | {"num_attention_heads": 2.5}, "'num_attention_heads' is 2.5"),
        (BASE | {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries, expected one for each of 16"),
        (BASE | {"layer_types": [[]] * 16}, r"a layer's attention is \[\], expected"),
        (BASE | {"mlp_only_layers": [*range(16)]}, "no layer has routed experts"),
        (BASE | {"mlp_only_layers": 3}, "'mlp_only_layers' is 3, expected list"),
        (BASE | {"quantization_config": "int4"}, "'quantization_config' is 'int4', expected an object"),
        (BASE | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, "weight_block_size"),
        (BASE | {"quantization_config": {"quant_method": "gptq", "bits": 4000}}, "'bits' is 4000, expected 1 to 64"),
        (BASE | {"sliding_window": 0}, "'sliding_window' is 0"),
        ({"text_config": {"text_config": {}}}, "'hidden_size' is missing"),
        ([1, 2], "expected an object, got"),
        ("[" * 100_000, "expected (plain )?JSON"),
        ('{"a": NaN', "expected (plain )?JSON"),
        ("", "expected (plain )?JSON"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_hostile_files(hf: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, hf)
    with pytest.raises(SpecmdError, match=message) as caught:
        model(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 400


def test_a_trace_carries_a_model_that_is_not_listed(tmp_path: Path) -> None:
    spec = model(written(tmp_path, PUBLISHED["gpt-oss-20b"] | {"num_hidden_layers": 4})).stored(4, dense_bits=8)
    assert from_record(json.loads(json.dumps(to_record(spec))), "spec") == spec
    trace = replace(small_trace(3), meta={"model": spec.name, META_KEY: to_record(spec)})
    save_trace(trace, tmp_path / "t.npz")
    work = prepare(load_trace(tmp_path / "t.npz"), context=100).work
    assert np.isclose(work.dense_bytes[0], spec.dense_bytes) and work.context_bytes is not None
    assert np.isclose(work.dense_bytes[-1], spec.dense_bytes + spec.head_bytes)
    assert np.isclose(work.context_bytes[0], spec.context_bytes(100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0, expected a whole number of at least 1"),
        ({"experts": 2.5}, "experts is 2.5"),
        ({"dense_params": float("inf")}, "dense_params is inf"),
        ({"weights_bits": 0}, "weights_bits is 0"),
        ({"attention": [[1, 2]]}, r"attention has \[1, 2\], expected layers, values"),
        ({"attention": 5}, "attention is 5, expected a list"),
        ({"expert_params": 3}, "unknown field of meta"),
    ],
)
def test_records_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    record = to_record(MODELS["gpt-oss-20b"]) | changes
    with pytest.raises(SpecmdError, match=message) as caught:
        prepare(replace(small_trace(3), meta={"model": "mine", META_KEY: record}))
    assert "\n" not in str(caught.value)
