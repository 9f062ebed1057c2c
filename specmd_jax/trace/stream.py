"""A trace file by stretches of whole requests, for traces larger than memory.

`open_trace` reads the header and what there is of each request; `stretches` reads the arrays of tokens from beginning
to end, side by side, and keeps one stretch of them. Everything is checked as `load_trace` checks it, cells when
their stretch is read and checksums when the last one was. `save_stretches` writes such a file.
"""

from __future__ import annotations

import contextlib
import io
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

from specmd_jax.archives import Header, member_array, open_archive, read_header, reading, take
from specmd_jax.errors import SpecmdError
from specmd_jax.files import whole_file
from specmd_jax.inputs import allowance
from specmd_jax.trace.file import EXPECTED, assemble, member, members_of, meta_text, npy_bytes, shares
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

    Raises `SpecmdError` for what `load_trace` would find wrong without a look at the tokens.
    """
    path, place = Path(path), str(path)
    arrays: dict[str, npt.NDArray[Any]] = {}
    with open_archive(path, EXPECTED, whole=False) as archive:
        for name, entry in members_of(archive, path).items():
            info = archive.getinfo(entry)
            if name in OF_TOKENS:
                with reading(path, name), archive.open(info) as file:
                    header = read_header(file, info.file_size, name, place)
                arrays[name] = np.broadcast_to(np.zeros((), header.dtype), header.shape)
            else:
                _check_held(info, path)
                arrays[name] = member_array(archive, info, path)
    head = assemble(arrays, place)
    if head.gates is not None:
        kind = shares(np.zeros(0, head.gates.dtype), place).dtype
        head = replace(head, gates=np.broadcast_to(np.zeros((), kind), head.gates.shape))
    validate_shapes(head, place)
    cut = head if tokens is None else first_tokens(head, tokens)
    return TraceFile(path, cut, whole=cut is head)


def unpacked_bytes(path: str | os.PathLike[str]) -> int:
    """Gives the bytes that the arrays of a trace file take in memory, gates as they are stored."""
    with open_archive(path, EXPECTED, whole=False) as archive:
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
        archive = stack.enter_context(open_archive(path, EXPECTED, whole=False))
        members = members_of(archive, path)
        streams: dict[str, IO[bytes]] = {}
        kinds: dict[str, Header] = {}
        for name in names:
            with reading(path, name):
                streams[name], kinds[name] = _rows_of(archive, members[name], name, path, stack)
        for first, last in pairwise(cuts(head.lengths, most_tokens or file.stretch_tokens)):
            lengths = head.lengths[first:last]
            tokens = int(lengths.sum(dtype=np.int64))
            cells: dict[str, npt.NDArray[Any] | None] = dict.fromkeys(OF_TOKENS)
            for name, stream in streams.items():
                shape = (tokens, *kinds[name].shape[1:])
                with reading(path, name):
                    cells[name] = take(stream, kinds[name]._replace(shape=shape))
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


def _rows_of(
    archive: zipfile.ZipFile, entry: str, name: str, path: Path, stack: contextlib.ExitStack
) -> tuple[IO[bytes], Header]:
    """Opens an array of tokens at its first one. In Fortran order tokens lie apart: such an array is read whole."""
    info = archive.getinfo(entry)
    stream = stack.enter_context(archive.open(info))
    header = read_header(stream, info.file_size, name, str(path))
    if not header.fortran:
        return stream, header
    _check_held(info, path)
    array = member_array(archive, info, path)
    return io.BytesIO(array.tobytes()), Header(array.shape, array.dtype, fortran=False)


def _check_held(info: zipfile.ZipInfo, path: Path) -> None:
    """Raises `SpecmdError` for a member that is too large to be held in memory."""
    if info.file_size > allowance(path.stat().st_size):
        raise SpecmdError(
            f"{path}: {info.filename} unpacks to {info.file_size} bytes, expected at most "
            f"{allowance(path.stat().st_size)} of a file of this size"
        )


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
    if os.path.exists(path) and not overwrite:
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
