"""A trace as the accesses of a cache, in the formats of other simulators.

An access is one expert that a pass demands at a layer, in the order of the contract "sequential" (CONTRACT.md section
1): by pass, by layer, by first position in token-major gate order. So a cache that takes one access after the other
hits as a replay of that contract does, without prefetching, in one global pool.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64, Shaped

from specmd_jax.errors import SpecmdError, find
from specmd_jax.files import whole_file
from specmd_jax.schedule.build import accesses
from specmd_jax.types import Trace

ORACLE_GENERAL = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""A record of libCacheSim's oracleGeneral, 24 bytes: time, object, its size, index of its next access (-1: none)."""

UNITS = ("experts", "bytes")


class Exported(NamedTuple):
    """What a file holds."""

    accesses: int
    objects: int
    largest: int  # size of an object, in its unit


def write_oracle_general(
    path: str | os.PathLike[str], flat: Shaped[np.ndarray, " n"], size: Shaped[np.ndarray, " n"] | int = 1
) -> None:
    """Writes accesses as libCacheSim's oracleGeneral, whole or not at all; time is their index.

    Args:
      flat: the object of each access.
      size: of each, or of all.
    Raises:
      SpecmdError: the file cannot be written, or a size or the number of accesses does not fit 32 bits.
    """
    limit = np.iinfo(np.uint32).max
    if flat.size > limit or np.max(size, initial=1) > limit:
        found = f"{flat.size} accesses" if flat.size > limit else f"a size of {np.max(size)}"
        raise SpecmdError(f"{path}: {found}, expected at most {limit}: oracleGeneral has 32 bits for it")
    rows = np.zeros(flat.size, ORACLE_GENERAL)
    rows["time"], rows["id"], rows["size"] = np.arange(flat.size), flat, size
    rows["next"] = next_accesses(flat)
    with whole_file(path) as file:
        file.write(rows.tobytes())


def read_oracle_general(path: str | os.PathLike[str]) -> npt.NDArray[np.void]:
    """Reads records of libCacheSim's oracleGeneral (`ORACLE_GENERAL`). Raises SpecmdError for another file."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SpecmdError(f"{path}: cannot read: {error.strerror or error}") from error
    if len(content) % ORACLE_GENERAL.itemsize:
        raise SpecmdError(f"{path}: {len(content)} bytes, expected a multiple of {ORACLE_GENERAL.itemsize}")
    return np.frombuffer(content, ORACLE_GENERAL)


def next_accesses(flat: Shaped[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Gives the index of the next access to the same object, or -1."""
    order = np.argsort(flat, kind="stable")
    after = np.full(flat.size, -1, np.int64)
    same = flat[order[1:]] == flat[order[:-1]]
    after[order[:-1][same]] = order[1:][same]
    return after


EXPORTERS: Mapping[str, tuple[Callable[..., None], str]] = {
    "oracle-general": (write_oracle_general, "libCacheSim's oracleGeneral, binary records of 24 bytes"),
}
"""Format name -> how accesses are written (path, objects, sizes), and what it is."""


def export_trace(
    trace: Trace,
    path: str | os.PathLike[str],
    fmt: str = "oracle-general",
    *,
    unit: str = "experts",
    batch: int = 1,
    prefill_chunk: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the accesses of a trace for another simulator.

    Args:
      trace: a valid trace (`specmd_jax.trace.validate`).
      fmt: a key of `EXPORTERS`.
      unit: of sizes: "experts", each 1, or "bytes", those of the layer's experts.
      batch, prefill_chunk: as in a replay.
    Raises:
      SpecmdError: an unknown format or unit, an option out of range, or a file that is there or cannot be written.
    """
    fmt, unit = find("export format", fmt, EXPORTERS), find("unit of sizes", unit, UNITS)
    if os.path.exists(path) and not overwrite:
        raise SpecmdError(f"{path}: already exists, expected a new name (or overwrite)")
    flat = accesses(trace, batch=batch, prefill_chunk=prefill_chunk)
    size = trace.expert_bytes[flat // trace.experts] if unit == "bytes" else np.ones(flat.size, np.int64)
    EXPORTERS[fmt][0](path, flat, size)
    return Exported(flat.size, np.unique(flat).size, int(size.max(initial=1)))
