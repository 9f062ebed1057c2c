"""Options come from the settings: each is in the help with its default, and a bad value is one line and status 2."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from commands import run_command

from configs.learned import EVICTOR, PREFETCHER, TrainHeadsConfig
from configs.options import EVICTIONS, HARDWARE, TRACES, Settings, capacity, fixed, option, size
from experiments.common.command_line import parser
from experiments.common.options import Option, declared, options_of, settings_of, shown
from specmd_jax.errors import SpecmdError

ROOT = Path(__file__).parents[1]


def _every_settings() -> Iterator[tuple[str, Settings]]:
    """Every command that has settings, with their defaults."""
    yield "train_evictor", EVICTOR
    yield "train_prefetcher", PREFETCHER
    yield "train", TrainHeadsConfig()
    for path in sorted((ROOT / "configs").glob("*.py")):
        for name, kind in vars(importlib.import_module(f"configs.{path.stem}")).items():
            if name.endswith("Config") and path.stem != "learned":
                yield path.stem, kind()


DEFAULTS = dict(_every_settings())
OPTIONS = [(command, one) for command, defaults in DEFAULTS.items() for one in declared(defaults)]
WITH_OPTIONS = sorted({command for command, _ in OPTIONS})

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``run(name, *options)``: exit status, stdout, stderr of ``python -m experiments.<name>`` in an empty folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100000")  # the help in lines as long as they come

    def run_module(name: str, *options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_command(monkeypatch, name, *options)
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run_module


def _flag(one: Option) -> str:
    return f"--{one.name.replace('_', '-')}"


# ---------------------------------------------------------------------------------------------------- every command


def test_settings_import_no_jax() -> None:
    modules = [f"configs.{path.stem}" for path in sorted((ROOT / "configs").glob("*.py"))]
    script = f"import sys, {', '.join(modules)}; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_with_settings_is_here() -> None:
    without = {"bench_offload", "benchmark", "doctor", "export_trace", "import_trace", "list", "make_bundled"}
    without |= {"make_docs", "report", "run"}
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py") if "def main(" in path.read_text()}
    assert commands - without == set(WITH_OPTIONS)


@pytest.mark.parametrize("command", DEFAULTS)
def test_every_field_is_declared(command: str) -> None:
    defaults = DEFAULTS[command]
    for one in fields(defaults):
        assert one.metadata, one.name
        if "setting" in one.metadata:
            said, kind = one.metadata["setting"], get_type_hints(type(defaults))[one.name]
            assert said.help[0] != said.help[0].upper() or not said.help[0].isalpha(), said.help
            assert not said.help.endswith("."), said.help
            if {int, float} & {kind, *get_args(kind)}:
                assert said.least is not None or said.above is not None, f"{one.name} has no lower bound"


@pytest.mark.parametrize("command", DEFAULTS)
def test_defaults_and_smoke_runs_are_good_settings(command: str) -> None:
    for settings in (DEFAULTS[command], DEFAULTS[command].smoke()):
        assert settings.checked() == settings


@pytest.mark.parametrize("command", WITH_OPTIONS)
def test_the_help_has_every_option_with_its_default(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    for one in declared(DEFAULTS[command]):
        default = re.escape(one.setting.shown or shown(one.default))
        assert default
        # a long name has its help on the next line
        assert re.search(rf"^  {_flag(one)}\b.*(\n +.*)? \(default: {default}\)$", out, re.MULTILINE), _flag(one)
    assert out.index("\noptions:\n") < out.index("\ncommon options:\n") < out.index("  --smoke")


def _bad_values(one: Option) -> Iterator[str]:
    """Texts that the option's type or declaration rules out."""
    said, kinds = one.setting, {one.type, *get_args(one.type)}
    item = int if int in kinds else float if float in kinds else str
    if item is not str:
        yield "many"
        yield str(said.above if said.least is None else said.least - 1)
    if item is float:
        yield "nan"
    if "tuple" in str(one.type) and said.read is None and not said.may_be_empty:
        yield ","
    if said.names is not None:
        yield "no-such-name"
    if said.names is not None and said.names.suffix:
        yield f"nowhere{said.names.suffix}"
    if said.check in (capacity, size):
        yield "12 parsecs"
        yield "-3MiB"


