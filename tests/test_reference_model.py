"""The model that comes with the package: how its file is read, and that it predicts text that it never saw."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from experiments.studies import pack_moe as work
from specmd_jax import safetensors
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import packed
from specmd_jax.moe.checkpoint.folder import Checkpoint, load_config
from specmd_jax.moe.model import quant
from specmd_jax.moe.training.export import pack, plain
from specmd_jax.reference import held_out_texts, reference_folder
from specmd_jax.report.pages.pack_moe import AS_RECORDED, verdict


@pytest.mark.parametrize("kind", packed.KINDS)
def test_a_packed_matrix_is_read_as_what_its_codes_stand_for(kind: str, tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    safetensors.write(tmp_path / "model.safetensors", packed.pack("a.weight", matrix, kind), {})
    checkpoint = Checkpoint(tmp_path)
    wanted = np.concatenate(quant.column_blocks(quant.quantize(matrix, kind)), axis=-1)
    found = checkpoint.tensor("a.weight", (6, 128))
    np.testing.assert_array_equal(found, wanted.astype(ml_dtypes.bfloat16))
    assert checkpoint.where("a.weight") == tmp_path / "model.safetensors"
    with pytest.raises(SpecmdError, match=r"a.weight has shape \[6, 128\], expected \[6, 64\]"):
        checkpoint.tensor("a.weight", (6, 64))


def test_the_reference_model_is_small_and_reads_held_out_text_as_it_did_when_it_was_packed() -> None:
    assert sum(path.stat().st_size for path in reference_folder().iterdir()) < 18_000_000
    cfg = load_config(reference_folder())
    assert (len(cfg.moe_layers), cfg.experts, cfg.top_k, cfg.vocabulary) == (8, 32, 4, 8192)
    before, after = work.recorded(reference_folder())["maths", 4096]
    texts = {"maths": held_out_texts()["maths"]}
    (row,) = work.rows(None, reference_folder(), texts, work.recorded(reference_folder()))
    assert row["recorded_bits_per_byte"] == before and row["recorded_packed_bits_per_byte"] == after
    assert row["packed_bits_per_byte"] == pytest.approx(after, abs=AS_RECORDED)
    assert verdict([row])[0].startswith("packing costs +0.18 % in bits per byte (recorded when it was packed): within")
    assert verdict([row])[1].startswith("the packed weights read as recorded:")
    wrong = row | {"recorded_packed_bits_per_byte": after - 2 * AS_RECORDED}
    assert verdict([wrong])[1].startswith("the packed weights read NOT as recorded:")


def test_its_readme_says_what_is_recorded() -> None:
    text = (reference_folder() / "README.md").read_text(encoding="utf-8")
    recorded = work.recorded(reference_folder())
    assert {tokens for _, tokens in recorded} == {4096}
    for (name, _), (before, after) in recorded.items():
        assert f"| {name} | {after:.4f} | {before:.4f} |" in text
    before, after = (sum(column) for column in zip(*recorded.values(), strict=True))
    assert f"{100 * (after / before - 1):.2f} % more bits per byte" in text


def test_a_checkpoint_is_packed_by_what_its_matrices_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expert, attention, router = (
        f"model.layers.0.{part}.weight" for part in ("mlp.experts.0.up_proj", "self_attn.q_proj", "mlp.gate")
    )
    source = tmp_path / "source"
    source.mkdir()
    matrices = {name: rng.normal(size=(4, 64)).astype(ml_dtypes.bfloat16) for name in (expert, attention, router)}
    safetensors.write(source / "model.safetensors", matrices, {})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / file).write_text("{}")
    found = Checkpoint(pack(source, tmp_path / "packed"))
    assert set(found.names) == {
        f"{expert}.int4.codes", f"{expert}.int4.scales", f"{attention}.int8.codes", f"{attention}.int8.scales", router
    }  # fmt: skip
    assert Checkpoint(plain(tmp_path / "packed", tmp_path / "plain")).names == tuple(matrices)
    for name in matrices:
        np.testing.assert_array_equal(Checkpoint(tmp_path / "plain").tensor(name), found.tensor(name))
    off = {name: np.abs((found.tensor(name) - matrix).astype(np.float32)).max() for name, matrix in matrices.items()}
    assert off[router] == 0 < off[attention] < off[expert] < 0.4
