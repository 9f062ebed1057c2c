"""Shared settings: hypothesis draws the same examples everywhere, all workers share what one has compiled, and shapes
are checked at every call.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import shapes
from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("reproducible")

shapes.install()

# Most of the time of a run goes into compiling. The folder is new for each run: nothing that an earlier one compiled
# can pass for what this one compiles. Set before jax is imported, and inherited by xdist's workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="specmd-jax-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Nothing is cast or given an axis that the code does not write out."""
    import jax

    names = {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Compiles a module's programs as fast as can be: a GPU's kernels as plain operations are no program that anybody
    runs. None of them is left for other modules."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000


@pytest.fixture(autouse=True)
def room_for_programs() -> Iterator[None]:
    """Lets go of compiled programs before there are too many.

    Each takes a dozen memory maps or more, and Linux gives a process 65,530 of them: a worker that compiles what
    hundreds of tests ask for would die of a segmentation fault inside the compiler.
    """
    yield
    jax = sys.modules.get("jax")
    if jax is not None and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
