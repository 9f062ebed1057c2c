"""What is built: a wheel that puts one folder into site-packages, and works from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import specmd_jax
from specmd_jax.__main__ import commands_folder

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MOST_BYTES = 30_000_000
"""Of the wheel: 17.4 MB are the weights of the model that comes with it, the traces most of the rest."""
DATA = {
    "moe/data/specmd-reference/model.safetensors",
    "moe/data/specmd-reference/held_out.npz",
    "moe/data/specmd-reference/packing.csv",
    "py.typed",
    "CONTRACT.md",
    "moe/README.md",
    "trace/data/gpt-oss-20b.npz",
    "trace/data/LICENSE-gpt-oss-20b",
    "policies/data/evictor.npz",
    "_commands/experiments/validation/cells.csv",
    "_commands/configs/sweep.py",
}


def test_there_is_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", specmd_jax.__version__)
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert f"\nversion: {specmd_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_commands_are_found_in_a_checkout_and_in_an_installed_package(tmp_path: Path) -> None:
    assert commands_folder(ROOT / "specmd_jax") == ROOT
    with pytest.raises(FileNotFoundError, match="its commands are missing"):
        commands_folder(tmp_path / "specmd_jax")
    inside = tmp_path / "specmd_jax" / "_commands"
    (inside / "experiments" / "common").mkdir(parents=True)
    (inside / "experiments" / "common" / "verbs.py").touch()
    assert commands_folder(tmp_path / "specmd_jax") == inside


def _run(folder: Path, *command: str, path: Path | None = None) -> str:
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = known if path is None else known | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_is_small_and_works_from_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(ROOT, *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", str(tmp_path), ".")
    (wheel,) = tmp_path.glob("*.whl")
    size = wheel.stat().st_size
    with capsys.disabled():
        print(f"\n{wheel.name}: {size / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:.0f}")
    assert size < MOST_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"specmd_jax", f"specmd_jax-{specmd_jax.__version__}.dist-info"}
    assert {f"specmd_jax/{name}" for name in DATA} <= names
    assert not [name for name in names if "tests/" in name or "__pycache__" in name]

    there, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run(ROOT, *pip, "install", "--no-deps", "--target", str(there), str(wheel))
    specmd = (sys.executable, str(there / "bin" / "specmd"))
    assert _run(elsewhere, *specmd, "--version", path=there) == f"specmd-jax {specmd_jax.__version__}\n"
    assert "gpt-oss-20b" in _run(elsewhere, *specmd, "list", "models", path=there)
    told = _run(elsewhere, *specmd, "sweep", "--smoke", path=there)
    assert "least_stale" in told
    assert [path.name for path in elsewhere.iterdir()] == ["results"]
