"""`--config FILE`, `--print-config` and `--format`: alike for every command."""

from __future__ import annotations

import csv
import io
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from configs.recommend import RecommendConfig
from configs.study import StudyConfig
from configs.sweep import SweepConfig
from experiments import export_trace, import_trace, report
from experiments.common.command_line import parser, printing
from experiments.common.options import options_of, settings_of
from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Column, Table
from specmd_jax.report.frames import read_table
from specmd_jax.report.writer import ResultWriter
from specmd_jax.specs.models import model as find_model


def _asked(kind: type, file: Path, text: str, *typed: str) -> object:
    file.write_text(text)
    options = parser("", "toy")
    options.of_model = kind is RecommendConfig
    options_of(options, kind())
    return settings_of(options.parse_args(["--config", str(file), *typed]), kind())


def test_a_file_says_what_is_not_typed(tmp_path: Path) -> None:
    text = (
        '{"tokens": 50, "evictions": ["lru", "belady"], "reset-per-request": true, "pin_share": 0, "phase": "decode"}'
    )
    found = _asked(SweepConfig, tmp_path / "a.json", text, "--tokens", "70")
    assert isinstance(found, SweepConfig)
    assert (found.tokens, found.evictions, found.reset_per_request) == (70, ("lru", "belady"), True)
    assert (found.pin_share, found.phase) == (0.0, "decode")
    toml = 'capacities = 6\nprefetch = "none"\n"values" = 3\n'
    assert _asked(StudyConfig, tmp_path / "a.toml", toml) == StudyConfig(capacities=6, prefetches=("none",), values=3)


def test_settings_that_are_no_options_can_be_in_a_file(tmp_path: Path) -> None:
    found = _asked(RecommendConfig, tmp_path / "a.json", '{"shares_pct": [10, 20], "seed": 3}')
    assert isinstance(found, RecommendConfig) and (found.shares_pct, found.seed) == ((10.0, 20.0), 3)
    with pytest.raises(SpecmdError, match=r"a\.json: seed is 'x', expected such as 0"):
        _asked(RecommendConfig, tmp_path / "a.json", '{"seed": "x"}')


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"tokns": 5}', r"a\.json: unknown setting 'tokns'; did you mean 'tokens'\? \(see "),
        ("a.json", "[1]", r"a\.json: expected an object with options by name, found list"),
        ("a.json", "tokens = 5", r"a\.json: expected JSON, or TOML in a file that ends in \.toml"),
        ("a.toml", '{"tokens": 5}', r"a\.toml: expected JSON, or TOML"),
        ("a.json", '{"reset_per_request": 3}', r"a\.json: reset_per_request is 3, expected true or false"),
        ("a.json", '{"tokens": true}', r"a\.json: tokens is true, expected a value"),
        ("a.json", '{"tokens": -1}', r"tokens is -1, expected at least 0"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SpecmdError, match=message):
        _asked(SweepConfig, tmp_path / name, text)


@pytest.mark.parametrize("kind", [SweepConfig, RecommendConfig])
def test_what_is_printed_can_be_read_again(tmp_path: Path, kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    options = parser("", "toy")
    options_of(options, kind())
    with pytest.raises(SystemExit, match="0"):
        settings_of(options.parse_args(["--smoke", "--print-config", "--evictions", "belady"]), kind())
    told = capsys.readouterr().out
    read = _asked(kind, tmp_path / "again.json", told)
    assert read == settings_of(options.parse_args(["--smoke", "--evictions", "belady"]), kind())


def test_a_models_config_json_is_the_model(tmp_path: Path) -> None:
    text = json.dumps({"model_type": "mixtral"})
    with pytest.raises(SpecmdError) as caught:  # it is read as a model, and lacks what a model has
        find_model(_asked(RecommendConfig, tmp_path / "config.json", text).model)  # type: ignore[attr-defined]
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ") and "setting" not in str(caught.value)


TABLE = Table("toy", {"name": Column("str", ""), "count": Column("int", ""), "rate": Column("float", "")}, ("name",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ResultWriter(tmp_path / "out", {}, TABLE) as writer:
        writer.write({"name": "a", "count": 3, "rate": 0.5})
        writer.write({"name": "b", "count": None, "rate": None})
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["table", "json", "csv"])
def test_rows_are_printed_in_the_format_asked_for(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = parser("", "toy").parse_args(["--format", kind])
    with printing(args, folder):
        print("for a person")
    out, err = capsys.readouterr()
    rows = [{"name": "a", "count": 3, "rate": 0.5}, {"name": "b", "count": None, "rate": None}]
    if kind == "table":
        assert (out, err) == ("for a person\n", "")
    elif kind == "json":
        assert (json.loads(out), err) == (rows, "for a person\n")
    else:
        assert [row["count"] for row in csv.DictReader(io.StringIO(out))] == ["3", ""] and err == "for a person\n"


def test_a_table_becomes_a_data_frame_where_pandas_is(folder: Path, tmp_path: Path) -> None:
    table = read_table(folder)
    try:
        pandas: Any = import_module("pandas")
    except ImportError:
        with pytest.raises(SpecmdError, match=r"pandas is not installed, expected it for a data frame"):
            table.to_pandas()
    else:
        frame = table.to_pandas()
        assert [str(kind) for kind in frame.dtypes] == ["string", "Int64", "float64"]
        assert frame["count"][0] == 3 and pandas.isna(frame["count"][1])
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        with pytest.raises(SpecmdError, match="pyarrow is not installed, expected it for a Parquet file"):
            table.write_parquet(tmp_path / "rows.parquet")
        assert not (tmp_path / "rows.parquet").exists()
    else:
        table.write_parquet(tmp_path / "rows.parquet")
        assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == list(table.rows)


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (import_trace, ["in.json", "out.npz", "--experts", "8"], {"experts": 8, "format": "auto"}),
        (export_trace, ["gpt-oss-20b", "--out", "out.bin", "--unit", "bytes"], {"out": "out.bin", "unit": "bytes"}),
        (report, ["results/sweep", "--format", "csv"], {"format": "csv"}),
    ],
)
def test_commands_that_are_no_studies_have_a_file_too(
    command: ModuleType, words: list[str], told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main([*words, "--print-config"])
    printed = capsys.readouterr().out
    assert told.items() <= json.loads(printed).items()
    (tmp_path / "asked.json").write_text(printed)
    typed = [word for word in words[: 1 + ("out.npz" in words)]]
    with pytest.raises(SystemExit, match="0"):
        command.main([*typed, "--config", str(tmp_path / "asked.json"), "--print-config"])
    assert json.loads(capsys.readouterr().out) == json.loads(printed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lru.json"], "expected one file to write, as OUT or as --out OUT"),
        (["lru.json", "a.npz", "--out", "b.npz"], "expected one file to write, as OUT or as --out OUT"),
        (["lru.json", "--out", "there.npz"], "there.npz: already exists; --overwrite replaces it"),
    ],
)
def test_the_file_to_write_is_named_once(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").touch()
    for command in (import_trace, export_trace):
        with pytest.raises(SpecmdError, match=f"^{message}$"):
            command.main(words)
