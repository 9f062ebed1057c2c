"""What all command lines share: options, one-line errors, exit statuses."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.common.command_line import main_guard, output_paths, parser, results_folder
from specmd_jax.errors import SpecmdError

ROOT = Path(__file__).resolve().parents[1]


def _ends(error: BaseException | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr of a program that ends with `error`."""

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        main_guard(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def test_bad_input_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert _ends(SpecmdError("trace.npz: token 3"), capsys) == (2, "error: trace.npz: token 3\n")
    assert _ends(SpecmdError("two\nlines"), capsys) == (2, "error: two lines\n")


def test_a_file_that_cannot_be_written_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert _ends(PermissionError(13, "Permission denied", "/x"), capsys) == (2, "error: /x: Permission denied\n")
    assert _ends(OSError("disk gone"), capsys) == (2, "error: disk gone\n")


def test_an_interrupt_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert _ends(KeyboardInterrupt(), capsys) == (130, "error: interrupted\n")


def test_success_and_bugs_pass_through() -> None:
    main_guard(lambda: None)
    with pytest.raises(ZeroDivisionError):
        main_guard(lambda: print(1 / 0))


def test_a_closed_pipe_is_quiet() -> None:
    script = "from experiments.common.command_line import main_guard\nmain_guard(lambda: print('line\\n' * 200_000))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_common_options() -> None:
    defaults = parser("What it shows.", "study").parse_args([])
    assert defaults.out == Path("results/study") and not defaults.smoke and not defaults.overwrite
    given = parser("", "study").parse_args(["--out", "x", "--smoke", "--overwrite"])
    assert given.out == Path("x") and given.smoke and given.overwrite


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser("What it shows.\n\n    a line kept as it is\n", "study").parse_args(["--help"])
    assert "What it shows.\n\n    a line kept as it is\n" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--nonsense"], ["--smok"], ["--out"], ["extra"]])
def test_a_bad_option_is_one_line_and_status_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser("", "study").parse_args(options)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


def test_results_are_not_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    table, figure = output_paths(out, False, "rows.csv", "figure.png")
    assert (table, figure) == (out / "rows.csv", out / "figure.png")
    assert not any(tmp_path.iterdir())  # a run that fails before it writes leaves nothing
    out.mkdir(parents=True)
    table.touch()
    with pytest.raises(SpecmdError, match=r"rows\.csv already exists: choose another --out or add --overwrite"):
        output_paths(out, False, "figure.png", "rows.csv")
    assert output_paths(out, True, "rows.csv") == [table]
    with pytest.raises(SpecmdError, match=r"rows\.csv: expected a folder"):
        output_paths(table, False, "more.csv")


def test_a_smoke_run_has_a_folder_of_its_own_unless_it_names_one() -> None:
    options = parser("", "study")
    for given, folder in (
        ([], "results/study"),
        (["--smoke"], "results/smoke/study"),
        (["--smoke", "--out", "mine"], "mine"),
        (["--out", "mine"], "mine"),
    ):
        assert results_folder(options, options.parse_args(given)) == Path(folder)


@pytest.mark.parametrize("name", ["paper", "least_stale"])
def test_a_read_only_folder_is_found_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # to root every folder is writable but on a read-only disk
    work = importlib.import_module(f"experiments.studies.{name}")
    for function in ("replay_all", "recorded", "synthetic"):
        monkeypatch.setattr(work, function, lambda *_, **__: pytest.fail("work begins"), raising=False)
    command = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SpecmdError, match=r"cannot write: .* is read-only, expected another folder$"):
        command.main(["--smoke", "--out", str(tmp_path / "out")])
