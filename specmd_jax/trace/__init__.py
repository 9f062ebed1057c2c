"""Traces: the file format, foreign formats, and synthetic routing."""

from specmd_jax.trace.door import as_trace
from specmd_jax.trace.importers.table import IMPORTERS, import_trace, read_bigmoe
from specmd_jax.trace.store import (
    BUNDLED,
    bundled,
    first_tokens,
    load_trace,
    save_trace,
    select_requests,
    validate,
)
from specmd_jax.trace.synthetic import synthesize

__all__ = [
    "BUNDLED",
    "IMPORTERS",
    "as_trace",
    "bundled",
    "first_tokens",
    "import_trace",
    "load_trace",
    "read_bigmoe",
    "save_trace",
    "select_requests",
    "synthesize",
    "validate",
]
