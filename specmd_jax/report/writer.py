"""Writes a folder of results: ``rows.csv`` and ``manifest.json``, which has its columns and says where it is from.

Rows are appended as they are computed, so that an interrupted run loses nothing and is continued by running it again.
Imports neither jax nor numpy.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.files import file_sha256, replace_text
from specmd_jax.report.columns import Scalar, Table, cell_text, described
from specmd_jax.report.provenance import code, command, git_commit, versions
from specmd_jax.report.reader import FORMAT, MANIFEST, ROWS, digest_of, parse_rows, read_manifest, whole_lines


class ResultWriter:
    """Appends rows to ``out_dir/rows.csv``; a context manager.

    `config` (anything that JSON can hold) says what is computed and `trace_sha256` on what. A folder that holds a
    table of the same config by the same code is continued: `write` skips cells whose `key` is already there, and a
    last line that was cut off is dropped. Leaving the context normally marks the manifest complete; leaving it by an
    exception (Ctrl-C as well) keeps every row and leaves it incomplete. Nothing is touched before the first row: a run
    that fails at once leaves no trace and destroys nothing.

    Raises `SpecmdError` if the folder holds something else and `overwrite` is not set; if its rows were made by other
    code and neither `resume` (keep them) nor `overwrite` is set; or if another run is writing to it.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        config: Mapping[str, Any],
        table: Table,
        overwrite: bool = False,
        resume: bool = False,
        trace_sha256: str | None = None,
    ) -> None:
        for name in table.key:
            if name not in table.columns:
                raise unknown("key column", name, table.columns)
        self.out_dir = Path(out_dir)
        self.table = table
        self._config = json.loads(json.dumps(config))  # what the manifest will give back
        self._trace_sha256 = trace_sha256
        self._overwrite, self._resume = overwrite, resume
        self._seen: set[tuple[Scalar, ...]] = set()
        self._file: TextIO | None = None
        self._manifest: dict[str, Any] = {}

    @property
    def rows(self) -> int:
        """Rows in the table so far, those of an earlier run included."""
        return len(self._seen)

    def has(self, row: Mapping[str, Scalar]) -> bool:
        """Whether the cell that `row` (its key columns are enough) belongs to is in the table."""
        return tuple(row[name] for name in self.table.key) in self._seen

    def __enter__(self) -> ResultWriter:
        if self._earlier_manifest() is not None:
            self._seen = self._cells()
        return self

    def write(self, row: Mapping[str, Scalar]) -> bool:
        """Appends `row` unless its cell is there; says whether it did. On return the row outlives this process."""
        line = [cell_text(name, column.kind, _get(row, name)) for name, column in self.table.columns.items()]
        if len(row) != len(self.table.columns):
            raise unknown("column", next(name for name in row if name not in self.table.columns), self.table.columns)
        file = self._begun()
        if self.has(row):
            return False
        with _named(self.out_dir / ROWS):
            file.write(_csv_line(line))
            file.flush()
        self._seen.add(tuple(row[name] for name in self.table.key))
        return True

    def begin(self) -> None:
        """Makes the folder, or takes it over, before the first row: for a study that keeps other files there."""
        self._begun()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None and kind is not None:
            return
        file = self._begun()
        with _named(self.out_dir / ROWS):
            try:
                file.flush()
                os.fsync(file.fileno())
                self._manifest |= {"complete": kind is None, "finished": _now(), "rows": self.rows}
                self._manifest["rows_sha256"] = file_sha256(self.out_dir / ROWS)
                self._write_manifest()  # while the lock is still held
            finally:
                self._file = None
                file.close()  # tries again to write what a full disk refused, and fails again

    def _begun(self) -> TextIO:
        """Gives the locked rows file behind its last whole line; the first call makes or takes over the folder."""
        if self._file is not None:
            return self._file
        with _named(self.out_dir):
            self.out_dir.mkdir(parents=True, exist_ok=True)
        path = self.out_dir / ROWS
        file = path.open("a", encoding="utf-8", newline="")
        try:
            _lock(file, self.out_dir)
            earlier = self._earlier_manifest()
            if earlier is None:
                file.truncate(0)  # before the manifest: old rows must never lie beside a new one
                for pattern in self.table.beside:
                    for made in self.out_dir.glob(pattern):
                        made.unlink()
                self._manifest = self._fresh_manifest()
            else:
                now = {"study": self.table.name, "complete": False, "finished": None}
                self._manifest = earlier | now | _made_by()
            self._write_manifest()
            file.truncate(len(whole_lines(path)))
            if path.stat().st_size == 0:
                with _named(path):
                    file.write(_csv_line(list(self.table.columns)))
                    file.flush()
            self._seen = self._cells()
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            raise
        self._file = file
        return file

    def _cells(self) -> set[tuple[Scalar, ...]]:
        """Gives the cells that the table on disk has."""
        path, kinds = self.out_dir / ROWS, {name: column.kind for name, column in self.table.columns.items()}
        return {tuple(row[name] for name in self.table.key) for row in parse_rows(path, kinds)}

    def _earlier_manifest(self) -> dict[str, Any] | None:
        """Gives the manifest of the table to continue; None: begin a new one."""
        if os.path.exists(self.out_dir) and not os.path.isdir(self.out_dir):
            raise SpecmdError(f"{self.out_dir}: expected a folder for the results, found a file")
        if not os.path.exists(self.out_dir) or not any(map(_matters, self.out_dir.iterdir())):
            return None
        if not (self.out_dir / MANIFEST).exists():
            raise SpecmdError(f"{self.out_dir} is not empty and holds no {MANIFEST}: choose another folder")
        if self._overwrite:
            return None
        earlier = read_manifest(self.out_dir)
        fresh = self._fresh_manifest()
        if earlier["config_sha256"] != fresh["config_sha256"]:
            raise SpecmdError(
                f"{self.out_dir} holds results of another config ({_difference(earlier, fresh)}): "
                "use --overwrite to replace them, or another --out"
            )
        if code(earlier) != code(fresh) and not self._resume:
            raise SpecmdError(
                f"{self.out_dir} holds results made by other code ({code(earlier)}, now {code(fresh)}): "
                "use --overwrite to replace them, or --resume to keep them and add what is missing"
            )
        return earlier

    def _fresh_manifest(self) -> dict[str, Any]:
        told = {"config": self._config, "columns": described(self.table.columns), "trace_sha256": self._trace_sha256}
        return {
            "format": FORMAT,
            "study": self.table.name,
            "complete": False,
            "rows": 0,
            **_made_by(),
            "started": _now(),
            "finished": None,
            "config_sha256": digest_of(told),
            "key": list(self.table.key),
            **told,
        }

    def _write_manifest(self) -> None:
        replace_text(self.out_dir / MANIFEST, json.dumps(self._manifest, indent=2) + "\n")


