"""``gpt-oss-fingerprint``: routing of gpt-oss-20b as published by GPT-OSS-MoE-ExpertFingerprinting (decode only).

One ``*_examples.json``, a folder of them, or an ``.npz`` that packs them: ``expert_ids`` [N, 24, 4], ``gate_u8`` (gate
times 255), ``lengths``, and ``meta``, a JSON list of one row per sequence. In the JSON an example has ``router_data``,
a list of ``{"token_<position>": {"layer_<l>": {"selected_experts": [...], "selected_probs": [...]}}}``; examples may
lie in a list.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.archives import arrays_of
from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import brief, parse_json, read_text, require_file
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.validate import validate
from specmd_jax.types import Trace

LAYERS, EXPERTS, TOP_K = 24, 32, 4
_HIDDEN = 2880
EXPERT_BYTES = 3 * _HIDDEN * _HIDDEN * (4 * 32 + 8) // (32 * 8) + (2 * _HIDDEN + _HIDDEN) * 2
"""13,236,480: gate, up and down matrices of 2880 x 2880 in MXFP4 (4 bits each and one 8-bit scale for every 32:
13,219,200 bytes) and the bf16 biases of gate-and-up (5760) and down (2880: 17,280 bytes together)."""

_META = {
    "model": "gpt-oss-20b",
    "source": "github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, data/*/*/*_examples.json",
    "licence": "Apache-2.0",
    "capture": (
        "decode only, greedy generation; gates are the softmax over the chosen four; "
        "expert_bytes = 3*2880*2880 MXFP4 values at (4 + 8/32)/8 bytes + (5760 + 2880) bf16 biases = 13236480"
    ),
}


def is_fingerprint(peek: Peek) -> bool:
    packed = peek.suffix == ".npz" and peek.has("expert_ids", "gate_u8")
    return packed or peek.has("router_data") or bool(peek.files("*_examples.json"))


def import_fingerprint(path: str | os.PathLike[str]) -> Trace:
    """Reads routing of gpt-oss-20b: one ``*_examples.json``, a folder of them (in path order), or the packed ``.npz``.

    Each sequence becomes a request of decode tokens; its meta row keeps dataset, category, prompt_tokens and finished
    (and repetitive, when the file says so).

    Raises:
      SpecmdError: with the file, and the example, token and layer or the line of the JSON.
    """
    path = Path(path)
    trace = _from_npz(path) if path.suffix == ".npz" else _from_json(path)
    validate(trace, str(path))
    return trace


def _trace(
    ids: npt.NDArray[Any], gates: npt.NDArray[np.float32] | None, lengths: list[int], rows: list[dict[str, Any]]
) -> Trace:
    return Trace(
        expert_ids=ids,
        lengths=np.array(lengths, np.int32),
        prompt_lengths=np.zeros(len(lengths), np.int32),
        experts=EXPERTS,
        expert_bytes=np.full(LAYERS, EXPERT_BYTES, np.int64),
        gates=gates,
        meta=_META | {"requests": rows},
    )


def _from_npz(path: Path) -> Trace:
    arrays = arrays_of(path)
    for name in ("expert_ids", "gate_u8", "lengths", "meta"):
        if name not in arrays:
            raise SpecmdError(f"{path}: array {name!r} is missing (found: {', '.join(arrays)})")
    rows = parse_json(str(arrays["meta"]), f"{path}: meta", constants=False)
    ids, gates = arrays["expert_ids"], arrays["gate_u8"]
    if ids.ndim != 3 or ids.shape[1:] != (LAYERS, TOP_K):
        raise SpecmdError(f"{path}: expert_ids has shape {list(ids.shape)}, expected [tokens, 24, 4]")
    if gates.dtype != np.uint8:
        raise SpecmdError(f"{path}: gate_u8 has dtype {gates.dtype}, expected uint8")
    if gates.shape != ids.shape:
        raise SpecmdError(f"{path}: gates has shape {list(gates.shape)}, expected {list(ids.shape)}")
    lengths = arrays["lengths"]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise SpecmdError(f"{path}: lengths is {lengths.dtype}, expected a list of integers")
    for place in np.flatnonzero((lengths < 1) | (lengths > len(ids)))[:1]:
        raise SpecmdError(f"{path}: lengths[{place}] is {lengths[place]}, expected 1 to {len(ids)}")
    return _trace(ids, gates.astype(np.float32) / np.float32(255), lengths.tolist(), rows)


def _from_json(path: Path) -> Trace:
    if os.path.isdir(path):
        files = sorted(path.rglob("*_examples.json"))
        if not files:
            raise SpecmdError(f"{path}: no *_examples.json in this folder")
    else:
        require_file(path)
        files = [path]
    blocks: list[npt.NDArray[np.int16]] = []
    shares: list[npt.NDArray[np.float32] | None] = []
    rows: list[dict[str, Any]] = []
    for file in files:
        for place, example in _examples(file):
            ids, gates, first = _routing(place, example["router_data"])
            row = {
                "dataset": example.get("dataset", "unknown"),
                "category": example.get("category", "unknown"),
                "prompt_tokens": first,
                "finished": bool(example.get("finished_successfully", example.get("finished", False))),
            }
            if example.get("has_repetition"):
                row["repetitive"] = True
            blocks.append(ids)
            shares.append(gates)
            rows.append(row)
    without = [gates is None for gates in shares]
    if any(without) and not all(without):
        raise SpecmdError(
            f"{path}: request {without.index(True)} has no selected_probs, expected them in all or in none"
        )
    known = [gates for gates in shares if gates is not None]
    lengths = [len(block) for block in blocks]
    return _trace(np.concatenate(blocks), np.concatenate(known) if known else None, lengths, rows)


def _examples(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a file that has ``router_data``, with its place: the file itself, or the members of its lists."""
    content = parse_json(read_text(file), str(file))
    found = False
    waiting: list[tuple[str, Any]] = [(str(file), content)]
    while waiting:
        place, item = waiting.pop(0)
        if isinstance(item, dict) and "router_data" in item:
            found = True
            yield place, item
        elif isinstance(item, list):
            waiting += [(f"{place}, example {i}", member) for i, member in enumerate(item)]
        elif isinstance(item, dict):
            waiting += [(f"{place}, {key}", member) for key, member in item.items() if isinstance(member, list | dict)]
    if not found:
        raise SpecmdError(f"{file}: no object with 'router_data' in it")


