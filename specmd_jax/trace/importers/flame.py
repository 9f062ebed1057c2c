"""``flame-moe``: FLAME-MoE-Traces, parquet with ``indices`` and ``scores`` of a token a row, a file or more a layer.

The folder of the layers is named (or one file). The layer is the number behind ``layer`` in the path, or else the last
one in the name; several files of one layer follow each other by name. Row i of every layer is the same token. Tokens
stand in the order of training: there are no requests and no prompts. Files without ``indices``, such as the tokens
themselves, are not read. It needs pyarrow (`pip install 'specmd-jax[parquet]'`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, is_ids
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.parquet import parquet_file, read_parquet
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.token_rows import is_shares
from specmd_jax.types import Trace

_LAYER = re.compile(r"layers?[-_ .=]?(\d{1,6})", re.IGNORECASE)


def is_flame(peek: Peek) -> bool:
    if os.path.isdir(peek.path):
        return any(Peek(file).has("indices", "scores") for file in peek.files("*.parquet")[:4])
    return peek.suffix == ".parquet" and peek.has("indices", "scores")


def import_flame(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads FLAME-MoE-Traces; see the module. Raises `SpecmdError` with the file and the row."""
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if os.path.isdir(path) else [path]
    layers: dict[int, list[Path]] = {}
    for file in files:
        if "indices" in parquet_file(file).schema_arrow.names:
            layers.setdefault(_layer(path, file), []).append(file)
    if not layers:
        raise SpecmdError(f"{path}: no parquet with the column 'indices', expected one per layer")
    numbers = sorted(layers)
    read = [_read(layers[number]) for number in numbers]
    for number, (ids, _) in zip(numbers, read, strict=True):
        if ids.shape != read[0][0].shape:
            rows, wanted = len(ids), len(read[0][0])
            raise SpecmdError(f"{layers[number][0]}: {rows} rows of {ids.shape[1]} experts, expected {wanted} of "
                              f"{read[0][0].shape[1]} as layer {numbers[0]} has")  # fmt: skip
    gates = np.stack([share for _, share in read if share is not None], axis=1) if read[0][1] is not None else None
    part = Part(np.stack([ids for ids, _ in read], axis=1), 0, {}, gates)
    meta: dict[str, Any] = {"source": f"FLAME-MoE traces {path.name}", "capture": "tokens in the order of training"}
    if numbers != list(range(len(numbers))):
        meta["layer_numbers"] = numbers
    notes = ("tokens of training, without requests: one follows another as no decoding does",)
    known = Known(phases=False, notes=notes)
    return join(path, [part], sizes, meta, None, strip=strip, known=known)


def _layer(root: Path, file: Path) -> int:
    """Number of the layer that a file is of, by its path below the folder."""
    below = str(file.relative_to(root)) if root != file else file.name
    named = _LAYER.findall(below)
    numbers = named or re.findall(r"\d{1,6}", Path(below).stem)
    if not numbers:
        raise SpecmdError(f"{file}: no number in its name, expected that of its layer")
    return int(numbers[-1])


def _read(files: list[Path]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32] | None]:
    """Gives ids [T, K] by falling score, and the scores."""
    ids: list[list[int]] = []
    shares: list[list[float]] = []
    for file in files:
        for index, row in enumerate(read_parquet(file, ("indices",), ("scores",))):
            chosen, scores = row["indices"], row.get("scores")
            if not is_ids(chosen) or (ids and len(chosen) != len(ids[0])):
                wanted = f"{len(ids[0])} expert ids" if ids else "a list of expert ids"
                raise SpecmdError(f"{file}, row {index}: indices is {brief(chosen)}, expected {wanted}")
            ids.append(chosen)
            if is_shares(scores, len(chosen)):
                shares.append(scores)
    if not ids:
        raise SpecmdError(f"{files[0]}: no rows")
    table = np.array(ids, np.int64)
    if len(shares) < len(ids):
        return table, None
    found = np.array(shares, np.float32)
    order = np.argsort(-found, axis=-1, kind="stable")
    return np.take_along_axis(table, order, -1), np.take_along_axis(found, order, -1)
