"""Traces: the file format, foreign formats, synthetic routing, and the schedule that a replay scans over."""

from specmd_jax.trace.importers import IMPORTERS, import_trace, read_bigmoe
from specmd_jax.trace.schedule import CONTRACTS, PHASES, build_schedule
from specmd_jax.trace.store import (
    BUNDLED,
    bundled,
    first_tokens,
    load_trace,
    save_trace,
    select_requests,
    sha256,
    validate,
)
from specmd_jax.trace.synthetic import synthesize

__all__ = [
    "BUNDLED",
    "CONTRACTS",
    "IMPORTERS",
    "PHASES",
    "build_schedule",
    "bundled",
    "first_tokens",
    "import_trace",
    "load_trace",
    "read_bigmoe",
    "save_trace",
    "select_requests",
    "sha256",
    "synthesize",
    "validate",
]
