"""``llamacpp-csv``: what llama.cpp's ``llama-moe-trace`` writes, a line ``layer,expert`` for each routed expert.

There is no token column: the lines of a layer are cut every K lines, K being that of the model, or given. A pass over
several tokens is prompt, one over a single token is decoding, and a pass over several tokens behind decoding begins
another request (files may be put together with ``cat``). What cannot be known: a prompt's last chunk of one token
counts as decoded, and prompts of one token go on with the request before. The order of the K ids is taken for falling
gate.

Where the tool read a prompt's ids past a strided view, they are the whole ranking of its first tokens and not the
experts of each: refused, or ``--strip ranking`` takes those prompts out.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.importers.common import read_text
from specmd_jax.trace.importers.joining import UNSAID, Sizes, join, top_k_of
from specmd_jax.trace.importers.meaning import Known
from specmd_jax.trace.importers.passes import Pass, Rows, layers_of, part_of, passes_of, tokens_of
from specmd_jax.trace.importers.peek import Peek
from specmd_jax.types import Trace

_LINE = re.compile(r"\s*\d{1,9}\s*,\s*\d{1,9}\s*")
_HEADER = re.compile(r'\s*"?layer"?\s*,\s*"?expert"?\s*', re.IGNORECASE)


def is_llamacpp(peek: Peek) -> bool:
    lines = peek.first_lines[1:] if peek.first_lines and _HEADER.fullmatch(peek.first_lines[0]) else peek.first_lines
    whole = lines[: len(lines) - 1] or lines  # the last one may be cut
    return bool(whole) and all(_LINE.fullmatch(line) for line in whole)


def import_llamacpp(path: str | os.PathLike[str], sizes: Sizes = UNSAID, strip: Collection[str] = ()) -> Trace:
    """Reads ``layer,expert`` lines; see the module. Raises `SpecmdError` with the file and the line."""
    path = Path(path)
    layer, expert, first = _columns(path)
    top_k = top_k_of(path, sizes)
    passes = passes_of(_visits(path, layer, expert, first, top_k))
    layers = layers_of(passes)
    requests = _requests(passes)
    parts = [part_of(mine, prompts, layers, top_k, {}) for mine, prompts in requests]
    meta = {
        "source": f"llama.cpp moe-trace {path.name}",
        "capture": f"layer,expert lines cut every {top_k}; ids in the order given",
    }
    known = Known(token_breaks=False, notes=layers.notes)
    return join(path, parts, sizes, meta | layers.meta, None, strip=strip, known=known)


def _columns(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Gives layers, experts and the number of the first line of them."""
    lines = read_text(path).splitlines()
    first = 2 if lines and _HEADER.fullmatch(lines[0]) else 1
    body = lines[first - 1 :]
    while body and not body[-1].strip():
        body.pop()
    if not body:
        raise SpecmdError(f"{path}: no lines, expected layer,expert")
    for number, line in enumerate(body, first):
        if not _LINE.fullmatch(line):
            raise SpecmdError(f"{path}, line {number}: {line[:60]!r}, expected layer,expert")
    table = np.loadtxt(body, delimiter=",", dtype=np.int64, ndmin=2)
    return table[:, 0], table[:, 1], first


def _visits(
    path: Path, layer: npt.NDArray[np.int64], expert: npt.NDArray[np.int64], first: int, top_k: int
) -> Iterator[tuple[int, Rows]]:
    edges = np.flatnonzero(np.diff(layer, prepend=-1, append=-1))
    for start, stop in itertools.pairwise(edges):
        if (stop - start) % top_k:
            raise SpecmdError(
                f"{path}, line {start + first}: {stop - start} lines of layer {layer[start]}, expected a multiple of "
                f"{top_k} (top_k)"
            )
        yield int(layer[start]), expert[start:stop].reshape(-1, top_k)


def _requests(passes: list[Pass]) -> list[tuple[list[Pass], int]]:
    """Cuts passes where a prompt follows decoding; gives each request's passes and how many are prompt."""
    several = [tokens_of(one) > 1 for one in passes]
    starts = [i for i in range(len(passes)) if i == 0 or (several[i] and not several[i - 1])]
    ends = [*starts[1:], len(passes)]
    return [(passes[start:end], sum(several[start:end])) for start, end in zip(starts, ends, strict=True)]
