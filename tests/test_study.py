"""The study's cells are those of `run`; an interrupted table is continued; several processes write the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.study import main
from specmd_jax import run
from specmd_jax.errors import SpecmdError
from specmd_jax.specs.hardware import hardware
from specmd_jax.trace import bundled, first_tokens

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "--tokens=20",
    "--capacities=3",
    "--links=2",
    "--values=2",
    "--evictions=lru,lfu_decay",
    "--prefetch=previous",
)


def tables(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The sorted rows, and the time of every cell."""
    cells = {path.name: np.load(path)["tpot_s"] for path in sorted((folder / "cells").glob("*.npz"))}
    return sorted((folder / "rows.csv").read_text().splitlines()), cells


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    main([*OPTIONS, "--out", str(folder / "here")])
    return folder / "here"


def test_a_cell_is_what_a_run_gives(whole: Path) -> None:
    trace = first_tokens(bundled("gpt-oss-20b"), 20)
    with np.load(whole / "cells" / "lfu_decay+previous-00000.npz") as cells:
        assert cells["tpot_s"].shape == (3, 2, 3)  # capacities, links, values with the default
        np.testing.assert_allclose(cells["value"], [0.5, 0.9, 0.99])
        for at in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
            size, rate, decay = (
                cells[n][i] for n, i in zip(("capacity_bytes", "link_bytes_per_s", "value"), at, strict=True)
            )
            machine = hardware("pcie4-x16").replace(link_bytes_per_s=float(rate))
            alone = run(
                trace,
                eviction="lfu_decay",
                capacity=int(size),
                hardware=machine,
                prefetch="previous",
                phase="decode",
                decay=float(decay),
            )
            for name in ("demand", "hits", "hits_late", "misses", "collisions", "loads"):
                assert cells[name][at] == getattr(alone, name), name
            assert cells["link_bytes"][at] == (
                alone.bytes_demand + alone.bytes_prefetch_used + alone.bytes_prefetch_wasted
            )
            assert cells["tpot_s"][at] == pytest.approx(alone.tpot_s, rel=1e-5)
            assert cells["stall_s"][at] == pytest.approx(alone.stall_s, rel=1e-5)


def test_rows_hold_the_best_of_the_cells(whole: Path) -> None:
    rows, cells = tables(whole)
    assert len(rows) == 1 + 2 * 3 * 2
    head = next(row for row in rows if row.startswith("model")).split(",")
    best = sorted(float(row.split(",")[head.index("tpot_s")]) for row in rows if ",lfu_decay," in row)
    np.testing.assert_allclose(best, np.sort(cells["lfu_decay+previous-00000.npz"].min(axis=-1).ravel()))
    text = (whole / "report.md").read_text()
    assert "24 cells of" in text and "a million such cells would take" in text


def test_an_interrupted_study_goes_on(whole: Path, tmp_path: Path) -> None:
    def begin_again(name: str) -> Path:
        target = tmp_path / name
        subprocess.run(["cp", "-r", str(whole), str(target)], check=True)
        return target

    wanted = tables(whole)
    without_rows = begin_again("rows")
    lines = (without_rows / "rows.csv").read_text().splitlines(keepends=True)
    (without_rows / "rows.csv").write_text("".join(lines[:9]) + "gpt-oss-20b,event,lfu_")
    without_cells = begin_again("cells")
    (without_cells / "cells" / "lru+previous-00000.npz").unlink()
    for folder in (without_rows, without_cells):
        main([*OPTIONS, "--out", str(folder)])
        rows, cells = tables(folder)
        assert rows == wanted[0]
        for name, times in wanted[1].items():
            np.testing.assert_array_equal(cells[name], times)
    with pytest.raises(SpecmdError, match="--overwrite"):
        main([*OPTIONS, "--tokens=19", "--out", str(without_rows)])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--evictions=lru,lfu_decya", "did you mean 'lfu_decay'"),
        ("--prefetch=psychic", "unknown prefetch policy 'psychic'"),
        ("--links=1", "links is 1, expected at least 2"),
        ("--tokens=-4", "tokens is -4, expected at least 0"),
        ("--hardware=abacus", "unknown hardware 'abacus'"),
        ("--trace=nothing.npz", "nothing.npz: no such file"),
    ],
)
def test_bad_options_leave_nothing(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecmdError, match=message):
        main([*OPTIONS, option, "--out", str(tmp_path / "here")])
    assert not any(tmp_path.iterdir())


def test_two_processes_write_what_one_writes(whole: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [sys.executable, "-m", "experiments.study", *OPTIONS, "--out", str(tmp_path / "both"), "--cpu-devices=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*common, f"--coordinator=127.0.0.1:{port}", "--num-processes=2", f"--process-id={which}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for which in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    rows, cells = tables(tmp_path / "both")
    assert rows == tables(whole)[0]
    for name, times in tables(whole)[1].items():
        np.testing.assert_array_equal(cells[name], times)