BAD = [(command, _flag(one), text) for command, one in OPTIONS if one.type is not bool for text in _bad_values(one)]


def test_bad_values_of_every_type_are_tried() -> None:
    assert {"many", "nan", ",", "no-such-name", "nowhere.npz", "nowhere.json", "12 parsecs"} <= {bad[2] for bad in BAD}
    assert len(BAD) > len(OPTIONS)


@pytest.mark.parametrize(("command", "flag", "text"), BAD, ids=lambda value: str(value))
def test_a_bad_value_is_one_line_about_it_and_leaves_nothing(
    run: Run, tmp_path: Path, command: str, flag: str, text: str
) -> None:
    there = tmp_path / "out" / "rows.csv"  # results of something else, which the complaint must not be about
    there.parent.mkdir()
    there.write_text("rows\n")
    status, out, err = run(command, "--smoke", "--out", "out", f"{flag}={text}")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    name = flag[2:]
    assert name in err or name.replace("-", "_") in err or text in err
    assert "--overwrite" not in err and "rows.csv" not in err
    assert there.read_text() == "rows\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "rows.csv"]


TOGETHER = [
    ("sweep", ("--batch=2", "--reset-per-request"), "reset_per_request with batch 2, expected batch 1"),
    ("sweep", ("--capacities=1",), "capacities is 1, expected at least 2"),
    ("paper", ("--models=", "--traces="), "neither models nor traces are given"),
    ("pack_moe", ("--checkpoint=nowhere",), "nowhere: no config.json there"),
    ("pack_moe", ("--data=there",), "--data is given without --checkpoint"),
    ("quality", ("--model=nowhere/there",), "nowhere/there: no held_out.npz there"),
    ("offload", ("--engine=fused", "--miss=cpu"), "--miss cpu: --engine fused runs no experts on the host"),
    ("offload", ("--miss=split",), "--miss split: it divides misses by simulated time"),
    ("sweep", ("--miss=split",), "--miss split: it divides misses by time, expected --hardware"),
    ("sweep", ("--miss=cascade",), "--miss cascade: it needs several stored precisions"),
    ("sweep", ("--hardware=rtx4090:overlap=0",), "unknown field in hardware 'rtx4090:overlap=0'"),
    ("offload", ("--batch=2",), "--batch 2: only --engine fused decodes requests together"),
    ("offload", ("--batch=3", "--engine=fused"), "--batch 3: expected at most the 2 --requests"),
    ("offload", ("--miss=cascade",), "--miss cascade: expected at least two --precisions"),
    ("offload", ("--checkpoint=nowhere",), "nowhere: no config.json there"),
    ("capture", ("--model=nowhere", "--prompts=p.txt"), "nowhere: no config.json there"),
    ("evaluate_learned", ("--links=0.5,0",), "link is 0, expected layer times above 0"),
    ("evaluate_learned", ("--capacities=5 parsecs",), "capacity '5 parsecs' has an unknown unit"),
]


@pytest.mark.parametrize(("command", "given", "message"), TOGETHER, ids=str)
def test_what_does_not_go_together_is_told_before_older_results(
    run: Run, tmp_path: Path, command: str, given: tuple[str, ...], message: str
) -> None:
    there = tmp_path / "out" / "rows.csv"
    there.parent.mkdir()
    there.write_text("rows\n")
    status, out, err = run(command, "--smoke", "--out", "out", *given)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "rows.csv"]


# ------------------------------------------------------------------------------------------------------ the mechanism


@dataclass(frozen=True)
class Part:
    depth: int = 3

    def check(self) -> None:
        if self.depth > 9:
            raise SpecmdError(f"depth is {self.depth}, expected at most 9")


@dataclass(frozen=True)
class Toy(Settings):
    """One field of each kind."""

    request_tokens: int = option(96, "requests are cut to 100 % of so many", least=1)
    share: float = option(0.5, "of all", above=0, below=1, metavar="SHARE")
    limit: float | None = option(None, "at most", above=0, shown="none")
    lossy: bool = option(False, "also lossy rules")
    evictions: tuple[str, ...] = option(("lru", "lfu"), "policies", names=EVICTIONS, alias="eviction")
    sizes: tuple[int, ...] = option((1, 2), "sizes", least=1, may_be_empty=True)
    hidden: int = fixed(7, "no option", least=1)

    def smoke(self) -> Toy:
        return Toy(request_tokens=2, hidden=1)

    def check(self) -> None:
        if self.request_tokens == 13:
            raise SpecmdError("13 brings bad luck")


