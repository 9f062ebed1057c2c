"""Counts of uses that other tools keep: profiles, no traces, as nothing says which token used what.

==================== ==================================================================================================
sglang-counts        what SGLang's expert distribution recorder dumps in the mode ``stat``: ``logical_count`` [L, E] or
                     [passes, L, E] in ``.json``, ``.npz`` or ``.pt`` (torch must be installed)
ktransformers        ``activation_freq`` [L, E] in a ``.pt``, or the bare tensor
moe-infinity-eamc    a ``.npy`` of MoE-Infinity's activation matrices [N, L, E]
exllamav3            ``census`` [prompts, L, E] or ``counts`` [L, E] in ``.safetensors`` or ``.npz``
counts-text          text: lines ``layer expert count`` (with commas, tabs or blanks), or ``layer 3: 5 0 2 ...`` for all
                     experts of a layer
==================== ==================================================================================================

Several tables are summed. Layers that counted nothing are dense: left out and named.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.archives import arrays_of, read_array, reading
from specmd_jax.errors import SpecmdError
from specmd_jax.safetensors import TensorFile
from specmd_jax.trace.importers.common import parse_json, read_bytes, read_text
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.torch_file import load_torch


class Counts(NamedTuple):
    """Uses [L, E] of the layers that have experts, and what is to be said of them."""

    table: npt.NDArray[np.float64]
    said: str


class ProfileFormat(NamedTuple):
    """A foreign format of counts."""

    recognises: Callable[[Peek], bool]
    about: str  # what is read, on one line


FIELDS = {
    "logical_count": "SGLang's logical_count",
    "activation_freq": "activation_freq of ktransformers",
    "census": "census of exllamav3",
}
"""Name of an array of counts -> what it is."""

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
_TRIPLE = re.compile(rf"\s*(\d{{1,6}})[\s,;:]+(\d{{1,6}})[\s,;:]+({_NUMBER})\s*")
_ROW = re.compile(
    rf"\s*(?:layers?|blk|L)?[\s_.]*(\d{{1,6}})\s*[:=]\s*[\[(]?\s*({_NUMBER}(?:[\s,;]+{_NUMBER})+)\s*[\])]?\s*", re.I
)
_HEADER = re.compile(
    r"\s*#?\s*\"?layer(?:_?id|_?idx)?\"?[\s,;:]+\"?expert(?:_?id|_?idx)?\"?[\s,;:]+\"?[\w ]+\"?\s*", re.I
)
_LARGEST = 1 << 16  # layers, and experts, of a text


def _is_text(peek: Peek) -> bool:
    lines = [line for line in peek.first_lines[:-1] or peek.first_lines if line.strip() and not line.startswith("#")]
    lines = lines[1:] if lines and _HEADER.fullmatch(lines[0]) else lines
    plain = peek.suffix in (".txt", ".csv", ".tsv", ".log", "")
    return plain and bool(lines) and any(all(one.fullmatch(line) for line in lines) for one in (_TRIPLE, _ROW))


PROFILES: Mapping[str, ProfileFormat] = {
    "sglang-counts": ProfileFormat(
        lambda peek: peek.has("logical_count") and not peek.has("topk_ids_of_layer"),
        "logical_count of the expert recorder: .json, .npz or .pt (with torch)",
    ),
    "ktransformers": ProfileFormat(lambda peek: peek.has("activation_freq"), "activation_freq in a .pt (with torch)"),
    "moe-infinity-eamc": ProfileFormat(lambda peek: peek.suffix == ".npy", "activation matrices [N, L, E] in a .npy"),
    "exllamav3": ProfileFormat(
        lambda peek: peek.has("census") or (peek.suffix == ".safetensors" and peek.has("counts")),
        "census or counts in .safetensors or .npz",
    ),
    "counts-text": ProfileFormat(_is_text, "lines 'layer expert count', or 'layer 3: 5 0 2 ...'"),
}
"""Format name -> how it is known; `read_counts` reads them all."""


def read_counts(path: Path, content: dict[str, Any] | None = None) -> Counts | None:
    """Reads counts of another tool; None for a file that has none.

    Args:
      content: fields of the file, if they are read already.
    Raises:
      SpecmdError: names the file and what was expected.
    """
    if content is None:
        content = _fields(path)
    for name, said in FIELDS.items():
        if name in content:
            return _told(path, name, content[name], said)
    if path.suffix in (".npy", ".pt", ".pth", ".safetensors") and "counts" in content:
        return _told(path, "counts", content["counts"], "counts")
    if "text" in content and path.suffix not in (".json", ".npz"):
        return _text(path, content["text"])
    return None


def _fields(path: Path) -> dict[str, Any]:
    """Gives the fields of a file by its name's end; a bare array is called ``counts``."""
    if path.suffix == ".npy":
        content = read_bytes(path)
        with reading(path, "counts"):
            return {"counts": read_array(io.BytesIO(content), len(content), "counts", str(path))}
    if path.suffix in (".pt", ".pth"):
        content = load_torch(path)
        return content if isinstance(content, dict) else {"counts": content}
    if path.suffix == ".safetensors":
        file = TensorFile(path)
        return {name: file.read(name) for name in ("counts", *FIELDS) if name in file.tensors}
    if path.suffix == ".npz":
        arrays = arrays_of(path)
        return {name: arrays[name] for name in FIELDS if name in arrays}
    if path.suffix == ".json":
        content = parse_json(read_text(path), str(path))
        return content if isinstance(content, dict) else {}
    return {"text": read_text(path)}


