"""The trace file: one compressed ``.npz`` a trace, read and written without pickle.

Arrays of a file (axis letters: `specmd_jax.types`)::

    expert_ids      [N, L, K]  unsigned or signed integer, by falling gate; -1: no expert there (a skipped layer)
    lengths         [R]        integer, tokens of each request; they sum to N
    prompt_lengths  [R]        integer, optional (absent: all 0, decode only)
    gates           [N, L, K]  optional; uint8 holds round(share * 255), float16 and float32 the share itself
    logits          [N, L, E]  optional float, the router's full logits
    ahead           [N, L, E]  optional float, the gate of layer l+1 on the activations of layer l, as probabilities
    meta            []         a JSON object as a string

Keys of ``meta``: ``format`` (1), ``model``, ``layers``, ``experts``, ``top_k``, ``expert_bytes`` (one integer, or a
list, one a layer), ``source``, ``licence``, ``capture`` (notes on how it was recorded) and ``requests`` (a list with an
object a request). Further keys are kept. In memory, `Trace.meta` leaves out the `DERIVED_KEYS`, which the arrays say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import io
import json
import os
import struct
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError, find, unknown
from specmd_jax.files import file_sha256, whole_file
from specmd_jax.types import Trace

FORMAT = 1
REQUIRED_ARRAYS = ("expert_ids", "lengths", "meta")
OPTIONAL_ARRAYS = ("prompt_lengths", "gates", "logits", "ahead")
DERIVED_KEYS = ("format", "layers", "experts", "top_k", "expert_bytes")
TEXT_KEYS = ("model", "source", "licence", "capture")

BUNDLED: Mapping[str, str] = {
    "gpt-oss-20b": "gpt-oss-20b.npz",
    "bigmoe-qwen3-30b-a3b": "bigmoe-qwen3-30b-a3b.npz",
    "bigmoe-gpt-oss-120b": "bigmoe-gpt-oss-120b.npz",
}
"""Traces that come with the package: name -> file in ``specmd_jax/trace/data``."""

BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,  # a compression method that zipfile does not know
    OverflowError,
    RuntimeError,  # an encrypted member
    SyntaxError,  # an array header that is no literal
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise on a damaged file."""

_BLOCK = 1 << 16  # tokens checked at once: bounds the temporaries of a trace of millions of tokens
_VALID: weakref.WeakValueDictionary[int, Trace] = weakref.WeakValueDictionary()  # by id: traces that passed `validate`


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
    """The trace that the arrays of a file make up, its gates as they are stored; looks into no array of tokens."""
    meta = _read_meta(arrays["meta"], place)
    ids = _integers(arrays["expert_ids"], "expert_ids", 3, place)
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
    """Stored gates as float32."""
    if gates.dtype == np.uint8:
        return gates.astype(np.float32) / np.float32(255)
    if gates.dtype not in (np.float16, np.float32):
        raise SpecmdError(f"{place}: gates has dtype {gates.dtype}, expected uint8, float16 or float32")
    return gates.astype(np.float32)


def bundled(name: str = "gpt-oss-20b") -> Trace:
    """A trace that comes with the package (`BUNDLED`), its name in any case."""
    name = find("bundled trace", name, BUNDLED)
    with importlib.resources.as_file(_resource(name)) as path:
        return load_trace(path)


def _resource(name: str) -> Traversable:
    return importlib.resources.files("specmd_jax.trace") / "data" / BUNDLED[name]


def is_bundled(name: str) -> bool:
    """Whether a trace is a bundled one and not a file; raises SpecmdError for what looks like neither."""
    try:
        find("trace", name, BUNDLED)
    except SpecmdError:
        if name and (Path(name).suffix or os.path.exists(name)):
            return False
        raise
    return True


def load_named(name: str) -> tuple[Trace, str]:
    """A bundled trace, or that of a file, and the SHA-256 of the file; raises SpecmdError as `is_bundled` does."""
    if not is_bundled(name):
        return load_trace(name), file_sha256(name)
    with importlib.resources.as_file(_resource(find("trace", name, BUNDLED))) as path:
        return load_trace(path), file_sha256(path)


