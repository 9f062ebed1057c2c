"""Checkpoint folders: what is written is read back, with no second copy, and every damage has its one clear line."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from moe_cases import checkpoint_tensors, dequantize, quantize_store, save, write_safetensors

from specmd_jax import moe, safetensors
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import weights
from specmd_jax.moe.checkpoint.folder import INDEX, Checkpoint, load_config
from specmd_jax.moe.model import families, quant
from specmd_jax.moe.model.forward import param_spec
from specmd_jax.moe.runtime import store

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def olmoe():
    return checkpoint_tensors("olmoe", num_hidden_layers=2)


@pytest.fixture
def folder(tmp_path, olmoe):
    save(tmp_path, "olmoe", olmoe, shards=3, num_hidden_layers=2)
    return tmp_path


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_pinned_at_several_precisions(folder):
    cfg, checkpoint = load_config(folder), Checkpoint(folder)
    pinned = store.pin_checkpoint(checkpoint, cfg, precisions=("int4", "native"))
    assert pinned.precisions == ("int4", cfg.dtype)
    for level, precision in zip(pinned.levels, ("int4", None), strict=True):
        alone = weights.read_expert(checkpoint, cfg, cfg.moe_layers[1], 5, precision)
        jax.tree.map(np.testing.assert_array_equal, level[1][5], alone)
        assert quant.tree_bytes(alone) == pinned.level_bytes[pinned.levels.index(level)]


def test_split_experts_are_stacked_with_the_gate_first(folder, olmoe):
    cfg, params, store = weights.load(folder, check_finite=True)
    assert cfg == families.tiny("olmoe", num_hidden_layers=2)
    prefix = "model.layers.1.mlp.experts.5"
    gate, up, down = (olmoe[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    np.testing.assert_array_equal(store[1].gate_up[5], np.concatenate([gate, up]))
    np.testing.assert_array_equal(store[1].down[5], down)
    assert all(isinstance(leaf, np.ndarray) and leaf.flags.c_contiguous for leaf in jax.tree.leaves(store))
    np.testing.assert_array_equal(
        params["layers"][1]["attention"]["key"]["weight"], olmoe["model.layers.1.self_attn.k_proj.weight"]
    )
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda s: s.shape, param_spec(cfg))
    assert quant.tree_bytes(store) == weights.store_bytes(cfg)


def test_fused_experts_are_turned_and_taken_apart(tmp_path):
    tensors = checkpoint_tensors("gpt_oss", num_hidden_layers=1)
    save(tmp_path, "gpt_oss", tensors, num_hidden_layers=1)
    _, _, (stack,) = weights.load(tmp_path)
    gate_up = tensors["model.layers.0.mlp.experts.gate_up_proj"][2]  # [in, out], gate and up alternate
    np.testing.assert_array_equal(stack.gate_up[2], np.concatenate([gate_up.T[0::2], gate_up.T[1::2]]))
    np.testing.assert_array_equal(stack.down[2], tensors["model.layers.0.mlp.experts.down_proj"][2].T)
    bias = tensors["model.layers.0.mlp.experts.gate_up_proj_bias"][2]
    np.testing.assert_array_equal(stack.gate_up_bias[2], np.concatenate([bias[0::2], bias[1::2]]))


def test_mxfp4_experts_are_kept_or_decoded(tmp_path):
    tensors, rng = checkpoint_tensors("gpt_oss", num_hidden_layers=1), np.random.default_rng(1)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        count, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (count, rows, columns // 32, 16), dtype=np.uint8)
        tensors[f"{name}_scales"] = rng.integers(110, 130, (count, rows, columns // 32), dtype=np.uint8)
    save(tmp_path, "gpt_oss", tensors, num_hidden_layers=1, quantization_config={"quant_method": "mxfp4"})
    cfg, _, (kept,) = weights.load(tmp_path, precision="mxfp4")
    _, _, (decoded,) = weights.load(tmp_path)
    np.testing.assert_array_equal(dequantize(kept.gate_up), decoded.gate_up)
    np.testing.assert_array_equal(dequantize(kept.down), decoded.down)
    assert quant.tree_bytes(kept) == cfg.experts * moe.expert_bytes(cfg, "mxfp4")


def test_every_family_finds_all_its_tensors(tmp_path):
    for family in families.FAMILIES:
        (tmp_path / family).mkdir()
        tensors = checkpoint_tensors(family)
        save(tmp_path / family, family, tensors)
        weights.verify(Checkpoint(tmp_path / family), families.tiny(family))


def test_a_tied_head_is_the_embedding(tmp_path):
    tensors = checkpoint_tensors("qwen3_moe", tie_word_embeddings=True, num_hidden_layers=1)
    assert "lm_head.weight" not in tensors
    save(tmp_path, "qwen3_moe", tensors, tie_word_embeddings=True, num_hidden_layers=1)
    _, params, _ = weights.load(tmp_path)
    assert params["head"]["project"]["weight"] is params["embed"]["weight"]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_precisions_on_load_equal_encoding_afterwards(folder, precision):
    cfg, checkpoint = load_config(folder), Checkpoint(folder)
    direct = weights.load_experts(checkpoint, cfg, precision)
    later = quantize_store(weights.load_experts(checkpoint, cfg), precision)
    jax.tree.map(np.testing.assert_array_equal, direct, later)
    one = weights.read_expert(checkpoint, cfg, layer=1, expert=3, precision=precision)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[3]), one, direct[1])


def test_dtype_of_choice(folder, olmoe):
    cfg, params, store = weights.load(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves((params, store))} == {BF16}
    expected = olmoe["model.layers.0.mlp.experts.0.down_proj.weight"].astype(BF16)
    np.testing.assert_array_equal(store[0].down[0], expected)
    assert params["embed"]["weight"].dtype == jnp.bfloat16 and cfg.dtype == "bfloat16"


def test_loading_experts_takes_the_store_and_little_more(folder):
    cfg, checkpoint = load_config(folder), Checkpoint(folder)
    weights.verify(checkpoint, cfg)
    tracemalloc.start()
    try:
        store = weights.load_experts(checkpoint, cfg)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert quant.tree_bytes(store) <= peak < quant.tree_bytes(store) + 2 * moe.expert_bytes(cfg)


def test_the_order_of_storage():
    cfg = families.tiny("deepseek_v2")  # layer 0 is dense
    order = list(weights.iter_experts(cfg))
    assert order[:2] == [(0, 1, 0), (0, 1, 1)] and order[-1] == (1, 2, 7) and len(order) == 16


# ---- the file format -------------------------------------------------------------------------------------------------


def test_files_read_back_as_written(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.b": rng.standard_normal((3, 5)).astype(np.float32),
        "bf": rng.standard_normal(7).astype(BF16),
        "bytes": rng.integers(0, 255, (2, 2, 2), dtype=np.uint8),
        "scalar": np.asarray(3, np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    file = safetensors.TensorFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        got = file.read(name)
        assert got.dtype == tensor.dtype and not got.flags.writeable
        np.testing.assert_array_equal(got, tensor)


def test_files_agree_with_the_format_s_own_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)}
    library.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    ours, theirs = (
        safetensors.TensorFile(tmp_path / "theirs.safetensors"),
        library.load_file(tmp_path / "ours.safetensors"),
    )
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours.read(name), tensor)
        np.testing.assert_array_equal(theirs[name], tensor)


# ---- damage ----------------------------------------------------------------------------------------------------------


def refused(message, call, *args, **kwargs):
    with pytest.raises(SpecmdError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def damaged(folder, olmoe, changes, message, **kwargs):
    tensors = {name: tensor for name, tensor in (olmoe | changes).items() if tensor is not None}
    (folder / INDEX).unlink(missing_ok=True)
    save(folder, "olmoe", tensors, num_hidden_layers=2)
    refused(message, weights.load, folder, **kwargs)


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def test_missing_tensors(folder, olmoe):
    damaged(folder, olmoe, {EXPERT: None}, rf"tensor {EXPERT} is missing from every shard")
    damaged(folder, olmoe, {"model.norm.weight": None}, r"tensor model\.norm\.weight is missing")


def test_a_tensor_that_is_not_in_the_shard_the_index_names(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EXPERT] = next(f for f in index["weight_map"].values() if f != index["weight_map"][EXPERT])
    (folder / INDEX).write_text(json.dumps(index))
    refused(rf"model-0000\d-of-00003.safetensors: tensor {EXPERT} is missing from this shard", weights.load, folder)


def test_wrong_shapes_and_types(folder, olmoe):
    wrong = np.zeros((64, 63), np.float32)
    damaged(folder, olmoe, {EXPERT: wrong}, rf"{EXPERT} has shape \[64, 63\], expected \[64, 64\]")
    message = rf"model\.safetensors: {EXPERT} has type I32, expected F32 or BF16 or F16"
    damaged(folder, olmoe, {EXPERT: np.zeros((64, 64), np.int32)}, message)
    damaged(folder, olmoe, {"lm_head.weight": np.zeros((96, 64))}, "lm_head.weight has type F64")


def test_values_that_are_not_finite(folder, olmoe):
    nan = olmoe[EXPERT].copy()
    nan[3, 4:6] = np.nan
    damaged(folder, olmoe, {EXPERT: nan}, rf"{EXPERT}.*holds 2 values that are NaN or infinite", check_finite=True)
    infinite = np.full_like(olmoe["model.norm.weight"], np.inf)
    damaged(folder, olmoe, {"model.norm.weight": infinite}, "model.norm.weight holds 64 values", check_finite=True)


def test_truncated_and_foreign_files(tmp_path, folder):
    shard = next(folder.glob("model-00002*"))
    whole = shard.read_bytes()
    for size, message in (
        (4, "4 bytes cannot hold"),
        (100, "its header should end at"),
        (len(whole) - 1, "ends at byte"),
    ):
        shard.write_bytes(whole[:size])
        refused(rf"{shard.name}: truncated, .*{message}", weights.load, folder)
    shard.write_bytes((8).to_bytes(8, "little") + b"[1, 2,3]" + whole)
    refused(rf"{shard.name}: not a safetensors file", weights.load, folder)
    shard.unlink()
    refused(rf"{shard.name}: no such file", weights.load, folder)
    (tmp_path / "empty").mkdir()
    refused("expected model.safetensors or", Checkpoint, tmp_path / "empty")
    refused(r"config\.json: no such file", load_config, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(r"config\.json: .*expected JSON", load_config, tmp_path / "empty")


def test_a_store_that_does_not_fit_is_refused_before_it_is_allocated(folder):
    cfg, checkpoint = load_config(folder), Checkpoint(folder)
    need = weights.store_bytes(cfg)
    message = r"olmoe: the experts at float32 need 0\.0 GiB of host memory, 0\.0 GiB are free; smaller: int8 0\.0,"
    refused(message, weights.load_experts, checkpoint, cfg, available_bytes=need - 1)
    weights.empty_store(cfg, available_bytes=need)
    assert 0 < weights.available_memory_bytes() < 2**50


def test_mxfp4_needs_a_checkpoint_that_has_it(folder):
    refused("olmoe: the checkpoint holds no mxfp4 experts", weights.load, folder, precision="mxfp4")