def _get(row: Mapping[str, Scalar], name: str) -> Scalar:
    if name not in row:
        raise SpecmdError(f"a row lacks the column {name!r} (use None for an empty cell)")
    return row[name]


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _difference(earlier: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """Gives what tells two manifests apart, in a few words."""
    old, new = earlier["config"], fresh["config"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if earlier.get("trace_sha256") != fresh["trace_sha256"]:
        names.append("trace")
    if earlier["columns"] != fresh["columns"]:
        names.append("columns")
    return f"other {', '.join(names)}"


def _matters(path: Path) -> bool:
    """Whether a file shows that a folder is in use, not that a run died before it had written its manifest."""
    return not (path.name.startswith(f".{MANIFEST}.") or (path.name == ROWS and path.stat().st_size == 0))


def _made_by() -> dict[str, Any]:
    return {"command": command(), "versions": versions(), "git_commit": git_commit()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes a `SpecmdError` that names the file of an error that does not, as those of an open file."""
    try:
        yield
    except OSError as error:
        raise SpecmdError(f"{path}: cannot write: {error.strerror or error}") from error


def _lock(file: TextIO, out_dir: Path) -> None:
    """Holds `file` for this process until it is closed; the lock of a process that dies goes with it."""
    if sys.platform == "win32":
        return  # an open file cannot be replaced or deleted there anyway
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SpecmdError(f"{out_dir}: another run is writing here; wait for it or choose another --out") from None
