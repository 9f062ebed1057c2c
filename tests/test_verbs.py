"""`specmd`: its overview, its verbs, their help without JAX, what there is to choose from, and `doctor`."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.common import health
from experiments.common.program import VERBS, as_typed, by_verb, program
from experiments.common.verbs import found, overview, run
from specmd_jax import MODELS, __version__
from specmd_jax.errors import SpecmdError
from specmd_jax.policies.choice import AXES

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("jax", "flax", "numba", "matplotlib", "pandas", "torch")
HELP = """
import contextlib, io, sys
from experiments.common.program import VERBS, by_verb
from experiments.common.verbs import run
by_verb(True)
for name in VERBS:
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        run([*name.split(), "--help"])
    assert told.getvalue().startswith(f"usage: specmd {name} "), (name, told.getvalue()[:80])
    assert "python -m experiments" not in told.getvalue(), name
    heavy = [module for module in sys.argv[1:] if module in sys.modules]
    assert not heavy, f"{name} --help imports {heavy}"
"""


@pytest.fixture(autouse=True)
def as_modules() -> Iterator[None]:
    yield
    by_verb(False)


def test_help_of_every_verb_is_its_own_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *HEAVY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_is_a_verb() -> None:
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py") if "def main(" in path.read_text()}
    for_maintainers = {"make_bundled", "make_docs"}
    assert {verb.module for verb in VERBS.values()} == commands - for_maintainers


def test_the_overview_has_a_line_for_each_verb(capsys: pytest.CaptureFixture[str]) -> None:
    lines = overview().splitlines()
    for name, verb in VERBS.items():
        assert [line for line in lines if line.startswith(f"  {name} ") and line.endswith(verb.about)], name
    assert max(map(len, lines)) <= 120
    for words in ([], ["--help"], ["help"]):
        run(words)
        assert capsys.readouterr().out == overview() + "\n"
    run(["--version"])
    assert capsys.readouterr().out == f"specmd-jax {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swep"], r"unknown verb 'swep'; did you mean 'sweep'\?"),
        (["import_trace"], r"did you mean 'import'\?"),
        (["xyzzy"], r"unknown verb 'xyzzy' \(see specmd --help\)"),
        (["trian", "evictor"], r"unknown verb 'trian'; did you mean 'train'\?"),
    ],
)
def test_what_is_no_verb_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(SpecmdError, match=message):
        found(words)


def test_words_become_a_verb_and_the_rest() -> None:
    assert found(["train", "evictor", "--smoke"]) == (VERBS["train evictor"], ["--smoke"])
    assert found(["train", "--heads", "evictor"]) == (VERBS["train"], ["--heads", "evictor"])
    assert found(["least-stale", "--smoke"]) == (VERBS["least_stale"], ["--smoke"])


def test_commands_are_named_as_they_are_typed() -> None:
    text = "see python -m experiments.evaluate_learned --help, experiments.common.train and experiments.run"
    assert as_typed(text) == text and program("sweep") == "python -m experiments.sweep"
    by_verb(True)
    assert as_typed(text) == "see specmd evaluate --help, experiments.common.train and specmd run"
    assert (
        program("import_trace") == "specmd import" and program("make_bundled") == "python -m experiments.make_bundled"
    )


def test_models_and_policies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run(["list", "models", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(MODELS) and all(row["source"] for row in rows)
    run(["list", "eviction", "hardware", "--format", "csv"])
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in table if row["kind"] == "eviction"] == list(AXES["eviction"].table)
    assert all("link_bytes_per_s=" in row["evidence"] for row in table if row["kind"] == "hardware")
    run(["list", "traces"])
    assert "Apache-2.0" in capsys.readouterr().out
    with pytest.raises(SpecmdError, match="unknown kind of list 'modls'; did you mean 'models'"):
        run(["list", "modls"])


def test_the_doctor_finds_what_is_there_and_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(["doctor", "--format", "json", "--out", str(tmp_path / "new" / "results")])
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"jax", "numpy", "devices", "engine gpu", "compiled programs", "results", "pandas"} <= rows.keys()
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(health, "BAD_JAX", {health.version_of("jax"): "it is slow"})
    with pytest.raises(SystemExit, match="1"):
        run(["doctor", "--out", str(tmp_path)])
    assert "it is slow; expected another version" in capsys.readouterr().out
