"""Traces that come with the package, and what a name stands for: one of them, or the path of a file."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path

from specmd_jax.errors import find, spelling, unknown
from specmd_jax.files import file_sha256
from specmd_jax.trace.file import load_trace
from specmd_jax.trace.select import first_tokens
from specmd_jax.types import Trace

BUNDLED: Mapping[str, str] = {
    "gpt-oss-20b": "gpt-oss-20b.npz",
    "bigmoe-qwen3-30b-a3b": "bigmoe-qwen3-30b-a3b.npz",
    "bigmoe-gpt-oss-120b": "bigmoe-gpt-oss-120b.npz",
    "specmd-reference": "specmd-reference.npz",
}
"""Traces that come with the package: name -> file in ``specmd_jax/trace/data``."""


def bundled(name: str = "gpt-oss-20b", tokens: int | None = None) -> Trace:
    """Loads a trace that comes with the package (`BUNDLED`, in any case), or its first `tokens` (see `first_tokens`).

    Raises `SpecmdError` for a name that is not there, or for less than one token.
    """
    with _file_of(find("bundled trace", name, BUNDLED)) as path:
        return _cut(load_trace(path), tokens)


def is_bundled(name: str) -> bool:
    """Whether a trace is a bundled one and not a file; raises `SpecmdError` for what looks like neither."""
    if spelling(name, BUNDLED) is not None:
        return True
    if not name or not (Path(name).suffix or os.path.exists(name)):
        raise unknown("trace", name, BUNDLED)
    return False


def load_named(name: str, tokens: int | None = None) -> tuple[Trace, str]:
    """Gives a bundled trace, or that of a file, or the first `tokens` of it, and the SHA-256 of the whole file.

    Raises `SpecmdError` as `is_bundled`, `load_trace` and `first_tokens` do.
    """
    known = find("trace", name, BUNDLED) if is_bundled(name) else None
    with contextlib.nullcontext(Path(name)) if known is None else _file_of(known) as path:
        return _cut(load_trace(path), tokens), file_sha256(path)


def _file_of(name: str) -> contextlib.AbstractContextManager[Path]:
    return importlib.resources.as_file(importlib.resources.files("specmd_jax.trace") / "data" / BUNDLED[name])


def _cut(trace: Trace, tokens: int | None) -> Trace:
    return trace if tokens is None else first_tokens(trace, tokens)
