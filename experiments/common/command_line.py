"""What every command line of this project shares: the common options and one way to end on an error."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn

from experiments.common.config_file import fixed_values, is_model, read_config, typed
from experiments.common.program import as_typed, program
from specmd_jax.errors import SpecmdError, one_line
from specmd_jax.files import require_writable
from specmd_jax.report.reader import read_rows

FORMATS = ("table", "json", "csv")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _Parser(argparse.ArgumentParser):
    """Prints a bad option as the same single `error: ...` line as any other bad input, and reads ``--config FILE``."""

    fixed: Mapping[str, Field[Any]] = {}  # settings that are no options, which a file may have, too
    of_model = False  # whether a model's config.json given as --config is meant as --model

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Gives the options that were typed, and what the file of ``--config`` says of the others.

        `given_fixed` has settings from the file that are no options.
        """
        argv = list(sys.argv[1:] if args is None else args)
        parsed = super().parse_args(argv, namespace)
        parsed.parser, parsed.given_fixed = self, {}
        path = getattr(parsed, "config", None)
        if path is None:
            return parsed
        config = read_config(path / "config.json" if self.of_model and path.is_dir() else path)
        if self.of_model and is_model(config):
            words = [] if getattr(parsed, "model", None) is not None else [f"--model={path}"]
        else:
            words = typed(path, config, self, argv)
        parsed = super().parse_args([*words, *argv])
        parsed.parser, parsed.given_fixed = self, fixed_values(path, config, self.fixed)
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {one_line(message)} (see {self.prog} --help)\n")


