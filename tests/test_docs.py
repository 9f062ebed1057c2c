"""The README and the pages under docs/ keep up with the code: names, tables, numbers, links, commands and blocks."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_command

from configs.routing import RoutingConfig
from configs.starts import StartsConfig
from experiments.documenting import found, reference, unseen
from experiments.documenting.blocks import blocks_of, with_blocks
from experiments.documenting.tables import TABLES
from experiments.studies import routing, starts
from specmd_jax import Setting, bundled, synthesize
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.evaluation import hits_by_request
from specmd_jax.policies.admission import ADMISSION
from specmd_jax.policies.choice import AXES
from specmd_jax.policies.eviction import EVICTION
from specmd_jax.policies.miss import MISS
from specmd_jax.policies.prefetch import PREFETCH, SELECTION
from specmd_jax.policies.routing import ROUTING
from specmd_jax.policies.trained import DATA
from specmd_jax.report import figures
from specmd_jax.report.pages import readme_picture
from specmd_jax.report.pages.routing.page import side_by_side
from specmd_jax.report.reader import read_rows
from specmd_jax.trace import IMPORTERS, PROFILES, STRIPPABLE, select_requests
from specmd_jax.trace.bundled import BUNDLED

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
DOCUMENTS = (
    *PAGES,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "experiments/CLUSTER.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "specmd_jax").rglob("*.md"))),
)
POLICIES = {
    "eviction": EVICTION,
    "prefetch": PREFETCH,
    "selection": SELECTION,
    "miss": MISS,
    "routing": ROUTING,
    "admission": ADMISSION,
    "host_eviction": {"none": None, **EVICTION},
}
COMMAND = re.compile(r"python -m experiments\.([a-z_]+)([^\n`]*)")
FENCE = re.compile(
    r"(?:<!-- (?P<way>not run|test-command)(?:: (?P<what>[^\n]*?))? -->\n)?"
    r"^```(?P<kind>python|sh)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------- names and tables


@pytest.mark.parametrize("axis", POLICIES)
def test_every_policy_is_listed(axis: str) -> None:
    named = set(re.findall(r"`([^`\n]+)`", text_of("docs/policies.md")))
    assert POLICIES[axis].keys() <= named


def test_the_first_columns_list_nothing_else() -> None:
    text = text_of("docs/policies.md").split("\n## Eviction\n")[1]
    first = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([^`\n]+)`", first)) == EVICTION.keys() | PREFETCH.keys() | MISS.keys() | ADMISSION.keys()


def test_the_axes_of_the_code_are_those_of_the_page() -> None:
    assert {axis: POLICIES[axis] for axis in AXES} == {axis: about.table for axis, about in AXES.items()}


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_those_of_the_code(page: str) -> None:
    shown = blocks_of(text_of(page))
    assert shown.keys() == TABLES[page].keys()
    for name, make in TABLES[page].items():
        assert shown[name] == make(), f"{page}, {name}: run python -m experiments.make_docs --tables"


def test_a_page_without_the_block_is_refused() -> None:
    with pytest.raises(SpecmdError, match=r"x\.md: there is no block 'b', expected <!-- made: b -->"):
        with_blocks("<!-- made: a -->\nold\n<!-- /made -->\n", {"b": "new\n"}, "x.md")
    assert with_blocks("<!-- made: a -->\nold\n<!-- /made -->\n", {"a": "new\n"}, "") == (
        "<!-- made: a -->\nnew\n<!-- /made -->\n"
    )


def test_every_trace_format_is_in_its_table() -> None:
    named = re.findall(r"^\| `([^`]+)` ", text_of("specmd_jax/trace/importers/README.md"), re.MULTILINE)
    assert named == [*IMPORTERS, *PROFILES, *STRIPPABLE]
    assert f"[{len(IMPORTERS)} formats](../specmd_jax/trace/importers/README.md)" in text_of("docs/traces.md")


def test_the_table_of_bundled_traces_says_what_they_hold() -> None:
    page = text_of("docs/traces.md")
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d,]+)(.*?) \| (\d+) layers, (\d+) of (\d+)", page, re.MULTILINE)
    assert [name for name, *_ in rows] == list(BUNDLED) and len(BUNDLED) == 4 and "Four come with the package" in page
    for name, tokens, told, *shape in rows:
        trace = bundled(name)
        assert int(tokens.replace(",", "")) == trace.tokens
        assert [int(number) for number in shape] == [trace.layers, trace.top_k, trace.experts]
        count = {1: "one", 10: "ten"}.get(trace.requests, trace.requests)
        assert f"{count} request" in told
        prompts = set(trace.prompt_lengths.tolist())
        assert "decode only" in told if prompts == {0} else f"a prompt of {prompts.pop()}" in told
        assert ("router logits and the next gate's scores" in told) == (trace.logits is not None)


def test_every_command_is_named() -> None:
    named = {name for name, _ in COMMAND.findall(text_of("docs/commands.md"))}
    assert named == {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}


# ------------------------------------------------------------------------------------------------- numbers of findings

FINDINGS = blocks_of(text_of("docs/findings.md"))


REFERENCE_MODEL = blocks_of(text_of("docs/reference_model.md"))


def test_every_number_of_the_reference_model_is_made_by_the_command() -> None:
    assert REFERENCE_MODEL.keys() == reference.STUDIED.keys()
    assert all(REFERENCE_MODEL.values())


def test_numbers_of_a_model_that_nobody_trained_on_are_made_by_the_command(tmp_path: Path) -> None:
    shown = blocks_of(text_of("specmd_jax/learn/README.md"))
    assert shown.keys() == unseen.STUDIED.keys() and all(shown.values())
    trace = bundled("gpt-oss-20b")
    parts = unseen.parted(trace, unseen.TOKENS)
    assert sorted(np.concatenate(parts).tolist()) == list(range(trace.requests))
    learned, judge = (int(trace.lengths[rows].sum()) for rows in ([*parts.train, *parts.validation], parts.test))
    assert 0.95 * unseen.TOKENS < learned <= unseen.TOKENS
    assert f" {learned:,}, {judge:,} " in shown["unseen"]

    toy = synthesize(layers=3, experts=6, top_k=2, tokens=12, requests=8, seed=2)
    few = unseen.parted(toy, 48)
    assert [len(rows) for rows in few] == [2, 2, 4]
    for head in unseen.HEADS:  # the package's own weights stand in, through the part that transfers
        shutil.copy(DATA / f"{head}.npz", tmp_path)
    gaps, recalls = unseen.judged(toy, few, tmp_path)
    assert gaps.keys() == unseen.TOLD.keys() == recalls.keys() | {"begun"}
    held = select_requests(toy, few.test)
    budget = [Setting(capacity="25%", scope="layer").budget(held)]
    lru, belady, own = (hits_by_request(held, name, budget).sum() for name in ("lru", "belady", "adaptive"))
    assert gaps["adaptive"].value == pytest.approx((own - lru) / (belady - lru))
    assert gaps["after"] != gaps["adaptive"]


def test_numbers_of_routing_are_counted() -> None:
    """Those of the trace that takes no time; a part of its policies."""
    name = "bigmoe-gpt-oss-120b"
    config = RoutingConfig(predictors=("previous",), evictions=("lru", "belady", "lfu_decay"))
    it = routing.subject(name, config)
    parts = (routing.sizes, routing.reuse, routing.overlap, routing.evenness, routing.recall, routing.gap)
    head, *lines = ([cell.strip() for cell in line.split("|")] for line in REFERENCE_MODEL["routing"].splitlines())
    shown = {line[1]: line[head.index(name)] for line in lines}
    counted = [row for part in parts for row in part(it, config)]
    body = {line[0]: line[1] for line in side_by_side(counted, [name])[1]}
    del body["most of the gap, 10%"], body["most of the gap, 25%"], body["most of the gap, 2 cycles"]  # of all policies
    assert len(body) > 14
    assert body == {name: shown[name] for name in body}


def test_every_finding_is_made_by_the_command() -> None:
    assert FINDINGS.keys() == found.REPLAYED.keys() | found.STUDIED.keys()
    assert all(FINDINGS.values())


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("policies", lambda: found.policies(["lru", "belady", "least_stale"])),
        ("readings", lambda: found.readings([77, 120])),
        ("predictions", found.predictions),
    ],
)
def test_numbers_are_replayed(name: str, some: Callable[[], str]) -> None:
    assert set(some().splitlines()) <= set(FINDINGS[name].splitlines())


def test_bounds_on_stall_are_replayed() -> None:
    """A cell per scope; linear programs may have several best plans, so last digits may differ by version."""
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[3] for line in FINDINGS["bounds"].splitlines()[2:]}
    for line in found.bounds(["phone-ufs"], ["10%"]).splitlines()[2:]:
        *row, cell = line.removesuffix(" |").split(" | ")
        lower_s, _, feasible_s, *_ = cell.split()
        shown = cells[tuple(row)].split()
        assert float(lower_s) == pytest.approx(float(shown[0]), rel=0.01)
        assert float(feasible_s) == pytest.approx(float(shown[2]), rel=0.01)


def test_numbers_of_quality_are_those_of_the_studys_table() -> None:
    rows = read_rows(ROOT / "tests" / "data" / "pages" / "quality")
    assert found.quality_lines(rows) == FINDINGS["quality"]
    assert found.claim_lines(rows) == FINDINGS["quality_claims"]


def test_numbers_of_profiles_are_replayed() -> None:
    profile, rest = starts.halves(bundled("gpt-oss-20b"), StartsConfig())
    plain = Setting(hardware=None, eviction="lru", capacity="50%")
    rows = starts.rows_of(rest, [plain, plain.replace(pin_share=1.0, pin_profile=profile)])
    lines = {line.split(" | ")[0].strip("| "): line for line in FINDINGS["profiles"].splitlines()}
    for name, row in zip(("lru", "static"), rows, strict=True):
        assert f" {row['miss_pct']:.2f} |" in lines[name]


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_and_named_files_exist(document: str) -> None:
    text = text_of(document)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", text):
        path = target[0] or target[1]
        assert "://" in path or ((ROOT / document).parent / path).exists(), f"{document}: {path}"
    for path in re.findall(r"`((?:specmd_jax|tests|experiments|configs|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document}: {path}"


def test_every_page_is_on_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert {Path(page).name for page in PAGES[1:]} <= set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE))


def test_there_is_one_test_command() -> None:
    readme = text_of("README.md")
    blocks = re.findall(r"<!-- test-command -->\n```sh\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == readme.count("<!-- test-command -->") == 1
    assert blocks[0].count("\n") == 1 and "'.[test]'" in blocks[0] and "-m pytest" in blocks[0]


# --------------------------------------------------------------------------------------------- commands and blocks


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Sequence[str]], None]:
    """``command(name, options)``: what ``python -m experiments.<name>`` does."""
    monkeypatch.syspath_prepend(str(ROOT))

    def run(name: str, options: Sequence[str]) -> None:
        run_command(monkeypatch, name, *options)

    return run


def test_options_that_are_shown_exist(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        if document != "CHANGELOG.md":
            for name, options in COMMAND.findall(text_of(document).replace("\\\n", " ")):
                asked.setdefault(name, set()).update(re.findall(r"(?<=\s)--[\w-]+", options))
    assert len(asked) > 10
    for name, options in asked.items():
        with contextlib.suppress(SystemExit):
            command(name, ["--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out.split("usage:")[1]))
        assert options <= known, f"python -m experiments.{name}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```" in text_of(page)])
def test_blocks_run_as_they_stand(
    page: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of one page share their names and their folder, as a reader's session does.

    ``<!-- not run: why -->`` before a block leaves it out.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "DPI", 40)
    names: dict[str, Any] = {}
    for block in FENCE.finditer(text_of(page)):
        if block["way"] in ("not run", "test-command"):
            assert block["way"] == "test-command" or block["what"], f"{page}: say why a block is not run"
        elif block["kind"] == "python":
            exec(compile(block["code"], page, "exec"), names)
        else:
            for line in block["code"].replace("\\\n", " ").splitlines():
                given = COMMAND.fullmatch(line)
                assert given is not None, f"{page}: {line!r} is no command of this project"
                command(given[1], shlex.split(given[2]))
    capsys.readouterr()


def test_the_picture_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    curves = {name: [(5.0, 10.0), (100.0, 99.0)] for name in readme_picture.POLICIES}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        drawn = list(readme_picture.draw(tmp_path / folder, curves, title="toy", cycle_pct=12.5))
        assert [path.name for path in drawn] == ["capacity-light.svg", "capacity-dark.svg"]
    for name in ("capacity-light.svg", "capacity-dark.svg"):
        first, shipped = (tmp_path / "one" / name).read_text(), ROOT / "docs" / "images" / name
        assert first == (tmp_path / "two" / name).read_text()
        assert "toy" in first and "what one token uses" in first
        assert shipped.stat().st_size < 100_000
