"""Every study: its help, a tiny run in a folder of its own, and bad options that end in one line.

A study is a module of `experiments` with settings of the same name in `configs`; it has ``--smoke`` and ``--out``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run_command

from specmd_jax.report import figures
from specmd_jax.report.studies import DRAW
from specmd_jax.trace import save_trace, synthesize

ROOT = Path(__file__).parents[1]


def _defines_main(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


COMMANDS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if _defines_main(path))
STUDIES = sorted(name for name in COMMANDS if (ROOT / "configs" / f"{name}.py").exists())

DRAWN = (".png", ".md", ".html")
REDRAW = """
import sys
sys.modules["jax"] = sys.modules["jaxlib"] = sys.modules["flax"] = None  # importing one raises ImportError
from experiments.report import main
from specmd_jax.report import figures
figures.DPI = 40  # as the run drew them
main(["here"])
"""

WITH_TIMELINE = ("offload", "recommend")
NEEDS = {"capture": ("torch", "transformers")}  # what specmd-jax does not install

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``run(name, *options)``: exit status, stdout, stderr of ``python -m experiments.<name>`` in an empty folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "DPI", 40)  # drawing is most of a small run

    def run_module(name: str, *options: str) -> tuple[int, str, str]:
        status = 0
        try:
            run_command(monkeypatch, name, *options)
        except SystemExit as ended:
            status = int(ended.code or 0)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run_module


def test_the_sweep_is_among_the_studies() -> None:
    assert "sweep" in STUDIES  # the lists above are not empty by accident


def test_every_study_is_drawn() -> None:
    assert set(DRAW) >= set(STUDIES)
    rest = {name for name in DRAW if not (ROOT / "configs" / f"{name}.py").exists()}
    assert rest == {"run"}  # whose settings are `specmd_jax.Setting`


@pytest.mark.parametrize("name", COMMANDS)
def test_help_gives_the_command(run: Run, name: str) -> None:
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert f"python -m experiments.{name}" in out


@pytest.mark.parametrize("name", STUDIES)
def test_smoke_run_leaves_results_that_are_redrawn_without_jax(run: Run, name: str, tmp_path: Path) -> None:
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    seen = tmp_path / "seen.json"
    status, out, err = run(name, "--smoke", "--out", "here", *(("--timeline", seen.name) * (name in WITH_TIMELINE)))
    if missing:
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {missing[0]} is not installed") and err.count("\n") == 1
        assert not any(tmp_path.iterdir())
        return
    assert status == 0, err
    assert out.strip()
    if name in WITH_TIMELINE:
        assert {"M", "X"} <= {event["ph"] for event in json.loads(seen.read_text())["traceEvents"]}
        assert re.search(r"^seen\.json: .*; open it at https://ui\.perfetto\.dev$", out, re.MULTILINE)
        seen.unlink()
    written = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert written
    assert all(path.stat().st_size > 0 and not path.name.endswith(".tmp") for path in written)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]  # nowhere else

    drawn = {path: path.read_bytes() for path in written if path.suffix in DRAWN}
    for path in drawn:
        path.unlink()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", REDRAW],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.read_bytes() for path in drawn} == drawn
    assert set(written) == {path for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert done.stdout.strip() and set(done.stdout.splitlines()) <= set(out.splitlines())


def test_a_folder_without_results_is_not_drawn(run: Run, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    status, out, err = run("report", "here")
    assert (status, out) == (2, "")
    assert err == "error: here: no results here (expected manifest.json and rows.csv)\n"


@pytest.mark.parametrize("name", STUDIES)
def test_an_unknown_option_ends_in_one_line(run: Run, name: str, tmp_path: Path) -> None:
    status, out, err = run(name, "--no-such-option")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--evictions", "lru,least_stael"), "unknown eviction policy 'least_stael'; did you mean 'least_stale'?"),
        (("--capacities", "5%,12 parsecs"), "capacity '12 parsecs' has an unknown unit"),
        (("--capacities", "1"), "expected at least 2 evenly spaced capacities"),
        (("--capacities", "25%,300%"), "capacity '300%' is above everything: expected at most 100 %"),
        (("--hardware", "abacus"), "unknown hardware 'abacus'"),
        (("--scope", "galactic"), "'galactic'"),
        (("--contract", "social"), "'social'"),
        (("--phase", "moon"), "'moon'"),
        (("--batch", "0"), "batch"),
        (("--drafts", "2"), "the trace of gpt-oss-20b has no accepted counts"),
        (("--drafts", "2", "--acceptance", "0.5,1.5"), "acceptance is 1.5, expected 0 to 1"),
        (("--acceptance", "0.5"), "acceptance is given and nothing is drafted, expected drafts above 0"),
        (("--tokens", "-1"), "tokens is -1, expected at least 0"),
        (("--warmup-tokens", "-3"), "warmup"),
        (("--trace", "nothing.npz"), "nothing.npz: no such file"),
        (("--trace", "gpt-oss"), "unknown trace 'gpt-oss'; did you mean 'gpt-oss-20b'?"),
        (("--stream",), "gpt-oss-20b is a bundled trace, expected a trace file"),
    ],
)
def test_a_bad_sweep_leaves_nothing(run: Run, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    status, out, err = run("sweep", "--smoke", *options)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not any(tmp_path.iterdir())


def test_a_sweep_again_computes_nothing_and_a_cut_one_is_continued(run: Run, tmp_path: Path) -> None:
    options = ("--smoke", "--evictions", "lru,belady", "--capacities", "50%,100%", "--out", "here")
    assert run("sweep", *options)[0] == 0
    rows = tmp_path / "here" / "rows.csv"
    whole = rows.read_text()
    assert whole.count("\n") == 1 + 2 * 2
    assert run("sweep", *options)[0] == 0
    assert rows.read_text() == whole

    rows.write_text("".join(whole.splitlines(keepends=True)[:-2]) + "gpt-oss-20b,bel")
    status, out, err = run("sweep", *options)
    assert status == 0, err
    assert sorted(rows.read_text().splitlines()) == sorted(whole.splitlines())
    assert "belady *" in out
    whole = rows.read_text()

    status, _, err = run("sweep", *options[:-4], "--capacities", "50%", "--out", "here")
    assert status == 2
    assert "--overwrite" in err
    assert rows.read_text() == whole
    assert json.loads((tmp_path / "here" / "manifest.json").read_text())["complete"] is True


def test_a_streamed_sweep_gives_the_same_table(run: Run, tmp_path: Path) -> None:
    save_trace(synthesize(layers=3, experts=8, top_k=2, tokens=30, requests=3), tmp_path / "trace.npz")
    options = ("--smoke", "--trace", "trace.npz", "--capacities", "25%,80%")
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        status, _, err = run("sweep", *options, *more, "--out", name)
        assert status == 0, err
    for file in ("rows.csv", "routing_counts.csv"):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    status, _, err = run("sweep", *options, "--stream", "--batch", "2", "--out", "none")
    assert status == 2 and "expected 1 for a trace that is streamed" in err
