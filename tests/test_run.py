"""`python -m experiments.run`: options are the fields of `Setting`, metrics are those of `run`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from test_pages import checked, data_of

from experiments.common.command_line import bare_parser
from experiments.common.setting_options import given_fields, setting_options
from experiments.run import main
from specmd_jax import Setting
from specmd_jax import run as replay
from specmd_jax.errors import SpecmdError
from specmd_jax.report.pages.run import views
from specmd_jax.report.pages.run.table import RESIDENCY, read_stays
from specmd_jax.report.reader import read_rows
from specmd_jax.report.studies import redraw
from specmd_jax.setting import make_setting
from specmd_jax.timelines.residency import STATES
from specmd_jax.trace import load_trace, save_trace, synthesize

Told = Callable[..., str]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """What the command prints in a folder with `trace.npz`."""
    monkeypatch.chdir(tmp_path)
    trace = synthesize(layers=3, experts=8, top_k=2, tokens=20, requests=2, prompt_tokens=4, seed=1)
    save_trace(trace, tmp_path / "trace.npz")

    def call(*options: str) -> str:
        main(["--trace", "trace.npz", *options])
        return capsys.readouterr().out

    return call


def asked(*options: str) -> Setting:
    parser = bare_parser("", "toy")
    setting_options(parser)
    return make_setting(**given_fields(parser.parse_args([*options])))


def test_every_field_has_an_option_with_its_help_and_default() -> None:
    parser = bare_parser("", "toy")
    setting_options(parser)
    text = " ".join(parser.format_help().split())
    for one in fields(Setting):
        assert re.search(rf"--{one.name.replace('_', '-')}\b[^()]*[a-z].*?\(default: ", text), one.name
    assert "requests that are decoded together (default: 1)" in text
    assert "the miss policy; one of: fetch, " in text


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ("", Setting()),
        ("--eviction LRU --prefetch none --batch 3", Setting(batch=3)),
        ("--hardware none --prefill-chunk 4", Setting(hardware=None, prefill_chunk=4)),
        ("--no-may-evict --reset-per-request", Setting(may_evict=False, reset_per_request=True)),
        ("--precisions 4,16 --miss cascade", Setting(precisions=(4.0, 16.0), miss="cascade")),
        ("--eviction lfu_decay --numbers decay=0.5", Setting(eviction="lfu_decay", numbers={"decay": 0.5})),
        ("--overfetch 1.5 --selection percentile", Setting(overfetch=1.5, selection="percentile")),
    ],
)
def test_options_become_the_setting(given: str, setting: Setting) -> None:
    assert asked(*given.split()) == setting


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--eviction lro", "unknown eviction policy 'lro'; did you mean 'lru'?"),
        ("--scope galactic", "galactic"),
        ("--numbers decay=0.5", "decay"),
        ("--batch 0", "batch is 0"),
        ("--hardware abacus", "unknown hardware 'abacus'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: str, message: str) -> None:
    with pytest.raises(SpecmdError, match=re.escape(message)):
        asked(*given.split())


@pytest.mark.parametrize("given", ["--batch two", "--overfetch much", "--precisions 4,b", "--numbers decay"])
def test_what_is_no_value_is_one_line(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        asked(*given.split())
    assert re.fullmatch(rf"error: argument {given.split()[0]}: .*\n", capsys.readouterr().err)


def test_it_prints_what_run_gives_and_draws_it(told: Told, tmp_path: Path) -> None:
    options = ("--prefetch", "transition", "--capacity", "40%", "--timeline", "seen.json", "--timeline-passes", "5")
    found = json.loads(told(*options, "--json"))
    metrics = replay(load_trace(tmp_path / "trace.npz"), prefetch="transition", capacity="40%", hardware="pcie4-x16")
    assert {name: found[name] for name, value in metrics.row().items() if value is not None} == {
        name: value for name, value in metrics.row().items() if value is not None
    }
    assert (found["prefetch"], found["evidence"]) == ("transition", "simulated")
    events = json.loads((tmp_path / "seen.json").read_text())["traceEvents"]
    assert sum(event.get("cat") in ("prefill", "decode") for event in events) == 5
    table = told(*options)
    assert re.search(rf"^misses +{metrics.misses}$", table, re.MULTILINE)
    assert table.endswith("seen.json: simulated 5 passes of 34; open it at https://ui.perfetto.dev\n")


def test_a_folder_gets_a_page_that_shows_who_is_in_the_cache(told: Told, tmp_path: Path) -> None:
    options = ("--prefetch", "transition", "--capacity", "40%", "--out", "seen")
    table = told(*options)
    assert table.endswith("seen/report.md\nseen/report.html\n")
    (row,) = read_rows(tmp_path / "seen")
    found = json.loads(told(*options, "--json"))  # the same again, into the same folder
    assert {name: row[name] for name in found} == found
    stays = read_stays(tmp_path / "seen" / RESIDENCY)
    passes = Counter[str]()
    for stay in stays:
        passes[stay.state] += stay.last + 1 - stay.first
    assert passes["miss"] == row["misses"] and passes["hit"] == row["hits_reuse"]
    text = checked(tmp_path / "seen" / "report.html")
    assert 'data-filter="layer"' in text and data_of(text)["tables"]["stays"]["rows"] == len(stays)
    assert "The charts have all 34 passes" in text and "Blank: it was not in the cache." in text
    (tmp_path / "seen" / "report.html").unlink()
    redraw(tmp_path / "seen")
    assert checked(tmp_path / "seen" / "report.html") == text
    with pytest.raises(SpecmdError, match="seen holds results of another config"):
        told("--capacity", "50%", "--out", "seen")


def test_states_have_a_colour_each() -> None:
    assert set(views.COLORS) | {STATES[0]} == set(STATES)


def test_a_damaged_table_of_stays_is_named(tmp_path: Path) -> None:
    (tmp_path / RESIDENCY).write_text("layer,expert,first,last,state\n0,1,5,4,hit\n")
    with pytest.raises(SpecmdError, match=r"residency.csv, line 2: expected layer"):
        read_stays(tmp_path / RESIDENCY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--timeline", "seen.txt"), "seen.txt: expected a name that ends in .json"),
        (("--timeline", "nowhere/seen.json"), "nowhere/seen.json: no folder nowhere, expected one that exists"),
        (("--timeline-passes", "3"), "--timeline-passes has no effect without --timeline FILE.json"),
        (("--timeline", "seen.json", "--timeline-passes", "0"), "--timeline-passes is 0, expected at least 1"),
        (("--timeline", "seen.json", "--hardware", "none"), "--timeline with --hardware none"),
        (("--tokens", "-1"), "tokens is -1, expected at least 0"),
        (("--trace", "gone.npz"), "gone.npz: no such file"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    told: Told, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("experiments.studies.run.load_named", lambda *_: pytest.fail("a trace is read"))
    with pytest.raises(SpecmdError, match=f"^{re.escape(message)}"):
        told(*options)
