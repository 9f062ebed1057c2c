"""The README keeps up: it names every row of every table, and its test command is the one that CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specmd_jax.engines.table import ENGINES
from specmd_jax.policies.admission import ADMISSION
from specmd_jax.policies.choice import AXES as CODE
from specmd_jax.policies.eviction import EVICTION
from specmd_jax.policies.miss import MISS
from specmd_jax.policies.prefetch import PREFETCH, SELECTION
from specmd_jax.policies.routing import ROUTING
from specmd_jax.specs.hardware import HARDWARE
from specmd_jax.specs.models import MODELS
from specmd_jax.trace import IMPORTERS, PROFILES, STRIPPABLE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
AXES = README.split("\n## The axes\n")[1].split("\n## ")[0]
TABLES = {
    "eviction": EVICTION,
    "prefetch": PREFETCH,
    "selection": SELECTION,
    "miss": MISS,
    "routing": ROUTING,
    "admission": ADMISSION,
    "host_eviction": {"none": None, **EVICTION},
    "models": MODELS,
    "hardware": HARDWARE,
}


@pytest.mark.parametrize("axis", TABLES)
def test_every_row_of_the_table_is_named(axis: str) -> None:
    named = set(re.findall(r"`([^`\n]+)`", AXES))
    assert TABLES[axis].keys() <= named


def test_every_trace_format_is_in_its_table() -> None:
    text = (ROOT / "specmd_jax/trace/importers/README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([^`]+)` ", text, re.MULTILINE)
    assert named == [*IMPORTERS, *PROFILES, *STRIPPABLE]
    assert f"[{len(IMPORTERS)} formats](specmd_jax/trace/importers/README.md)" in README


def test_the_first_column_names_nothing_else() -> None:
    first = "\n".join(line.split("|")[1] for line in AXES.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([^`\n]+)`", first)) == EVICTION.keys() | PREFETCH.keys() | MISS.keys() | ADMISSION.keys()


def test_there_is_one_test_command() -> None:
    blocks = re.findall(r"<!-- test-command -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == README.count("<!-- test-command -->") == 1
    assert blocks[0].count("\n") == 1 and "'.[test]'" in blocks[0] and "-m pytest" in blocks[0]


def test_linked_files_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{document}: {target}"


def test_the_account_of_engines_is_the_tables() -> None:
    shown = README.split("<!-- engines -->\n")[1].split("<!-- /engines -->")[0]
    wanted = "| engine | replays |\n|---|---|\n"
    wanted += "".join(f"| `{name}` | {engine.about} |\n" for name, engine in ENGINES.items())
    assert shown == wanted


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_code_runs_as_it_stands(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of one document share their names, as a reader's session does. Traces of one's own are not there."""
    text = (ROOT / document).read_text(encoding="utf-8").split("### Traces of your own")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    assert capsys.readouterr().out


def test_the_axes_of_the_code_are_those_of_the_readme() -> None:
    assert {axis: TABLES[axis] for axis in CODE} == {axis: about.table for axis, about in CODE.items()}


DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "specmd_jax").rglob("*.md")))


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_files_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:specmd_jax|tests|experiments|configs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document}: {path}"
