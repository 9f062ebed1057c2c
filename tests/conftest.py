"""Shared settings: hypothesis draws the same examples everywhere, and all workers share what one has compiled."""

from __future__ import annotations

import os
import tempfile

from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("reproducible")

# Most of the time of a run goes into compiling. The folder is new for each run: nothing that an earlier one compiled
# can pass for what this one compiles. Set before jax is imported, and inherited by xdist's workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="specmd-jax-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
