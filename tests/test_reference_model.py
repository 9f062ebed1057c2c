"""The model that comes with the package: how its file is read, and that it predicts text that it never saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from specmd_jax import moe, safetensors
from specmd_jax.errors import SpecmdError
from specmd_jax.moe.checkpoint import packed, weights
from specmd_jax.moe.checkpoint.folder import Checkpoint
from specmd_jax.moe.model import quant
from specmd_jax.moe.training.export import pack
from specmd_jax.reference import held_out_windows, reference_folder


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


def test_the_reference_model_is_small_and_predicts_text_that_it_never_saw() -> None:
    assert sum(path.stat().st_size for path in reference_folder().iterdir()) < 18_000_000
    cfg, params, store = weights.load(reference_folder(), "float32")
    assert (len(cfg.moe_layers), cfg.experts, cfg.top_k, cfg.vocabulary) == (8, 32, 4, 8192)
    net, stacks = moe.build(cfg), jax.tree.map(jnp.asarray, store)

    @jax.jit
    def loss(params: Any, stacks: Any, tokens: jax.Array) -> jax.Array:
        start = moe.init_cache(cfg, 1, tokens.shape[1] - 1)
        x, _, _ = moe.forward(net, params, stacks, tokens[:, :-1], start, jnp.zeros(1, jnp.int32))
        logits = net.head(params["head"], x.reshape(-1, cfg.width))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[0, 1:]).mean()

    windows = held_out_windows()
    bits = {}
    for name, bytes_per_token in zip(("code", "maths"), windows["bytes_per_token"][2:4], strict=True):
        nats = np.mean(
            [float(loss(params, stacks, jnp.asarray(row[None, :65], jnp.int32))) for row in windows[name][:4]]
        )
        bits[name] = nats / math.log(2) / bytes_per_token
    # without context the first tokens of a window cost more than what its README states of whole ones
    assert bits["code"] < 1.2 and bits["maths"] < 1.2, bits


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
    off = {name: np.abs((found.tensor(name) - matrix).astype(np.float32)).max() for name, matrix in matrices.items()}
    assert off[router] == 0 < off[attention] < off[expert] < 0.4
