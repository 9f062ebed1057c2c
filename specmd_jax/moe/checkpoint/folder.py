"""A checkpoint folder: its ``config.json``, and its tensors by name over all shards, mapped and not read.

Shards are `SINGLE`, or those that the index `INDEX` names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from specmd_jax import safetensors
from specmd_jax.errors import SpecmdError, shown
from specmd_jax.inputs import read_json
from specmd_jax.moe.checkpoint import packed
from specmd_jax.moe.model import families
from specmd_jax.moe.model.config import MoEConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MOST_BYTES = 256 << 20
"""No config and no index is larger."""
_FLOATS = ("F32", "BF16", "F16")


class Checkpoint:
    """The tensors of a folder by name, over all its shards.

    Raises SpecmdError when the folder, a shard or the index is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        index = self.folder / INDEX
        self._shards: dict[str, safetensors.TensorFile] = {}
        if os.path.exists(index):
            self._shard_of: dict[str, str] = _read_json(index).get("weight_map", {})
            if not isinstance(self._shard_of, dict) or not self._shard_of:
                raise SpecmdError(f"{index}: expected a table 'weight_map' of tensor names")
            for name, shard in self._shard_of.items():
                if not isinstance(shard, str) or not shard or Path(shard).is_absolute() or ".." in Path(shard).parts:
                    raise SpecmdError(f"{index}: {shown(name)} is in {shown(shard)}, expected a file of this folder")
        elif (self.folder / SINGLE).exists():
            self._shard_of = dict.fromkeys(self._shard(SINGLE).tensors, SINGLE)
        else:
            raise SpecmdError(f"{self.folder}: expected {SINGLE} or {INDEX} in this folder")

    def _shard(self, name: str) -> safetensors.TensorFile:
        if name not in self._shards:
            self._shards[name] = safetensors.TensorFile(self.folder / name)
        return self._shards[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, by its name in the file."""
        return tuple(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def tensor(
        self, name: str, shape: tuple[int, ...] | None = None, dtypes: tuple[str, ...] = _FLOATS
    ) -> npt.NDArray[Any]:
        """Gives a view of a tensor, checked; of one at few bits (`packed`) the floats that it stands for.

        Raises:
            SpecmdError: the tensor is in no shard, or not in the one the index names; its shape or type is another.
        """
        kind = packed.kind_of(name, self._shard_of)
        if kind is not None and dtypes is _FLOATS:
            found = packed.unpack(name, kind, self.tensor)
            if shape is not None and found.shape != shape:
                raise SpecmdError(f"{self.folder}: {name} has shape {list(found.shape)}, expected {list(shape)}")
            return found
        if name not in self._shard_of:
            raise SpecmdError(f"{self.folder}: tensor {name} is missing from every shard")
        shard = self._shard(self._shard_of[name])
        place = shard.tensors.get(name)
        if place is None:
            raise SpecmdError(f"{shard.path}: tensor {name} is missing from this shard, where {INDEX} expects it")
        if place.dtype not in dtypes:
            raise SpecmdError(f"{shard.path}: {name} has type {place.dtype}, expected {' or '.join(dtypes)}")
        if shape is not None and place.shape != shape:
            raise SpecmdError(f"{shard.path}: {name} has shape {list(place.shape)}, expected {list(shape)}")
        return shard.read(name)

    def where(self, name: str) -> Path:
        """Gives the shard that holds a tensor."""
        kind = packed.kind_of(name, self._shard_of)
        return self.folder / self._shard_of[name if kind is None else f"{name}.{kind}.{packed.CODES}"]


def load_config(folder: str | os.PathLike[str], dtype: str | None = None) -> MoEConfig:
    """Gives the configuration of a checkpoint folder; see `families.from_hf`."""
    return families.from_hf(_read_json(Path(folder) / "config.json"), dtype)


def _read_json(path: Path) -> dict[str, Any]:
    value = read_json(path, MOST_BYTES)
    if not isinstance(value, dict):
        raise SpecmdError(f"{path}: expected a JSON object")
    return value
