"""What a replay takes as a trace: an object, an opened file, the name of a bundled trace or a path."""

from __future__ import annotations

import os
from typing import TypeAlias, overload

from specmd_jax.errors import SpecmdError
from specmd_jax.trace.bundled import bundled, is_bundled
from specmd_jax.trace.file import load_trace
from specmd_jax.trace.stream import TraceFile
from specmd_jax.trace.validate import is_valid, validate
from specmd_jax.types import Trace

Source: TypeAlias = "Trace | TraceFile | str | os.PathLike[str]"
"""What is accepted for a trace."""


@overload
def as_trace(source: TraceFile) -> TraceFile: ...
@overload
def as_trace(source: Trace | str | os.PathLike[str]) -> Trace: ...
@overload
def as_trace(source: Source) -> Trace | TraceFile: ...
def as_trace(source: Source) -> Trace | TraceFile:
    """Gives a valid trace from what a caller hands in.

    A `Trace` is checked as `validate` does, all of it, the first time that it is handed in; the verdict is kept as long
    as the object lives. So its arrays must not be changed afterwards: make another trace with `dataclasses.replace`. A
    `TraceFile` was checked when it was opened, and its tokens are checked as they are read. A string is the name of a
    bundled trace (in any case) or the path of a trace file, which is read whole.

    Raises `SpecmdError` for an invalid trace (naming the first bad place), for a file that cannot be read and for
    anything else.
    """
    if isinstance(source, Trace):
        if not is_valid(source):
            validate(source)
        return source
    if isinstance(source, TraceFile):
        return source
    if isinstance(source, str):
        return bundled(source) if is_bundled(source) else load_trace(source)
    if isinstance(source, os.PathLike):
        return load_trace(source)
    raise SpecmdError(
        f"trace is {_kind(source)}, expected a Trace, an opened trace file, the name of a bundled trace or a path"
    )


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
