"""``sglang``: what SGLang's expert distribution recorder dumps in the mode ``per_token``, one file per rank.

It reads the ``.pt`` file (torch must be installed, and reads it without running anything in it), or the same as
``.json`` or ``.npz`` (arrays ``last_physical_to_logical_map``, ``0/topk_ids_of_layer``, ``0/forward_mode``, ...)::

    records                       one per forward pass, in this order
        forward_pass_id, rank     optional; a file holds one rank
        forward_mode              1: prefill, 2: decode, 4: idle (left out)
        topk_ids_of_layer         [L, T, K] physical ids; -1: none
        positions                 [T] place of each token in its sequence
        extend_seq_lens           [sequences] tokens of each in a prefill pass; absent: one sequence
        rids                      [sequences] optional names of the sequences
    last_physical_to_logical_map  [L, physical experts] optional; absent: the ids are logical ones

The recorder always keeps 8 places for the experts of a token; those that no token uses are left out. Records need not
name their sequences, so tokens are put together by position: a prefill that starts at 0 or behind the prefix cache is a
new request; one that starts where an undecoded request stopped is its next chunk. A decoded token goes on with the
request whose next position it has, in order; requests that a decode pass leaves out have ended. Where that leaves a
choice the file is refused. The order of the K ids is taken for falling gate.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import (
    brief,
    check_shape,
    id_cells,
    is_ids,
    parse_json,
    read_records,
    read_text,
    whole_number,
)
from specmd_jax.trace.importers.joining import UNSAID, Part, Sizes, join
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.trace.importers.torch_file import load_torch
from specmd_jax.types import Trace

PREFILL, DECODE, IDLE = 1, 2, 4  # values of SGLang's ForwardMode
_MAP = "last_physical_to_logical_map"


@dataclasses.dataclass(eq=False)
class _Sequence:
    next: int  # position that comes next
    name: Any = None
    cached: int = 0  # tokens before the first one here
    prompt: int = 0
    decoded: int = 0
    ended: bool = False
    blocks: list[npt.NDArray[np.int64]] = dataclasses.field(default_factory=list)  # [T, L, K]


def is_sglang(peek: Peek) -> bool:
    dumped = peek.has("records") and (peek.suffix in (".pt", ".pth") or peek.has("topk_ids_of_layer"))
    return dumped or (peek.suffix == ".npz" and peek.has("topk_ids_of_layer", "forward_mode"))


def import_sglang(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads a ``per_token`` dump of SGLang's expert distribution recorder; see the module.

    Raises:
      SpecmdError: with the file, and the record, token and layer.
    """
    path = Path(path)
    records, mapping = _read(path)
    sequences: list[_Sequence] = []
    rank: Any = None
    first: npt.NDArray[np.int64] | None = None
    passes = [(place, record, whole_number(record, "forward_mode", place)) for place, record in records]
    alone = all(len(_lengths(record, place, mode)) <= 1 for place, record, mode in passes)
    for place, record, mode in passes:
        if "rank" in record:
            rank = record["rank"] if rank is None else rank
            if record["rank"] != rank:
                raise SpecmdError(f"{place}: rank is {record['rank']}, expected {rank} as before: one file a rank")
        if mode == IDLE:
            continue
        if mode not in (PREFILL, DECODE):
            raise SpecmdError(f"{place}: forward_mode is {mode}, expected 1 (prefill), 2 (decode) or 4 (idle)")
        if "topk_ids_of_layer" not in record:
            raise SpecmdError(f"{place}: topk_ids_of_layer is missing, expected a dump of the mode per_token")
        by_layer = id_cells(record["topk_ids_of_layer"], f"{place}: topk_ids_of_layer", ("layer", "token"))
        ids = _logical(by_layer, mapping, place).swapaxes(0, 1)  # [T, L, K]
        first = ids if first is None else first
        check_shape(ids, first, place)
        _assign(sequences, ids, record, mode, place, alone)
    if not sequences:
        raise SpecmdError(f"{path}: no record of a prefill or a decode")
    parts = [
        Part(
            np.concatenate(sequence.blocks),
            sequence.prompt,
            {"prompt_tokens": sequence.prompt} | ({} if sequence.name is None else {"rid": sequence.name}),
        )
        for sequence in sequences
    ]
    meta: dict[str, Any] = {
        "source": f"SGLang expert distribution recorder {path.name}",
        "capture": "mode per_token; requests put together by position"
        + ("" if mapping is None else f"; physical ids mapped by {_MAP}"),
    }
    if rank is not None:
        meta["rank"] = rank
    experts = None if mapping is None else int(mapping.max()) + 1
    cached = sum(sequence.cached for sequence in sequences)
    notes = (f"{cached} prompt tokens came out of the prefix cache: their routing is not in the file",) * bool(cached)
    known = Known(interleaved=not alone, notes=notes)
    return join(path, parts, sizes, meta, None, experts, strip=strip, known=known)


