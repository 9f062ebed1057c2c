"""What `experiments.doctor` looks at: one row for each thing, "ok", "note" or "wrong"."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from experiments.common.command_line import cache_folder

OK, NOTE, WRONG = "ok", "note", "wrong"
NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "jaxtyping", "numpy", "numba", "matplotlib")
OPTIONAL = {
    "tokenizers": "text prompts of offload",
    "torch": "capture, and copy rates beside torch's",
    "transformers": "capture",
    "pandas": "results as data frames",
    "pyarrow": "results as Parquet files",
    "libcachesim": "benchmark: the replays beside it",
    "moe_policylang": "benchmark: the replays beside it",
    "accelerate": "bench_offload: its cpu_offload",
}
BAD_JAX = {"0.11.1": "it copies whole buffers inside loops: the scan is many times slower"}
"""Versions of JAX that are known to be bad, and why."""

Row = dict[str, str]


def examined(out: Path) -> list[Row]:
    """Gives what was found; `out` is where results would go."""
    return [*_packages(), *_together(), *_devices(), *_memory(), *_caches(), _writable(out), *_optional()]


def _row(what: str, state: str, found: str) -> Row:
    return {"what": what, "state": state, "found": found}


def version_of(package: str) -> str | None:
    """Gives the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Row]:
    from specmd_jax import __version__

    yield _row("specmd-jax", OK, f"{__version__} in {Path(__file__).resolve().parents[2]}")
    yield _row("python", OK, f"{platform.python_version()} at {sys.executable}, {platform.platform()}")
    for package in NEEDED:
        version = version_of(package)
        yield _row(package, WRONG if version is None else OK, version or "not installed")


def _together() -> Iterator[Row]:
    """Says which versions do not go together."""
    jax, jaxlib = version_of("jax"), version_of("jaxlib")
    if jax in BAD_JAX:
        yield _row("jax", WRONG, f"{jax}: {BAD_JAX[jax]}; expected another version")
    if jax is not None and jaxlib is not None and _numbers(jax)[:2] != _numbers(jaxlib)[:2]:
        yield _row("jaxlib", WRONG, f"{jaxlib} beside jax {jax}, expected the same")
    if jax is not None and _numbers(jax) < (0, 11) and sys.version_info < (3, 12):
        slow = "in the scan XLA copied whole tables at every visit: Python 3.12 and jax 0.12 are faster"
        yield _row("python", NOTE, f"{platform.python_version()} with jax {jax}: {slow}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _devices() -> Iterator[Row]:
    try:
        import jax

        devices = jax.devices()
        from specmd_jax.engines.table import ENGINES
    except (ImportError, RuntimeError) as error:
        yield _row("devices", WRONG, f"jax finds none: {str(error).splitlines()[0]}")
        return
    yield _row("devices", OK, f"{len(devices)} x {devices[0].platform} {devices[0].device_kind}")
    for name, engine in ENGINES.items():
        reason = engine.here()
        yield _row(f"engine {name}", OK if reason is None else NOTE, "replays here" if reason is None else reason)
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        yield _row("devices", NOTE, "jax does not use the NVIDIA GPU that is here: pip install 'specmd-jax[cuda]'")


def _memory() -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = Path("/proc/meminfo")
    if told.exists():
        kib = {line.split(":")[0]: int(line.split()[1]) for line in told.read_text().splitlines() if ":" in line}
        yield _row("memory", OK, f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib['MemAvailable'] / 2**20:.1f} of them free")
    yield _row("cores", OK, str(cores))


def _caches() -> Iterator[Row]:
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in ("0", "false"):
        yield _row("compiled programs", NOTE, "not kept: JAX_ENABLE_COMPILATION_CACHE turns it off")
        return
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder())
    held = [path.stat().st_size for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    yield _row("compiled programs", OK, f"{folder}: {len(held)} files, {sum(held) / 2**20:.0f} MiB")


def _writable(out: Path) -> Row:
    there = out.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return _row("results", OK, f"{out} can be written")
    except OSError as error:
        return _row("results", WRONG, f"{out} cannot be written: {error.strerror or error}")


def _optional() -> Iterator[Row]:
    for package, use in OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        version = version_of(package.replace("_", "-"))
        yield _row(package, OK if there else NOTE, version or "there" if there else f"not installed ({use})")
