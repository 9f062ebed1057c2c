"""A first look into a file, from which formats are recognised."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

from specmd_jax.archives import open_archive
from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import head_of, parse_json, require_file
from specmd_jax.trace.importers.parquet import parquet_file
from specmd_jax.trace.importers.torch_file import load_torch

_PACKED = (".gz", ".xz")


class Peek:
    """The beginning of a file, or a folder; it is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isdir(path):
            require_file(path)

    @functools.cached_property
    def suffix(self) -> str:
        """Of the file as it is without packing."""
        plain = self.path.with_suffix("") if self.path.suffix in _PACKED else self.path
        return plain.suffix.lower()

    @functools.cached_property
    def head(self) -> bytes:
        """The first bytes, unpacked; none of a folder."""
        return b"" if os.path.isdir(self.path) else head_of(self.path)

    @functools.cached_property
    def first_lines(self) -> list[str]:
        return self.head.decode("utf-8", "replace").splitlines()[:20]

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """Names of fields: of JSON objects near the beginning, arrays of an archive, tensors, columns of parquet."""
        if os.path.isdir(self.path):
            return frozenset()
        if self.suffix == ".npz":
            with open_archive(self.path, "arrays of numpy (.npz)", whole=False) as archive:
                return frozenset(name.removesuffix(".npy").rpartition("/")[2] for name in archive.namelist())
        if self.suffix in (".pt", ".pth"):
            content: Any = load_torch(self.path)
            return (
                frozenset(key for key in content if isinstance(key, str)) if isinstance(content, dict) else frozenset()
            )
        if self.suffix == ".parquet":
            return frozenset(parquet_file(self.path).schema_arrow.names)
        if self.suffix == ".safetensors":
            return frozenset(self._safetensors())
        return frozenset(re.findall(r'"([A-Za-z_][\w.]*)"\s*:', self.head.decode("utf-8", "replace")))

    def has(self, *names: str) -> bool:
        """Whether it has all of these fields."""
        return self.keys.issuperset(names)

    def files(self, pattern: str) -> list[Path]:
        """Files in the folder that it is, in the order of their names; none of a file."""
        return sorted(self.path.rglob(pattern)) if os.path.isdir(self.path) else []

    def _safetensors(self) -> list[str]:
        length = int.from_bytes(self.head[:8], "little")
        try:
            header = parse_json(self.head[8 : 8 + length], str(self.path))
        except SpecmdError:
            return []
        return list(header) if isinstance(header, dict) else []