def check_zip(path: Path) -> None:
    """Raises `SpecmdError` for a file that is not there, cannot be read or is no whole zip."""
    if not path.exists():
        raise SpecmdError(f"{path}: no such file")
    if not path.is_file():
        raise SpecmdError(f"{path}: not a file, expected a trace file (.npz)")
    try:
        is_zip = zipfile.is_zipfile(path)
        with open(path, "rb") as file:
            starts_as_zip = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise SpecmdError(f"{path}: cannot read: {error.strerror or error}") from error
    if not is_zip:
        raise SpecmdError(
            f"{path}: " + ("truncated zip" if starts_as_zip else "not a zip, expected a trace file (.npz)")
        )


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


@contextlib.contextmanager
def reading(path: Path, name: str) -> Iterator[None]:
    """Gives what numpy and zipfile raise on a damaged array one line."""
    try:
        yield
    except SpecmdError:
        raise
    except BROKEN as error:
        if "allow_pickle" in str(error):
            raise SpecmdError(f"{path}: array {name!r} holds a pickled object, expected plain numbers") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpecmdError(f"{path}: damaged file: cannot read {name!r}: {reason}") from error


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    check_zip(path)
    arrays: dict[str, npt.NDArray[Any]] = {}
    with reading(path, "its directory"), zipfile.ZipFile(path) as archive:
        for name, member in members_of(archive, path).items():
            with reading(path, name):
                # Through memory: read() checks the CRC of the whole member before anything is parsed.
                arrays[name] = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
    return arrays