def _routing(place: str, router_data: Any) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32] | None, int]:
    """Expert ids and gates [tokens, L, K] of an example, tokens by position, and the position of the first."""
    if not isinstance(router_data, list) or not router_data:
        raise SpecmdError(f"{place}: router_data is {brief(router_data)}, expected a list of tokens")
    tokens: dict[int, dict[str, Any]] = {}
    for index, item in enumerate(router_data):
        if not isinstance(item, dict):
            raise SpecmdError(f"{place}, router_data {index}: {brief(item)}, expected {{'token_<position>': ...}}")
        for key, layers in item.items():
            match = re.fullmatch(r"token_(\d+)", key)
            if not match or not isinstance(layers, dict):
                raise SpecmdError(f"{place}, router_data {index}: {key!r}, expected 'token_<position>' with its layers")
            if int(match[1]) in tokens:
                raise SpecmdError(f"{place}, router_data {index}: {key} appears twice")
            tokens[int(match[1])] = layers
    positions = sorted(tokens)
    for before, after in itertools.pairwise(positions):
        if after != before + 1:
            raise SpecmdError(f"{place}: token_{after} follows token_{before}, expected consecutive positions")
    shape = (len(tokens), LAYERS, TOP_K)
    ids, gates = np.empty(shape, np.int16), np.empty(shape, np.float32)
    gateless = 0
    for i, position in enumerate(positions):
        if len(tokens[position]) != LAYERS:
            raise SpecmdError(
                f"{place}, token_{position}: {len(tokens[position])} layers, expected {LAYERS} (gpt-oss-20b)"
            )
        for layer in range(LAYERS):
            where = f"{place}, token_{position}, layer_{layer}"
            cell = tokens[position].get(f"layer_{layer}")
            if not isinstance(cell, dict) or "selected_experts" not in cell:
                raise SpecmdError(f"{where}: {brief(cell)}, expected an object with selected_experts")
            chosen, probs = cell["selected_experts"], cell.get("selected_probs")
            if not _is_list(chosen, int) or any(not 0 <= e < EXPERTS for e in chosen):
                raise SpecmdError(f"{where}: selected_experts is {brief(chosen)}, expected 4 of 0 to 31")
            ids[i, layer] = chosen
            if probs is None:
                gateless += 1
            elif _is_list(probs, int | float):
                gates[i, layer] = probs
            else:
                raise SpecmdError(f"{where}: selected_probs is {brief(probs)}, expected 4 numbers")
    if gateless not in (0, len(tokens) * LAYERS):
        raise SpecmdError(f"{place}: selected_probs is missing in {gateless} cells, expected it in all or in none")
    return ids, None if gateless else gates, positions[0]


def _is_list(value: Any, kind: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == TOP_K
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