def _told(path: Path, name: str, given: Any, said: str) -> Counts:
    try:
        counts = np.array(given, np.float64)
    except (TypeError, ValueError):
        raise SpecmdError(f"{path}: {name} is no table of numbers, expected [layers, experts]") from None
    if counts.ndim == 3:
        counts = counts.sum(axis=0)
    if counts.ndim != 2:
        raise SpecmdError(
            f"{path}: {name} has {counts.ndim} axes, expected [layers, experts] or [passes, layers, experts]"
        )
    return _without_dense(counts, list(range(len(counts))), said)


def _without_dense(counts: npt.NDArray[np.float64], numbers: list[int], said: str) -> Counts:
    used = counts.any(axis=1)
    if not used.any() or used.all():
        return Counts(counts, said if numbers == list(range(len(numbers))) else f"{said}; layers {_named(numbers)}")
    which = list(zip(numbers, np.atleast_1d(used).tolist(), strict=True))
    kept, dense = ([number for number, one in which if one == wanted] for wanted in (True, False))
    return Counts(counts[used], f"{said}; layers {_named(kept)}; dense and left out: {_named(dense)}")


def _named(numbers: list[int]) -> str:
    """Names layers, runs of them as ``3 to 60``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _text(path: Path, text: str) -> Counts:
    rows: dict[int, dict[int, float]] = {}
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    lines = [(number, line) for number, line in lines if not line.startswith("#")]
    lines = lines[1:] if lines and _HEADER.fullmatch(lines[0][1]) else lines
    for number, line in lines:
        triple, row = _TRIPLE.fullmatch(line), _ROW.fullmatch(line)
        if triple:
            layer, expert, count = int(triple[1]), int(triple[2]), float(triple[3])
            found = {expert: count}
        elif row:
            layer, found = int(row[1]), dict(enumerate(map(float, re.split(r"[\s,;]+", row[2].strip()))))
        else:
            raise SpecmdError(
                f"{path}, line {number}: {line[:60]!r}, expected 'layer expert count' or 'layer 3: 5 0 ...'"
            )
        if layer >= _LARGEST or max(found) >= _LARGEST:
            raise SpecmdError(f"{path}, line {number}: layer {layer}, expert {max(found)}, expected below {_LARGEST}")
        known = rows.setdefault(layer, {})
        for expert, count in found.items():
            known[expert] = known.get(expert, 0.0) + count
    if not rows:
        raise SpecmdError(f"{path}: no counts, expected lines 'layer expert count' or 'layer 3: 5 0 ...'")
    numbers = sorted(rows)
    table = np.zeros((len(numbers), 1 + max(max(known) for known in rows.values())))
    for index, layer in enumerate(numbers):
        table[index, list(rows[layer])] = list(rows[layer].values())
    return _without_dense(table, numbers, "counts by layer and expert")
