"""Traces: the file format, foreign formats, and synthetic routing."""

from specmd_jax.trace.bundled import BUNDLED, bundled
from specmd_jax.trace.door import as_trace
from specmd_jax.trace.file import load_trace, save_trace
from specmd_jax.trace.importers.table import IMPORTERS, PROFILES, STRIPPABLE, import_trace, read_bigmoe, recognise
from specmd_jax.trace.select import first_tokens, select_requests
from specmd_jax.trace.synthetic import synthesize
from specmd_jax.trace.validate import validate

__all__ = [
    "BUNDLED",
    "IMPORTERS",
    "PROFILES",
    "STRIPPABLE",
    "as_trace",
    "bundled",
    "first_tokens",
    "import_trace",
    "load_trace",
    "read_bigmoe",
    "recognise",
    "save_trace",
    "select_requests",
    "synthesize",
    "validate",
]
