"""The trace file: one compressed ``.npz`` per trace, read and written without pickle.

Arrays of a file (axis letters: `specmd_jax.types`)::

    expert_ids      [N, L, K]  unsigned or signed integer, by falling gate; -1: no expert there (a skipped layer)
    lengths         [R]        integer, tokens of each request; they sum to N
    prompt_lengths  [R]        integer, optional (absent: all 0, decode only)
    gates           [N, L, K]  optional; uint8 holds round(share * 255), float16 and float32 the share itself
    logits          [N, L, E]  optional float, the router's full logits
    ahead           [N, L, E]  optional float, the gate of layer l+1 on the activations of layer l, as probabilities
    meta            []         a JSON object as a string

Keys of ``meta``: ``format`` (1), ``model``, ``layers``, ``experts``, ``top_k``, ``expert_bytes`` (one integer, or a
list, one per layer), ``source``, ``licence``, ``capture`` (notes on how it was recorded) and ``requests`` (a list with
an object per request), and, if tokens were drafted, ``accepted`` (a list per request: the tokens that each decode pass
kept, 1 or more). ``spec`` may describe a model that is not listed (`specmd_jax.specs.record`). Further keys are kept.
In memory, `Trace.meta` leaves out the `DERIVED_KEYS`, which the arrays say.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.archives import member_array, open_archive
from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.files import whole_file
from specmd_jax.inputs import parse_json
from specmd_jax.trace.validate import integers, validate
from specmd_jax.types import Trace

FORMAT = 1
REQUIRED_ARRAYS = ("expert_ids", "lengths", "meta")
OPTIONAL_ARRAYS = ("prompt_lengths", "gates", "logits", "ahead")
DERIVED_KEYS = ("format", "layers", "experts", "top_k", "expert_bytes")
TEXT_KEYS = ("model", "source", "licence", "capture")
EXPECTED = "a trace file (.npz)"

# ---------------------------------------------------------------------------------------------------- reading


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads and validates a trace file.

    Raises `SpecmdError`, naming the file and the first bad place in it, for anything that is not a valid trace: see
    `validate`.
    """
    place = str(path)
    arrays = _read_arrays(Path(path))
    trace = assemble(arrays, place)
    if trace.gates is not None:
        trace = dataclasses.replace(trace, gates=shares(trace.gates, place))
    validate(trace, place)
    return trace


def assemble(arrays: Mapping[str, npt.NDArray[Any]], place: str) -> Trace:
    """Makes a trace of a file's arrays, with its gates as they are stored; looks into no array of tokens."""
    meta = _read_meta(arrays["meta"], place)
    ids = integers(arrays["expert_ids"], "expert_ids", 3, place)
    lengths = _small_integers(arrays["lengths"], "lengths", place)
    prompts = arrays.get("prompt_lengths")
    layers, experts, top_k = (
        _positive(meta[key], f"meta key {key!r}", place) for key in ("layers", "experts", "top_k")
    )
    if ids.shape[1:] != (layers, top_k):
        raise SpecmdError(
            f"{place}: expert_ids has shape {list(ids.shape)}, "
            f"expected [tokens, {layers}, {top_k}] (layers and top_k of its meta)"
        )
    for key in TEXT_KEYS:
        if not isinstance(meta[key], str):
            raise SpecmdError(f"{place}: meta key {key!r} is {meta[key]!r}, expected a string")
    return Trace(
        expert_ids=ids,
        lengths=lengths,
        prompt_lengths=np.zeros_like(lengths) if prompts is None else _small_integers(prompts, "prompt_lengths", place),
        experts=experts,
        expert_bytes=_expert_bytes(meta["expert_bytes"], layers, place),
        gates=arrays.get("gates"),
        logits=arrays.get("logits"),
        ahead=arrays.get("ahead"),
        meta={key: value for key, value in meta.items() if key not in DERIVED_KEYS},
    )


def shares(gates: npt.NDArray[Any], place: str) -> npt.NDArray[np.float32]:
    """Gives stored gates as float32."""
    if gates.dtype == np.uint8:
        return gates.astype(np.float32) / np.float32(255)
    if gates.dtype not in (np.float16, np.float32):
        raise SpecmdError(f"{place}: gates has dtype {gates.dtype}, expected uint8, float16 or float32")
    return gates.astype(np.float32)


