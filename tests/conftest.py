"""Shared settings: hypothesis draws the same examples everywhere, programs are compiled quickly and once for all
workers, and shapes are checked at every call.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import shapes
from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("reproducible")

shapes.install()

# Most of the time of a run goes into compiling, and most of that into making programs fast that run for milliseconds.
# `tests/test_optimized.py` compiles as users do. What the environment says comes last, so it wins: a run with
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" tests optimized programs throughout.
# Where there is a GPU, its programs are what is tested.
if "PYTEST_XDIST_WORKER" not in os.environ and not any(Path("/dev").glob("nvidia[0-9]*")):
    _quick = ["--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):  # later ones do not know it, and end
        _quick.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*_quick, os.environ.get("XLA_FLAGS", "")])

# The folder is new for each run: nothing that an earlier one compiled can pass for what this one compiles. Both are set
# before jax is imported, and inherited by xdist's workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="specmd-jax-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `long`, unless ``-m`` names it."""
    if "long" in str(config.getoption("-m")):
        return
    left = [item for item in items if item.get_closest_marker("long") is not None]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


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
