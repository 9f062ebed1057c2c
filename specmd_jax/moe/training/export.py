"""Trained weights as a checkpoint folder, which `specmd_jax.moe.checkpoint` and transformers load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from specmd_jax import safetensors
from specmd_jax.files import replace_text
from specmd_jax.moe.checkpoint import packed
from specmd_jax.moe.checkpoint.folder import INDEX, SINGLE, Checkpoint
from specmd_jax.moe.checkpoint.text import TOKENIZER
from specmd_jax.moe.model.config import MoEConfig
from specmd_jax.moe.model.families import dense_names, expert_names, from_hf
from specmd_jax.moe.model.forward import param_spec
from specmd_jax.moe.training.corpus import Data
from specmd_jax.moe.training.parameters import Weights, served
from specmd_jax.training import END, Training

SHARD_BYTES = 15 << 20


def export(
    folder: str | os.PathLike[str], settings: Training, weights: Weights, data: Data, dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> Path:  # fmt: skip
    """Writes config.json, the tokenizer and the weights as ``dtype``, in shards of at most ``shard_bytes``."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    hf = settings.hf(data.vocabulary, dtype)
    cfg = from_hf(hf)
    shards: list[dict[str, npt.NDArray[Any]]] = [{}]
    used = 0
    for name, tensor in tensors(cfg, weights):
        if used and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    for file, shard in zip(files, shards, strict=True):
        safetensors.write(out / file, shard, {"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        replace_text(out / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n")
    shutil.copyfile(data.folder / TOKENIZER, out / TOKENIZER)
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
        "clean_up_tokenization_spaces": False, "model_max_length": settings.sequence,
    }  # fmt: skip
    replace_text(out / "tokenizer_config.json", json.dumps(told, indent=2) + "\n")
    replace_text(out / "config.json", json.dumps(hf, indent=2) + "\n")
    return out


def tensors(cfg: MoEConfig, weights: Weights) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Gives every tensor of a checkpoint by its name; a tied head has none."""
    params, stacks = jax.device_get(served(cfg, weights))
    for path, name in dense_names(cfg, param_spec(cfg)).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        yield name, np.asarray(leaf)
    for index, layer in enumerate(cfg.moe_layers):
        for expert in range(cfg.experts):
            gate, up = np.split(np.asarray(stacks[index].gate_up[expert]), 2)
            matrices = (gate, up, np.asarray(stacks[index].down[expert]))
            yield from zip(expert_names(cfg, layer, expert), matrices, strict=True)


def pack(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Writes a checkpoint folder of `export` again with experts at int4, other matrices at int8 (`packed`), routers and
    vectors as they are: how the model that comes with this package was made."""
    given, out = Checkpoint(source), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, npt.NDArray[Any]] = {}
    for name in given.names:
        tensor = given.tensor(name)
        if tensor.ndim == 2 and not name.endswith("mlp.gate.weight"):
            found |= packed.pack(name, tensor.astype(np.float32), "int4" if ".experts." in name else "int8")
        else:
            found[name] = tensor
    safetensors.write(out / SINGLE, found, {"format": "pt"})
    _copy_rest(source, out)
    return out


def plain(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Writes a packed checkpoint folder again with the bfloat16 matrices that its codes stand for, under the names that
    transformers expects. It computes the same as the packed one."""
    given, out = Checkpoint(source), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(packed.plain_name(name) for name in given.names)
    safetensors.write(out / SINGLE, {name: given.tensor(name) for name in names}, {"format": "pt"})
    _copy_rest(source, out)
    return out


def _copy_rest(source: str | os.PathLike[str], out: Path) -> None:
    for file in ("config.json", TOKENIZER, "tokenizer_config.json"):
        shutil.copyfile(Path(source) / file, out / file)