def _toy(*given: str) -> Any:
    options = parser("", "toy")
    options_of(options, Toy())
    return settings_of(options.parse_args([*given]), Toy())


def test_without_options_the_settings_are_the_defaults_or_the_smoke_run() -> None:
    assert _toy() == Toy()
    assert _toy("--smoke") == Toy(request_tokens=2, hidden=1)
    assert _toy("--smoke", "--request-tokens", "5") == Toy(request_tokens=5, hidden=1)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("--share=0.25", "--limit", "4", "--lossy"), Toy(share=0.25, limit=4.0, lossy=True)),
        (("--evictions", "LFU, lru,lfu"), Toy(evictions=("lfu", "lru"))),  # in any case, and once each
        (("--eviction", "belady"), Toy(evictions=("belady",))),
        (("--sizes", "4,5"), Toy(sizes=(4, 5))),
        (("--sizes", ""), Toy(sizes=())),
    ],
)
def test_options_become_settings(given: tuple[str, ...], wanted: Toy) -> None:
    assert _toy(*given) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--request-tokens=0", "request_tokens is 0, expected at least 1"),
        ("--request-tokens=13", "13 brings bad luck"),
        ("--share=0", "share is 0.0, expected above 0"),
        ("--share=1", "share is 1.0, expected below 1"),
        ("--share=nan", "share is nan, expected a finite number"),
        ("--sizes=2,0", "sizes is 0, expected at least 1"),
        ("--evictions=lru,lfo", "unknown eviction policy 'lfo'; did you mean 'lfu'?"),
    ],
)
def test_settings_out_of_range_are_refused(given: str, message: str) -> None:
    with pytest.raises(SpecmdError, match=re.escape(message)):
        _toy(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--request-tokens=many", "argument --request-tokens: invalid int value: 'many'"),
        ("--sizes=1,b", "argument --sizes: invalid list of int values: '1,b'"),
        ("--evictions=,", "argument --evictions: ',' names nothing, expected one or more with commas between"),
        ("--hidden=3", "unrecognized arguments: --hidden=3"),
    ],
)
def test_what_is_no_value_is_one_line(given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _toy(given)
    assert capsys.readouterr().err == f"error: {message} (see python -m experiments.toy --help)\n"


def test_the_help_of_each_kind() -> None:
    options = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=10_000))
    options_of(options, Toy())
    out = options.format_help()
    assert re.search(r"--request-tokens N +requests are cut to 100 % of so many \(default: 96\)\n", out)
    assert re.search(r"--share SHARE +of all \(default: 0.5\)\n", out)
    assert re.search(r"--limit X +at most \(default: none\)\n", out)
    assert re.search(r"--lossy +also lossy rules \(default: off\)\n", out)
    assert re.search(r"--evictions A,B +policies; some of: lru, .*belady.* \(default: lru,lfu\)\n", out)
    assert re.search(r"--sizes A,B +sizes \(default: 1,2\)\n", out)
    assert "--hidden" not in out and "--eviction " not in out


def test_names_are_found_in_any_case_or_are_files(tmp_path: Path) -> None:
    assert HARDWARE.find("PCIe4-x16") == "pcie4-x16"
    assert HARDWARE.find("PCIe4-x16:FreeToken:sync_s=1e-5") == "pcie4-x16:FreeToken:sync_s=1e-5"
    mine = tmp_path / "mine.npz"
    mine.touch()
    assert TRACES.find(str(mine)) == str(mine)
    with pytest.raises(SpecmdError, match=r"gone\.npz: no such file"):
        TRACES.find("gone.npz")
    with pytest.raises(SpecmdError, match="unknown trace 'gpt-oss'; did you mean 'gpt-oss-20b'"):
        TRACES.find("gpt-oss")


def test_an_empty_list_is_refused_in_a_program_too() -> None:
    with pytest.raises(SpecmdError, match="evictions is empty, expected at least one"):
        Toy(evictions=()).checked()
