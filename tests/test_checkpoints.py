"""Checkpoints on a disk that is full: one line, nothing half-written, and the same run goes on afterwards."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.common.train import weights_path
from specmd_jax.checkpoints import UNFINISHED, checkpoints
from specmd_jax.errors import SpecmdError

FULL = r"cannot write a checkpoint: No space left on device; the same command goes on from the last one$"


def tree(value: float, entries: int = 1000) -> dict[str, np.ndarray]:
    return {"weights": np.random.default_rng(0).normal(value, 1, entries).astype(np.float32)}


def test_the_last_checkpoint_comes_back(tmp_path: Path) -> None:
    with checkpoints(tmp_path / "run") as kept:
        assert kept.latest is None
        for step in (1, 2, 3):
            kept.save(step, tree(step))
        kept.save(3, tree(4))  # again
    with checkpoints(tmp_path / "run") as kept:
        assert kept.latest == 3
        np.testing.assert_array_equal(kept.restore(tree(0))["weights"], tree(4)["weights"])


def test_a_failed_one_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What orbax does on a full disk: it logs, keeps a half-written folder, and raises an error of its store."""

    def fails(manager: object) -> None:
        logging.getLogger("absl").error("hundreds of lines")
        (tmp_path / "run" / UNFINISHED.replace("*", "2")).mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\nat file: No space left on device [OS error 28]")

    with checkpoints(tmp_path / "run") as kept:
        kept.save(1, tree(1))
        monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fails)
        with pytest.raises(SpecmdError, match=FULL):
            kept.save(2, tree(2))
        monkeypatch.undo()
    assert not caplog.records and not list((tmp_path / "run").glob(UNFINISHED))
    logging.getLogger("absl").error("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    script = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from pathlib import Path; from test_checkpoints import checkpoints, tree\n"
        "with checkpoints(Path(sys.argv[1])) as kept:\n"
        "    print(kept.latest)\n"
        "    for step in (1, 2): kept.save(step, tree(step, 300_000))\n"
    )
    words = [sys.executable, "-c", script, str(small_disk / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def once() -> subprocess.CompletedProcess[str]:
        root = Path(__file__).parents[1]
        return subprocess.run(words, capture_output=True, text=True, cwd=root, env=environment)

    first = once()
    assert first.stdout == "None\n" and first.returncode == 1
    *_, last = first.stderr.splitlines()
    assert last.startswith("specmd_jax.errors.SpecmdError: ") and last.endswith("from the last one")
    assert "ERROR:absl" not in first.stderr and not list((small_disk / "run").glob(UNFINISHED))
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    again = once()
    assert (again.stdout, again.stderr, again.returncode) == ("1\n", "", 0)


def test_a_card_without_weights_does_not_stop_the_same_command(tmp_path: Path) -> None:
    card = {"head": "evictor", "settings": {"split": "request"}, "request": {"train": []}, "trace": {"model": "toy"}}
    (tmp_path / "evictor.json").write_text(json.dumps(card))
    assert weights_path(tmp_path, "evictor", False) == tmp_path / "evictor.npz"
    (tmp_path / "evictor.json").write_text("{}")
    with pytest.raises(SpecmdError, match="expected the card that training wrote"):
        weights_path(tmp_path, "evictor", False)
    (tmp_path / "evictor.npz").touch()
    with pytest.raises(SpecmdError, match=r"evictor\.npz already exists"):
        weights_path(tmp_path, "evictor", False)
    assert weights_path(tmp_path, "evictor", True) == tmp_path / "evictor.npz"