def members_of(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    """Array -> zip member; none is missing and none is unknown."""
    members = {member.removesuffix(".npy"): member for member in archive.namelist()}
    for name in REQUIRED_ARRAYS:
        if name not in members:
            found = ", ".join(sorted(members)) or "nothing"
            raise SpecmdError(f"{path}: array {name!r} is missing (found: {found})")
    for name in members:
        if name not in REQUIRED_ARRAYS + OPTIONAL_ARRAYS:
            raise unknown(f"array in {path}", name, REQUIRED_ARRAYS + OPTIONAL_ARRAYS)
    return members


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    with open_archive(path, EXPECTED) as archive:
        members = members_of(archive, path)
        return {name: member_array(archive, archive.getinfo(entry), path) for name, entry in members.items()}


def _read_meta(array: npt.NDArray[Any], place: str) -> dict[str, Any]:
    if array.ndim != 0 or array.dtype.kind != "U":
        raise SpecmdError(f"{place}: meta is {array.dtype} of shape {list(array.shape)}, expected one JSON string")
    meta = parse_json(str(array), f"{place}: meta", constants=False)
    if not isinstance(meta, dict):
        raise SpecmdError(f"{place}: meta is a JSON {type(meta).__name__}, expected an object")
    for key in (*DERIVED_KEYS, *TEXT_KEYS, "requests"):
        if key not in meta:
            raise SpecmdError(f"{place}: meta key {key!r} is missing")
    if type(meta["format"]) is not int or meta["format"] != FORMAT:
        raise SpecmdError(f"{place}: meta key 'format' is {meta['format']!r}, expected {FORMAT}")
    return meta


def _small_integers(array: npt.NDArray[Any], name: str, place: str) -> npt.NDArray[np.int32]:
    """Gives per-request counts as int32, refusing what would wrap."""
    bad = np.flatnonzero((integers(array, name, 1, place) < 0) | (array > np.iinfo(np.int32).max))
    if bad.size:
        raise SpecmdError(f"{place}: request {bad[0]}: {name} is {array[bad[0]]}, expected 0 to 2^31 - 1")
    return array.astype(np.int32)


def _positive(value: Any, what: str, place: str) -> int:
    if type(value) is not int or value < 1:
        raise SpecmdError(f"{place}: {what} is {value!r}, expected an integer >= 1")
    return value


def _expert_bytes(value: Any, layers: int, place: str) -> npt.NDArray[np.int64]:
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers:
        raise SpecmdError(f"{place}: 'expert_bytes' has {len(values)} entries, expected {layers}, one per layer")
    for layer, item in enumerate(values):
        if _positive(item, f"expert_bytes of layer {layer}", place) > np.iinfo(np.int64).max:
            raise SpecmdError(f"{place}: expert_bytes of layer {layer} is {item}, expected less than 2^63")
    return np.array(values, np.int64)


# ---------------------------------------------------------------------------------------------------- writing


def save_trace(trace: Trace, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Validates ``trace`` and writes it; the same trace always gives the same bytes (with the same zlib).

    Nothing is lost: gates are stored as uint8 or float16 only where `load_trace` gives back the same float32. What
    ``trace.meta`` lacks of ``model``, ``source``, ``licence`` and ``capture`` is written as "unknown", ``requests`` as
    empty rows.

    Raises `SpecmdError` for an invalid trace, a meta that is no JSON, an existing file without ``overwrite``, or a
    failed write; the target then is as it was.
    """
    path = Path(path)
    validate(trace, f"{path} (to be written)")
    if os.path.exists(path) and not overwrite:
        raise SpecmdError(f"{path}: already exists, expected a new name (or overwrite)")
    arrays: dict[str, npt.NDArray[Any]] = {
        "expert_ids": _narrow(trace.expert_ids),
        "lengths": trace.lengths.astype(np.int32),
        "prompt_lengths": trace.prompt_lengths.astype(np.int32),
    }
    if trace.gates is not None:
        arrays["gates"] = _narrow_gates(trace.gates)
    if trace.logits is not None:
        arrays["logits"] = trace.logits
    if trace.ahead is not None:
        arrays["ahead"] = trace.ahead
    arrays["meta"] = np.array(meta_text(trace, path))
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            archive.writestr(member(name), npy_bytes(array), zipfile.ZIP_DEFLATED, compresslevel=9)


def meta_text(trace: Trace, path: Path) -> str:
    equal = (trace.expert_bytes == trace.expert_bytes[0]).all()
    derived: dict[str, Any] = {
        "format": FORMAT,
        "layers": trace.layers,
        "experts": int(trace.experts),
        "top_k": trace.top_k,
        "expert_bytes": int(trace.expert_bytes[0]) if equal else trace.expert_bytes.tolist(),
    }
    defaults = {**dict.fromkeys(TEXT_KEYS, "unknown"), "requests": [{} for _ in range(trace.requests)]}
    for key in TEXT_KEYS:
        if not isinstance(trace.meta.get(key, ""), str):
            raise SpecmdError(f"{path} (to be written): meta key {key!r} is {trace.meta[key]!r}, expected a string")
    try:
        return json.dumps({**defaults, **trace.meta, **derived}, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise SpecmdError(f"{path} (to be written): meta is not JSON: {error}") from error


def _narrow(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    low, high = int(ids.min()), int(ids.max())
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return ids.astype(dtype)
    return ids.astype(np.int64)


def _narrow_gates(gates: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    gates = gates.astype(np.float32)
    if gates.max() <= 1:
        shares = np.round(gates * np.float32(255)).astype(np.uint8)
        if (shares.astype(np.float32) / np.float32(255) == gates).all():
            return shares
    if gates.max() < np.finfo(np.float16).max:
        halves = gates.astype(np.float16)
        if (halves.astype(np.float32) == gates).all():
            return halves
    return gates


def member(name: str) -> zipfile.ZipInfo:
    """Gives a zip entry that says nothing of the day or the machine it was written on."""
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return buffer.getvalue()