def bare_parser(doc: str | None, name: str) -> _Parser:
    """Makes the parser of ``experiments.<name>`` without options; its help is the module docstring `doc`."""
    return _Parser(
        prog=program(name),
        description=as_typed((doc or "").strip()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parser(doc: str | None, name: str, *, resume: bool = False, formats: Sequence[str] = FORMATS) -> _Parser:
    """Makes the argument parser of a study, which leaves results; the caller adds its own options.

    Has ``--out DIR`` (a `Path`, default ``results/<name>``), ``--smoke``, ``--overwrite``, ``--config``,
    ``--print-config``, with `formats` ``--format`` and, if `resume`, ``--resume``.
    """
    result = bare_parser(doc, name)
    result.usage = f"{result.prog} [options]"
    common = result.add_argument_group("common options")
    folder_options(common, Path("results") / name, resume=resume)
    common.add_argument("--smoke", action="store_true", help="a tiny run that takes seconds, to see that it works")
    if formats:
        format_option(common, formats)
    config_options(common)
    return result


def folder_options(options: argparse._ActionsContainer, default: Path | None = None, *, resume: bool = True) -> None:
    """Adds ``--out DIR`` (a `Path`; without a `default` nothing is written unless it is given), ``--overwrite`` and, if
    `resume`, ``--resume``.
    """
    options.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=default,
        help=f"folder for the results (default: {'none' if default is None else default.as_posix()})",
    )
    options.add_argument("--overwrite", action="store_true", help="replace results that are already there")
    if resume:
        options.add_argument("--resume", action="store_true", help="continue a table even if other code began it")


def file_options(options: argparse._ActionsContainer, help: str) -> None:
    """Adds the file that a command writes, ``OUT`` or ``--out OUT``, and ``--overwrite``; `file_of` gives it."""
    options.add_argument("target", type=Path, metavar="OUT", nargs="?", help=help)
    options.add_argument("--out", type=Path, metavar="OUT", help="the same")
    options.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def file_of(args: argparse.Namespace) -> Path:
    """Gives the file to write. Raises `SpecmdError`, before any work, if there is none or it may not be replaced."""
    if (args.target is None) == (args.out is None):
        raise SpecmdError("expected one file to write, as OUT or as --out OUT")
    path: Path = args.out if args.target is None else args.target
    if os.path.exists(path) and not args.overwrite:
        raise SpecmdError(f"{path}: already exists; --overwrite replaces it")
    require_writable(path.parent)
    return path


def format_option(options: argparse._ActionsContainer, formats: Sequence[str] = FORMATS) -> None:
    """Adds ``--format``, for `printing`."""
    options.add_argument(
        "--format",
        choices=formats,
        default=formats[0],
        help=f"what is printed: {', '.join(formats)} (default: {formats[0]}); but for a table everything else that is "
        "told goes to stderr",
    )


def config_options(options: argparse._ActionsContainer) -> None:
    """Adds ``--config`` and ``--print-config``."""
    options.add_argument(
        "--config", type=Path, metavar="FILE", help="options from a JSON or TOML file; those that are typed win"
    )
    options.add_argument(
        "--print-config", action="store_true", help="print what would be used, as --config reads it, and do nothing"
    )


def print_settings(args: argparse.Namespace, settings: Mapping[str, Any] | None = None) -> None:
    """With ``--print-config`` prints the settings, and the other options that were given, as JSON, and ends."""
    if not args.print_config:
        return
    apart = {"parser", "given_fixed", "config", "print_config", "smoke"}  # a smoke run is in its settings
    apart |= {action.dest for action in args.parser._actions if not action.option_strings}  # always typed
    own = {name: value for name, value in vars(args).items() if name not in apart and value not in (None, False)}
    print(json.dumps(own | dict(settings or {}), indent=2, default=str))
    sys.stdout.flush()
    sys.exit(0)


@contextlib.contextmanager
def printing(args: argparse.Namespace, out: Path | None) -> Iterator[None]:
    """What a command prints as its ``--format`` says: text as it comes, or in the end the rows in `out` and no more.

    `out` is a result folder, or a file that is JSON already.
    """
    if args.format == "table" or out is None:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
    print(out.read_text(encoding="utf-8").rstrip() if out.is_file() else rows_as(args.format, read_rows(out)))


def rows_as(format: str, rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> str:
    """Gives rows (or one of them) as "json" or "csv"; a cell without a value is null, or empty."""
    if format == "json":
        return json.dumps(_finite(rows), default=str)
    many = [rows] if isinstance(rows, Mapping) else rows
    text = io.StringIO()
    table = csv.DictWriter(text, list(many[0]) if many else [], lineterminator="\n")
    table.writeheader()
    table.writerows(many)
    return text.getvalue().rstrip("\n")


def _finite(value: Any) -> Any:
    """Gives a value as strict JSON has it: infinite numbers as text, and null for what is none."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def results_folder(options: argparse.ArgumentParser, args: argparse.Namespace) -> Path:
    """Gives ``args.out``; if a smoke run names none, its own folder: never beside, or instead of, the real table.

    Raises `SpecmdError` if it cannot be written to.
    """
    out: Path = args.out
    smoke = args.smoke and out == options.get_default("out")
    out = out.parent / "smoke" / out.name if smoke else out
    require_writable(out)
    return out


def output_paths(out: Path, overwrite: bool, *names: str) -> list[Path]:
    """Paths of the files `names` in the folder `out`, which need not exist yet.

    Raises `SpecmdError` if one of them exists and may not be replaced (`overwrite`), or if `out` is no folder.
    """
    if out.exists() and not out.is_dir():
        raise SpecmdError(f"{out}: expected a folder for the results, found a file")
    paths = [out / name for name in names]
    for path in paths:
        if path.exists() and not overwrite:
            raise SpecmdError(f"{path} already exists: choose another --out or add --overwrite")
    return paths


def keep_compiled() -> None:
    """Keeps compiled programs for the next run in the user's cache folder, unless JAX was told where to keep them.

    ``JAX_ENABLE_COMPILATION_CACHE=0`` turns it off, ``JAX_COMPILATION_CACHE_DIR`` chooses another folder.
    """
    told = {
        "jax_compilation_cache_dir": str(cache_folder()),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    jax: Any = sys.modules.get("jax")
    if jax is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # JAX reads them when it is imported
        os.environ.update({name.upper(): str(value) for name, value in told.items()})
    elif jax is not None and jax.config.jax_compilation_cache_dir is None:
        for name, value in told.items():
            jax.config.update(name, value)


def cache_folder() -> Path:
    """Gives where compiled programs are kept, unless JAX was told another place."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "specmd-jax" / "xla"


def main_guard(main: Callable[[], None]) -> None:
    """Runs `main`; ends bad input, an interrupt or a closed pipe with one line at most and a fixed exit status.

    Compiled programs are kept (`keep_compiled`). `SpecmdError` and `OSError` (a file that cannot be read or written)
    exit with 2 and ``error: ...`` on stderr, an interrupt with 130, a closed pipe silently with 141. Anything else is
    a bug and keeps its traceback.
    """
    keep_compiled()
    try:
        main()
        sys.stdout.flush()  # a closed pipe shows itself here, not while the interpreter shuts down
    except SpecmdError as error:
        _end(EXIT_BAD_INPUT, f"error: {error}")
    except KeyboardInterrupt:
        _end(EXIT_INTERRUPTED, "error: interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush cannot fail again
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        _end(EXIT_BAD_INPUT, f"error: {place}{error.strerror or error}")


def _end(status: int, message: str) -> NoReturn:
    print(one_line(message), file=sys.stderr)
    sys.exit(status)
