"""A trace file by stretches of whole requests, for traces larger than memory.

`open_trace` reads the header and what there is of each request; `stretches` reads the arrays of tokens from beginning
to end, side by side, and keeps one stretch of them. Everything is checked as `load_trace` checks it, cells when
their stretch is read and checksums when the last one was. `save_stretches` writes such a file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.files import whole_file
from specmd_jax.trace.file import assemble, check_zip, member, members_of, meta_text, npy_bytes, reading, shares
from specmd_jax.trace.select import PER_REQUEST, first_tokens
from specmd_jax.trace.validate import validate, validate_cells, validate_shapes
from specmd_jax.types import Trace

OF_TOKENS = ("expert_ids", "gates", "logits", "ahead")
"""Arrays with a row per token."""

STRETCH_CELLS = 1 << 22
"""Tokens x layers x experts of a stretch, unless told otherwise: some 100 MB, whatever the model."""

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class TraceFile:
    """An opened trace file. Its arrays of tokens are read by `stretches`."""

    path: Path
    head: Trace  # the whole trace, but its arrays of tokens have only their shapes: every entry is 0, none takes memory
    whole: bool = True  # False: the file has more tokens

    @property
    def stretch_tokens(self) -> int:
        """Tokens of a stretch of usual size."""
        return max(1, STRETCH_CELLS // (self.head.layers * self.head.experts))


def open_trace(path: str | os.PathLike[str], tokens: int | None = None) -> TraceFile:
    """Opens a trace file, or its first `tokens` (as `first_tokens` cuts them).

    Raises `SpecmdError` for what `load_trace` would find wrong without a look at the tokens, and for arrays in
    Fortran order, in which tokens do not lie one after the other.
    """
    path, place = Path(path), str(path)
    check_zip(path)
    arrays: dict[str, npt.NDArray[Any]] = {}
    with reading(path, "its directory"), zipfile.ZipFile(path) as archive:
        for name, entry in members_of(archive, path).items():
            with reading(path, name), archive.open(entry) as file:
                if name in OF_TOKENS:
                    shape, dtype = _header(file, name, path)
                    arrays[name] = np.broadcast_to(np.zeros((), dtype), shape)
                else:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    head = assemble(arrays, place)
    if head.gates is not None:
        kind = shares(np.zeros(0, head.gates.dtype), place).dtype
        head = replace(head, gates=np.broadcast_to(np.zeros((), kind), head.gates.shape))
    validate_shapes(head, place)
    cut = head if tokens is None else first_tokens(head, tokens)
    return TraceFile(path, cut, whole=cut is head)


def unpacked_bytes(path: str | os.PathLike[str]) -> int:
    """Gives the bytes that the arrays of a trace file take in memory, gates as they are stored."""
    check_zip(Path(path))
    with reading(Path(path), "its directory"), zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def cuts(lengths: npt.NDArray[np.integer[Any]], most_tokens: int) -> list[int]:
    """Requests that begin a stretch, and their number: stretches of at most so many tokens, or of one request."""
    if most_tokens < 1:
        raise SpecmdError(f"tokens of a stretch is {most_tokens}, expected at least 1")
    ends = np.cumsum(lengths, dtype=np.int64)
    found = [0]
    while found[-1] < lengths.size:
        begin = int(ends[found[-1]] - lengths[found[-1]])
        found.append(max(found[-1] + 1, int(np.searchsorted(ends, begin + most_tokens, side="right"))))
    return found


def stretches(file: TraceFile, most_tokens: int | None = None, arrays: Collection[str] = ("gates",)) -> Iterator[Trace]:
    """Gives valid traces of at most `most_tokens` tokens, or of one longer request, which make up the file one by one.

    `arrays` names the optional arrays that are read if the file has them; the others are left out unseen. Of the rows
    of `meta` per request only the accepted counts are kept. Raises `SpecmdError` as `load_trace` does, naming requests
    as they are numbered in the file.
    """
    head, path = file.head, file.path
    names = ["expert_ids", *(name for name in OF_TOKENS[1:] if name in arrays and getattr(head, name) is not None)]
    meta, accepted = {key: v for key, v in head.meta.items() if key not in PER_REQUEST}, head.meta.get("accepted")
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members, streams, kinds = members_of(archive, path), {}, {}
        for name in names:
            with reading(path, name):
                streams[name] = stack.enter_context(archive.open(members[name]))
                kinds[name] = _header(streams[name], name, path)
        for first, last in pairwise(cuts(head.lengths, most_tokens or file.stretch_tokens)):
            lengths = head.lengths[first:last]
            tokens = int(lengths.sum(dtype=np.int64))
            cells: dict[str, npt.NDArray[Any] | None] = dict.fromkeys(OF_TOKENS)
            for name, stream in streams.items():
                shape, dtype = kinds[name]
                with reading(path, name):
                    cells[name] = _take(stream, (tokens, *shape[1:]), dtype)
            gates = cells.pop("gates")
            trace = replace(
                head,
                lengths=lengths,
                prompt_lengths=head.prompt_lengths[first:last],
                gates=None if gates is None else shares(gates, str(path)),
                meta=meta if accepted is None else {**meta, "accepted": accepted[first:last]},
                **cells,
            )
            validate_cells(trace, str(path), first_request=first)
            yield trace
        for name, stream in streams.items() if file.whole else ():
            with reading(path, name):
                while stream.read(_READ_BYTES):  # the checksum is compared at the very end
                    pass


def _header(file: IO[bytes], name: str, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array that begins here; `file` then stands at its first byte."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise SpecmdError(f"{path}: array {name!r} is of .npy version {version}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise SpecmdError(f"{path}: array {name!r} holds a pickled object, expected plain numbers")
    if fortran and len(shape) > 1:
        raise SpecmdError(f"{path}: array {name!r} is in Fortran order, expected C order for a trace that is streamed")
    return shape, dtype


def _take(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Gives the next entries of an array."""
    array = np.empty(shape, dtype)
    flat = array.reshape(-1).view(np.uint8)
    at = 0
    while at < flat.size:
        part = stream.read(min(_READ_BYTES, flat.size - at))
        if not part:
            raise EOFError("it ends before its last token")
        flat[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    return array


def save_stretches(
    parts: Iterable[Trace], path: str | os.PathLike[str], overwrite: bool = False, compress: bool = True
) -> None:
    """Writes the traces `parts`, one after the other, as one trace file; holds one of them at a time.

    Models, `meta` and types are those of the first one (its rows per request and accepted counts are left out), and all
    have its arrays.
    Raises `SpecmdError` for an invalid part or one that does not go with the first, an existing file without
    `overwrite`, or a failed write; the target then is as it was.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise SpecmdError(f"{path}: already exists, expected a new name (or overwrite)")
    scratch = {name: path.with_name(f".{path.name}.{os.getpid()}.{name}.tmp") for name in OF_TOKENS}
    lengths: list[npt.NDArray[np.int32]] = []
    prompts: list[npt.NDArray[np.int32]] = []
    head: Trace | None = None
    try:
        with contextlib.ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            for number, part in enumerate(parts):
                place = f"{path} (to be written), part {number}"
                validate(part, place)
                if head is None:
                    meta = {key: value for key, value in part.meta.items() if key not in PER_REQUEST}
                    head = replace(part, **{name: _rows(part, name, 0) for name in OF_TOKENS}, meta=meta)
                for name in OF_TOKENS:
                    array, first = getattr(part, name), getattr(head, name)
                    if _kind(array) != _kind(first) or part.experts != head.experts:
                        raise SpecmdError(f"{place}: {name} is {_kind(array)}, expected {_kind(first)} as in part 0")
                    if array is not None:
                        if name not in files:
                            files[name] = stack.enter_context(scratch[name].open("wb"))
                        files[name].write(np.ascontiguousarray(array).data)
                lengths.append(part.lengths.astype(np.int32))
                prompts.append(part.prompt_lengths.astype(np.int32))
        if head is None:
            raise SpecmdError(f"{path} (to be written): no part, expected at least one")
        head = replace(head, lengths=np.concatenate(lengths), prompt_lengths=np.concatenate(prompts))
        _pack(path, head, scratch, meta_text(head, path), compress)
    except OSError as error:
        raise SpecmdError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        for left in scratch.values():
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


def _rows(trace: Trace, name: str, count: int) -> npt.NDArray[Any] | None:
    array = getattr(trace, name)
    return None if array is None else array[:count]


def _kind(array: npt.NDArray[Any] | None) -> str:
    return "absent" if array is None else f"{array.dtype} [tokens, {', '.join(map(str, array.shape[1:]))}]"


def _pack(path: Path, head: Trace, scratch: dict[str, Path], meta: str, compress: bool) -> None:
    tokens = int(head.lengths.sum(dtype=np.int64))
    small: Sequence[tuple[str, npt.NDArray[Any]]] = (
        ("lengths", head.lengths),
        ("prompt_lengths", head.prompt_lengths),
        ("meta", np.array(meta)),
    )
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name in OF_TOKENS:
            array = getattr(head, name)
            if array is None:
                continue
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False}
            entry = member(name)
            entry.compress_type = kind
            with archive.open(entry, "w", force_zip64=True) as target, scratch[name].open("rb") as source:
                np.lib.format.write_array_header_1_0(target, {**header, "shape": (tokens, *array.shape[1:])})
                shutil.copyfileobj(source, target, _READ_BYTES)
            scratch[name].unlink()
        for name, array in small:
            archive.writestr(member(name), npy_bytes(array), zipfile.ZIP_DEFLATED)