def _read(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], npt.NDArray[np.int64] | None]:
    """Gives the records with their places, and the map [L, physical] or None."""
    if path.suffix == ".npz":
        records = read_records(path)
        head = records[0][1]
    else:
        head = load_torch(path) if path.suffix in (".pt", ".pth") else parse_json(read_text(path), str(path))
        if not isinstance(head, dict) or not isinstance(head.get("records"), list):
            raise SpecmdError(f"{path}: no list 'records', expected a dump of the mode per_token")
        records = [(f"{path}, record {index}", record) for index, record in enumerate(head["records"])]
    for place, record in records:
        if not isinstance(record, dict):
            raise SpecmdError(f"{place}: {brief(record)}, expected an object")
    mapping = head.get(_MAP)
    if mapping is None:
        return records, None
    mapping = np.array(mapping) if isinstance(mapping, list) and _is_matrix(mapping) else mapping
    if not isinstance(mapping, np.ndarray) or mapping.ndim != 2 or mapping.dtype.kind not in "iu" or not mapping.size:
        raise SpecmdError(f"{path}: {_MAP} is {brief(mapping)}, expected integers [layers, physical experts]")
    return records, mapping.astype(np.int64)


def _is_matrix(rows: list[Any]) -> bool:
    return all(is_ids(row) and len(row) == len(rows[0]) for row in rows)


def _integers(value: Any, what: str, place: str) -> list[int]:
    values = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(values, list) or not all(type(item) is int and 0 <= item < 1 << 31 for item in values):
        raise SpecmdError(f"{place}: {what} is {brief(value)}, expected a list of integers >= 0")
    return values


def _lengths(record: dict[str, Any], place: str, mode: int) -> list[int]:
    """Gives the tokens of each sequence in a pass."""
    positions = _integers(record.get("positions"), "positions", place)
    if mode == DECODE:
        return [1] * len(positions)
    given = record.get("extend_seq_lens")
    lengths = [len(positions)] if given is None else _integers(given, "extend_seq_lens", place)
    if sum(lengths) != len(positions):
        raise SpecmdError(f"{place}: extend_seq_lens sum to {sum(lengths)}, expected {len(positions)} (its positions)")
    return lengths


def _logical(ids: npt.NDArray[np.int64], mapping: npt.NDArray[np.int64] | None, place: str) -> npt.NDArray[np.int64]:
    """Physical ids [L, T, K] as logical ones."""
    if mapping is None:
        return ids
    layers, physical = mapping.shape
    if ids.shape[0] != layers:
        raise SpecmdError(f"{place}: topk_ids_of_layer has {ids.shape[0]} layers, expected {layers} as {_MAP}")
    bad = (ids < -1) | (ids >= physical)
    for layer, token, place_k in np.argwhere(bad)[:1]:
        value = ids[layer, token, place_k]
        raise SpecmdError(
            f"{place}, token {token}, layer {layer}: physical expert {value}, expected 0 to {physical - 1}, or -1"
        )
    logical = np.take_along_axis(mapping, np.maximum(ids, 0).reshape(layers, -1), axis=1).reshape(ids.shape)
    return np.where(ids < 0, -1, logical)


def _assign(
    sequences: list[_Sequence],
    ids: npt.NDArray[np.int64],
    record: dict[str, Any],
    mode: int,
    place: str,
    alone: bool,
) -> None:
    """Hands the tokens [T, L, K] of one pass to the sequences that they belong to."""
    positions, lengths = _integers(record.get("positions"), "positions", place), _lengths(record, place, mode)
    if len(positions) != len(ids):
        raise SpecmdError(f"{place}: {len(positions)} positions, expected {len(ids)} (the tokens of topk_ids_of_layer)")
    names = record.get("rids")
    names = names.tolist() if isinstance(names, np.ndarray) else names
    if names is not None and (not isinstance(names, list) or len(names) != len(lengths)):
        raise SpecmdError(f"{place}: rids is {brief(names)}, expected {len(lengths)} names")
    start = 0
    taken: list[_Sequence] = []
    for index, length in enumerate(lengths):
        if not length:
            continue
        stop, position = start + length, positions[start]
        for token in range(start, stop):
            if positions[token] != position + token - start:
                raise SpecmdError(
                    f"{place}, token {token}: position is {positions[token]}, expected {position + token - start}"
                )
        name = None if names is None else names[index]
        fits = [
            s
            for s in sequences
            if not (s.ended or s in taken or (mode == PREFILL and s.decoded)) and (s.next, s.name) == (position, name)
        ]
        if mode == DECODE:
            same = positions[index:].count(position)
            if not fits:
                raise SpecmdError(f"{place}, token {start}: no request waits for position {position}")
            if name is None and not alone and len(fits) != same:
                raise SpecmdError(
                    f"{place}, token {start}: {len(fits)} requests wait for position {position} and {same} go on: "
                    "expected records with rids, or of one request at a time"
                )
            sequence = fits[-1] if alone else fits[0]
            sequence.decoded += length
        else:
            goes_on = bool(fits) and position > 0
            sequence = fits[-1] if goes_on else _Sequence(position, name, position)
            sequences += [] if goes_on else [sequence]
            sequence.prompt += length
        sequence.next = position + length
        sequence.blocks.append(ids[start:stop])
        taken.append(sequence)
        start = stop
    if mode == DECODE and names is None:
        for sequence in sequences:
            sequence.ended = sequence.ended or sequence not in taken
