"""Foreign trace formats: one file a format, and a line here adds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from specmd_jax.errors import unknown
from specmd_jax.trace.bigmoe import import_bigmoe, read_bigmoe
from specmd_jax.trace.fingerprint import import_fingerprint
from specmd_jax.types import Trace

__all__ = ["IMPORTERS", "import_bigmoe", "import_fingerprint", "import_trace", "read_bigmoe"]

IMPORTERS: Mapping[str, Callable[[str | os.PathLike[str]], Trace]] = {
    "bigmoe-csv": import_bigmoe,
    "gpt-oss-fingerprint": import_fingerprint,
}
"""Format name -> function from a path to a validated trace."""


def import_trace(path: str | os.PathLike[str], fmt: str) -> Trace:
    """Reads ``path`` in the foreign format ``fmt`` (a key of `IMPORTERS`)."""
    if fmt not in IMPORTERS:
        raise unknown("trace format", fmt, IMPORTERS)
    return IMPORTERS[fmt](path)