def _read_meta(array: npt.NDArray[Any], place: str) -> dict[str, Any]:
    if array.ndim != 0 or array.dtype.kind != "U":
        raise SpecmdError(f"{place}: meta is {array.dtype} of shape {list(array.shape)}, expected one JSON string")
    try:
        meta = json.loads(str(array), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SpecmdError(f"{place}: meta is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise SpecmdError(f"{place}: meta is a JSON {type(meta).__name__}, expected an object")
    for key in (*DERIVED_KEYS, *TEXT_KEYS, "requests"):
        if key not in meta:
            raise SpecmdError(f"{place}: meta key {key!r} is missing")
    if type(meta["format"]) is not int or meta["format"] != FORMAT:
        raise SpecmdError(f"{place}: meta key 'format' is {meta['format']!r}, expected {FORMAT}")
    return meta


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _integers(array: npt.NDArray[Any], name: str, rank: int, place: str) -> npt.NDArray[Any]:
    if array.ndim != rank:
        raise SpecmdError(f"{place}: {name} has shape {list(array.shape)}, expected {rank} dimension{'s' * (rank > 1)}")
    if array.dtype.kind not in "iu":
        raise SpecmdError(f"{place}: {name} has dtype {array.dtype}, expected integers")
    return array


def _small_integers(array: npt.NDArray[Any], name: str, place: str) -> npt.NDArray[np.int32]:
    """Per-request counts as int32, refusing what would wrap."""
    bad = np.flatnonzero((_integers(array, name, 1, place) < 0) | (array > np.iinfo(np.int32).max))
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
        raise SpecmdError(f"{place}: 'expert_bytes' has {len(values)} entries, expected {layers}, one a layer")
    for layer, item in enumerate(values):
        if _positive(item, f"expert_bytes of layer {layer}", place) > np.iinfo(np.int64).max:
            raise SpecmdError(f"{place}: expert_bytes of layer {layer} is {item}, expected less than 2^63")
    return np.array(values, np.int64)


# ------------------------------------------------------------------------------------------------- validation


def validate(trace: Trace, place: str = "trace") -> None:
    """Checks a trace; raises `SpecmdError` naming ``place`` and the first bad request, token (in its request), layer.

    Checked: shapes, ranks and dtypes; ids in 0..E-1 or -1; no expert twice for a token at a layer; lengths that are
    positive and sum to N; prompts no longer than their request; gates finite and not negative; logits and ahead not NaN
    (-inf is allowed: a router may mask experts); expert bytes above 0; a meta row a request.
    """
    validate_shapes(trace, place)
    validate_cells(trace, place)
    _VALID[id(trace)] = trace


def is_valid(trace: Trace) -> bool:
    """Whether `validate` has passed this very object; changes of its arrays since then go unseen."""
    return _VALID.get(id(trace)) is trace


def validate_cells(trace: Trace, place: str, first_request: int = 0) -> None:
    """The part of `validate` that looks at every token; requests are named from `first_request` on."""
    for start in range(0, trace.tokens, _BLOCK):
        _check_block(trace, start, min(start + _BLOCK, trace.tokens), place, first_request)


def validate_shapes(trace: Trace, place: str) -> None:
    """The part of `validate` that looks into no array of tokens."""
    _check_types(trace, place)
    ids = _integers(trace.expert_ids, "expert_ids", 3, place)
    tokens, layers, top_k = ids.shape
    for name, axis in (("tokens", tokens), ("layers", layers), ("top_k", top_k), ("experts", trace.experts)):
        if axis < 1:
            raise SpecmdError(f"{place}: the trace has {axis} {name}, expected at least 1")
    if top_k > trace.experts:
        raise SpecmdError(f"{place}: top_k is {top_k} with {trace.experts} experts, expected no more")
    _check_requests(trace, place)
    sizes = trace.expert_bytes
    if sizes.shape != (layers,) or sizes.dtype.kind not in "iu":
        raise SpecmdError(
            f"{place}: expert_bytes is {sizes.dtype} of shape {list(sizes.shape)}, expected {layers} integers"
        )
    for layer in np.flatnonzero(trace.expert_bytes < 1)[:1]:
        raise SpecmdError(f"{place}: expert_bytes of layer {layer} is {sizes[layer]}, expected an integer >= 1")
    for name, array in (("gates", trace.gates), ("logits", trace.logits), ("ahead", trace.ahead)):
        if array is None:
            continue
        expected = (tokens, layers, top_k if name == "gates" else trace.experts)
        if array.shape != expected:
            raise SpecmdError(f"{place}: {name} has shape {list(array.shape)}, expected {list(expected)}")
        if array.dtype.kind != "f":
            raise SpecmdError(f"{place}: {name} has dtype {array.dtype}, expected floats")


def _check_types(trace: Trace, place: str) -> None:
    for field in dataclasses.fields(trace):
        value = getattr(trace, field.name)
        if field.name == "experts":
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise SpecmdError(f"{place}: experts is {value!r}, expected an integer")
        elif field.name == "meta":
            if not isinstance(value, dict):
                raise SpecmdError(f"{place}: meta is of type {type(value).__name__}, expected a dict")
        elif not isinstance(value, np.ndarray) and not (value is None and field.default is None):
            raise SpecmdError(f"{place}: {field.name} is of type {type(value).__name__}, expected a numpy array")


def _check_requests(trace: Trace, place: str) -> None:
    for name, array in (("lengths", trace.lengths), ("prompt_lengths", trace.prompt_lengths)):
        _integers(array, name, 1, place)
    if not trace.requests:
        raise SpecmdError(f"{place}: lengths is empty, expected at least one request")
    if trace.prompt_lengths.shape != trace.lengths.shape:
        raise SpecmdError(
            f"{place}: prompt_lengths has {trace.prompt_lengths.shape[0]} entries, "
            f"expected {trace.requests} (one a request, as lengths)"
        )
    for request in np.flatnonzero(trace.lengths < 1)[:1]:
        raise SpecmdError(f"{place}: request {request}: length is {trace.lengths[request]}, expected at least 1")
    total = int(trace.lengths.sum(dtype=np.int64))
    if total != trace.tokens:
        raise SpecmdError(f"{place}: lengths sum to {total}, expected {trace.tokens} (the tokens of expert_ids)")
    for request in np.flatnonzero((trace.prompt_lengths < 0) | (trace.prompt_lengths > trace.lengths))[:1]:
        raise SpecmdError(
            f"{place}: request {request}: prompt_length is {trace.prompt_lengths[request]}, "
            f"expected 0 to its length {trace.lengths[request]}"
        )
    rows = trace.meta.get("requests")
    if rows is None:
        return
    if not isinstance(rows, list) or len(rows) != trace.requests:
        found = f"{len(rows)} rows" if isinstance(rows, list) else repr(rows)
        raise SpecmdError(f"{place}: meta key 'requests' has {found}, expected a list of {trace.requests} rows")
    for request, row in enumerate(rows):
        if not isinstance(row, dict):
            raise SpecmdError(f"{place}: meta row of request {request} is {row!r}, expected an object")


def _check_block(trace: Trace, start: int, stop: int, place: str, first_request: int) -> None:
    """Checks the cells of tokens start..stop-1."""

    def where(token: int, layer: int) -> str:
        return _where(trace, start + token, layer, place, first_request)

    ids = trace.expert_ids[start:stop]
    bad = (ids < -1) | (ids >= trace.experts)
    if bad.any():
        token, layer, slot = _first(bad)
        found = ids[token, layer, slot]
        hint = "; ids count from 0" if found == trace.experts else ""
        raise SpecmdError(
            f"{where(token, layer)}: expert id is {found}, expected 0 to {trace.experts - 1}, or -1 for none{hint}"
        )
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        token, layer, slot = _first(twice)
        raise SpecmdError(
            f"{where(token, layer)}: expert {ordered[token, layer, slot]} appears twice, expected distinct experts"
        )
    if trace.gates is not None:
        gates = trace.gates[start:stop]
        bad = ~(np.isfinite(gates) & (gates >= 0))
        if bad.any():
            token, layer, slot = _first(bad)
            raise SpecmdError(
                f"{where(token, layer)}: gate is {gates[token, layer, slot]}, expected a finite number >= 0"
            )
    for name, array in (("logits", trace.logits), ("ahead", trace.ahead)):
        if array is None:
            continue
        bad = np.isnan(array[start:stop])
        if bad.any():
            token, layer, expert = _first(bad)
            raise SpecmdError(f"{where(token, layer)}: {name} of expert {expert} is NaN, expected a number")


def _first(bad: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    token, layer, last = np.unravel_index(int(bad.argmax()), bad.shape)
    return int(token), int(layer), int(last)


def _where(trace: Trace, token: int, layer: int, place: str, first_request: int) -> str:
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    request = int(np.searchsorted(ends, token, side="right"))
    position = token - (ends[request] - trace.lengths[request])
    return f"{place}: request {first_request + request}, token {position}, layer {layer}"


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
    if path.exists() and not overwrite:
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
    """A zip entry that says nothing of the day or the machine it was written on."""
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- slicing


def select_requests(trace: Trace, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Trace:
    """The given requests in the given order, each whole."""
    chosen = np.asarray(indices)
    if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "iu":
        raise SpecmdError(f"requests to select are {indices!r}, expected a list of at least one index")
    for request in chosen[(chosen < 0) | (chosen >= trace.requests)][:1]:
        raise SpecmdError(f"request to select is {request}, expected 0 to {trace.requests - 1}")
    lengths = trace.lengths[chosen]
    starts = (np.cumsum(trace.lengths, dtype=np.int64) - trace.lengths)[chosen]
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    rows = np.repeat(starts - begins, lengths) + np.arange(lengths.sum(dtype=np.int64))
    meta = dict(trace.meta)
    if "requests" in meta:
        meta["requests"] = [meta["requests"][request] for request in chosen]
    return dataclasses.replace(
        take_tokens(trace, rows), lengths=lengths, prompt_lengths=trace.prompt_lengths[chosen], meta=meta
    )


def first_tokens(trace: Trace, n: int) -> Trace:
    """The first ``n`` tokens: whole requests, the last one cut where they end. A trace with no more stays as it is."""
    if n < 1:
        raise SpecmdError(f"tokens to keep is {n}, expected at least 1")
    if n >= trace.tokens:
        return trace
    ends = np.cumsum(trace.lengths, dtype=np.int64)
    requests = int(np.searchsorted(ends, n)) + 1
    lengths = trace.lengths[:requests].copy()
    lengths[-1] -= ends[requests - 1] - n
    meta = dict(trace.meta)
    if "requests" in meta:
        meta["requests"] = meta["requests"][:requests]
    prompts = np.minimum(trace.prompt_lengths[:requests], lengths)
    return dataclasses.replace(take_tokens(trace, slice(0, n)), lengths=lengths, prompt_lengths=prompts, meta=meta)


def take_tokens(trace: Trace, rows: slice | npt.NDArray[Any]) -> Trace:
    """The rows ([N] mask, indices or slice) of every per-token array; lengths and meta stay as they are."""

    def cut(array: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        return None if array is None else array[rows]

    return dataclasses.replace(
        trace,
        expert_ids=trace.expert_ids[rows],
        gates=cut(trace.gates),
        logits=cut(trace.logits),
        ahead=cut(trace.ahead),
    )
