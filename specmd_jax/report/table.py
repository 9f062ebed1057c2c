"""Tidy results on disk: a folder with ``rows.csv``, ``manifest.json`` and whatever is drawn from them.

Rows are appended as they are computed, so that an interrupted run loses nothing and is continued by running it again.
The manifest says where the rows come from and gives each column its type. Imports neither jax nor numpy.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.files import replace_text

Scalar = int | float | str | bool | None
Row = dict[str, Scalar]

ROWS, MANIFEST, COUNTS, FIGURES, REPORT = "rows.csv", "manifest.json", "routing_counts.csv", "figures", "report.html"
FORMAT = 1

_KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


class Column(NamedTuple):
    """A column of a table: `kind` is one of int, float, str, bool; any cell may also be empty (None)."""

    kind: str
    meaning: str


SWEEP_COLUMNS: dict[str, Column] = {
    "model": Column("str", "model that the trace was captured from"),
    "eviction": Column("str", "eviction policy"),
    "scope": Column("str", "global: one pool of experts; layer: one pool a layer"),
    "contract": Column("str", "event, sequential or sequential-id"),
    "phase": Column("str", "passes that are counted: all, prefill or decode"),
    "batch": Column("int", "requests decoded together"),
    "hardware": Column("str", "hardware whose times are given; empty: none asked for"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_pct": Column("float", "cache size as a share of all experts, in %"),
    "capacity_slots": Column("int", "cache size in experts: how many always fit"),
    "capacity_slots_per_layer": Column("float", "cache size in experts a layer"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "demand": Column("int", "demanded experts, summed over visits"),
    "hits": Column("int", "demanded experts that were resident"),
    "hits_reuse": Column("int", "hits on experts that came in by demand, or were used since they came in"),
    "hits_prefetch": Column("int", "first hits on experts that came in by prefetch"),
    "hits_late": Column("int", "hits whose copy was still in flight"),
    "misses": Column("int", "demanded experts that were not resident"),
    "hit_rate": Column("float", "hits / demand, 0 to 1"),
    "collisions": Column("int", "misses on experts evicted earlier in the same pass"),
    "collision_rate": Column("float", "collisions / misses, 0 to 1"),
    "loads": Column("int", "experts copied to the device"),
    "evictions": Column("int", "experts removed from the device"),
    "bytes_demand": Column("int", "bytes copied on demand"),
    "bytes_prefetch_used": Column("int", "bytes copied ahead that were used"),
    "bytes_prefetch_wasted": Column("int", "bytes copied ahead that left unused"),
    "dropped": Column("int", "demanded experts that were skipped"),
    "substituted": Column("int", "demanded experts in whose place a resident one ran"),
    "on_host": Column("int", "demanded experts that ran on the host"),
    "rerouted": Column("int", "experts demanded only because of the routing policy"),
    "lost_mass": Column("float", "share of the gate mass dropped or moved: a proxy of the loss of quality"),
    "mean_bits": Column("float", "bits a weight of the experts that ran on the device"),
    "prefetch_precision": Column("float", "share of the predicted experts that were demanded"),
    "prefetch_recall": Column("float", "share of the demanded experts that had been predicted"),
    "ttft_s": Column("float", "mean time to the first token, seconds"),
    "tpot_s": Column("float", "mean time of a decode pass, seconds"),
    "tokens_per_s": Column("float", "tokens a second"),
    "stall_s": Column("float", "time that the device waits for experts, seconds in all"),
    "stall_late_s": Column("float", "stall on copies already in flight, seconds"),
    "stall_miss_s": Column("float", "stall on copies of missing experts, seconds"),
    "stall_link_busy_s": Column("float", "stall because the link was still busy, seconds"),
    "link_utilisation": Column("float", "share of the time that the link copies"),
    "gap_closed": Column("float", "share of the hits between lru and belady that this policy gains, 1 is belady"),
    "tokens": Column("int", "tokens replayed"),
    "evidence": Column("str", "simulated or measured"),
}
"""Columns of a sweep's table."""

SWEEP_KEY = ("model", "eviction", "scope", "contract", "phase", "batch", "hardware", "capacity_bytes")
"""Columns that tell a sweep's cells apart."""


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
        columns: Mapping[str, Column],
        overwrite: bool = False,
        resume: bool = False,
        key: Sequence[str] = SWEEP_KEY,
        trace_sha256: str | None = None,
    ) -> None:
        for name in key:
            if name not in columns:
                raise unknown("key column", name, columns)
        self.out_dir = Path(out_dir)
        self.columns = dict(columns)
        self.key = tuple(key)
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
        return tuple(row[name] for name in self.key) in self._seen

    def __enter__(self) -> ResultWriter:
        if self._earlier_manifest() is not None:
            self._seen = self._cells()
        return self

    def write(self, row: Mapping[str, Scalar]) -> bool:
        """Append `row` unless its cell is there; says whether it did. On return the row outlives this process."""
        line = [_format(name, column.kind, _get(row, name)) for name, column in self.columns.items()]
        if len(row) != len(self.columns):
            raise unknown("column", next(name for name in row if name not in self.columns), self.columns)
        file = self._begun()
        if self.has(row):
            return False
        file.write(_csv_line(line))
        file.flush()
        self._seen.add(tuple(row[name] for name in self.key))
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None and kind is not None:
            return
        file = self._begun()
        try:
            file.flush()
            os.fsync(file.fileno())
            self._manifest |= {"complete": kind is None, "finished": _now(), "rows": self.rows}
            self._write_manifest()  # while the lock is still held
        finally:
            file.close()
            self._file = None

    def _begun(self) -> TextIO:
        """The locked rows file behind its last whole line; the first call makes or takes over the folder."""
        if self._file is not None:
            return self._file
        self.out_dir.mkdir(parents=True, exist_ok=True)
        path = self.out_dir / ROWS
        file = path.open("a", encoding="utf-8", newline="")
        try:
            _lock(file, self.out_dir)
            earlier = self._earlier_manifest()
            if earlier is None:
                file.truncate(0)  # before the manifest: old rows must never lie beside a new one
                for drawn in [*self.out_dir.glob(f"{FIGURES}/*.png"), self.out_dir / REPORT, self.out_dir / COUNTS]:
                    drawn.unlink(missing_ok=True)
                self._manifest = self._fresh_manifest()
            else:
                now = {"command": _command(), "versions": versions(), "git_commit": git_commit()}
                self._manifest = earlier | now | {"complete": False, "finished": None}
            self._write_manifest()
            file.truncate(len(_whole_lines(path)))
            if path.stat().st_size == 0:
                file.write(_csv_line(list(self.columns)))
                file.flush()
            self._seen = self._cells()
        except BaseException:
            file.close()
            raise
        self._file = file
        return file

    def _cells(self) -> set[tuple[Scalar, ...]]:
        """Cells that the table on disk has."""
        path, kinds = self.out_dir / ROWS, {name: column.kind for name, column in self.columns.items()}
        return {tuple(row[name] for name in self.key) for row in _parse(_whole_lines(path).decode(), path, kinds)}

    def _earlier_manifest(self) -> dict[str, Any] | None:
        """Manifest of the table to continue; None: begin a new one."""
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise SpecmdError(f"{self.out_dir}: expected a folder for the results, found a file")
        if not self.out_dir.exists() or not any(map(_matters, self.out_dir.iterdir())):
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
        if _code(earlier) != _code(fresh) and not self._resume:
            raise SpecmdError(
                f"{self.out_dir} holds results made by other code ({_code(earlier)}, now {_code(fresh)}): "
                "use --overwrite to replace them, or --resume to keep them and add what is missing"
            )
        return earlier

    def _fresh_manifest(self) -> dict[str, Any]:
        described = {"config": self._config, "columns": _described(self.columns), "trace_sha256": self._trace_sha256}
        return {
            "format": FORMAT,
            "complete": False,
            "rows": 0,
            "command": _command(),
            "started": _now(),
            "finished": None,
            "versions": versions(),
            "git_commit": git_commit(),
            "config_sha256": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
            "key": list(self.key),
            **described,
        }

    def _write_manifest(self) -> None:
        replace_text(self.out_dir / MANIFEST, json.dumps(self._manifest, indent=2) + "\n")


def read_manifest(out_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a result folder. Raises `SpecmdError` if there is none or it cannot be read."""
    path = Path(out_dir) / MANIFEST
    if not path.is_file():
        raise SpecmdError(f"{out_dir}: no results here (expected {MANIFEST} and {ROWS})")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecmdError(f"{path}: expected JSON: {error}") from None
    wanted = ("format", "config_sha256", "config", "columns", "key", "complete")
    missing = [name for name in wanted if not isinstance(manifest, dict) or name not in manifest]
    if missing:
        raise SpecmdError(f"{path}: expected a result manifest, but it lacks {', '.join(missing)}")
    if manifest["format"] != FORMAT:
        raise SpecmdError(f"{path}: format {manifest['format']!r}, expected {FORMAT}")
    return manifest


def read_rows(path: str | os.PathLike[str], columns: Iterable[str] | None = None) -> list[Row]:
    """Rows of a result folder (or of the ``rows.csv`` in one), in file order, with the types that were written.

    `columns` picks some of them. A half-written last line, of a run that was killed or still goes on, is left out.
    Raises `SpecmdError` for a folder without results, an unknown column (it lists the known ones) or a damaged line.
    """
    out_dir = Path(path).parent if Path(path).name == ROWS else Path(path)
    kinds = {name: column["kind"] for name, column in read_manifest(out_dir)["columns"].items()}
    wanted = list(kinds if columns is None else columns)
    for name in wanted:
        if name not in kinds:
            raise unknown("column", name, kinds)
    file = out_dir / ROWS
    if not file.is_file():
        raise SpecmdError(f"{out_dir}: no {ROWS} beside {MANIFEST}")
    rows = _parse(_whole_lines(file).decode(), file, kinds)
    return rows if columns is None else [{name: row[name] for name in wanted} for row in rows]


def write_counts(path: str | os.PathLike[str], counts: Sequence[Sequence[int]]) -> None:
    """Write an [L, E] table of counts, a line a layer, as CSV."""
    lines = [",".join(str(int(value)) for value in layer) for layer in counts]
    replace_text(path, "\n".join(lines) + "\n")


def read_counts(path: str | os.PathLike[str]) -> list[list[int]]:
    """The [L, E] counts that `write_counts` wrote. Raises `SpecmdError` naming the first line that is not one."""
    counts: list[list[int]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            counts.append([int(cell) for cell in line.split(",")])
        except ValueError:
            raise SpecmdError(f"{path}, line {number}: expected whole numbers, got {line[:60]!r}") from None
        if len(counts[-1]) != len(counts[0]):
            raise SpecmdError(f"{path}, line {number}: {len(counts[-1])} counts, expected {len(counts[0])}")
    if not counts:
        raise SpecmdError(f"{path}: empty, expected a line of counts for each layer")
    return counts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, found without importing them."""
    found = {"python": platform.python_version()}
    for package in ("specmd-jax", "jax", "jaxlib", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit that this code is at, with ``-dirty`` behind it if tracked files changed; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # e.g. installed inside somebody else's checkout
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _whole_lines(path: Path) -> bytes:
    """A table without a half-written last line; nothing if there is no table yet."""
    whole = path.read_bytes() if path.exists() else b""
    return whole[: whole.rfind(b"\n") + 1]


def _parse(text: str, path: Path, kinds: Mapping[str, str]) -> list[Row]:
    rows: list[Row] = []
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, None)
    if header is not None and header != list(kinds):
        raise SpecmdError(f"{path}: its header is not the columns of {MANIFEST}")
    for cells in reader:
        if len(cells) != len(kinds):
            raise SpecmdError(f"{path}, line {reader.line_num}: {len(cells)} cells, expected {len(kinds)}")
        row: Row = {}
        for (name, kind), cell in zip(kinds.items(), cells, strict=True):
            try:
                row[name] = _value(kind, cell)
            except ValueError:
                place = f"{path}, line {reader.line_num}, column {name}"
                raise SpecmdError(f"{place}: expected {kind}, got {cell!r}") from None
        rows.append(row)
    return rows


def _value(kind: str, cell: str) -> Scalar:
    if cell == "":
        return None
    if kind == "bool":
        if cell not in ("True", "False"):
            raise ValueError
        return cell == "True"
    if kind == "str":
        return cell
    return int(cell) if kind == "int" else float(cell)


def _format(name: str, kind: str, value: Scalar) -> str:
    if value is None:
        return ""
    accepted = (int, float) if kind == "float" else _KINDS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        raise SpecmdError(f"column {name}: expected {kind}, got {type(value).__name__} {value!r}")
    if isinstance(value, str) and (value == "" or "\n" in value or "\r" in value):
        raise SpecmdError(f"column {name}: expected one line of text, got {value!r}")
    return repr(float(value)) if kind == "float" else str(value)


def _get(row: Mapping[str, Scalar], name: str) -> Scalar:
    if name not in row:
        raise SpecmdError(f"a row lacks the column {name!r} (use None for an empty cell)")
    return row[name]


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _described(columns: Mapping[str, Column]) -> dict[str, dict[str, str]]:
    for name, column in columns.items():
        if column.kind not in _KINDS:
            raise unknown(f"kind of column {name}", column.kind, _KINDS)
    return {name: column._asdict() for name, column in columns.items()}


def _difference(earlier: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """What tells two manifests apart, in a few words."""
    old, new = earlier["config"], fresh["config"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if earlier.get("trace_sha256") != fresh["trace_sha256"]:
        names.append("trace")
    if earlier["columns"] != fresh["columns"]:
        names.append("columns")
    return f"other {', '.join(names)}"


def _code(manifest: Mapping[str, Any]) -> str:
    version = manifest.get("versions", {}).get("specmd-jax", "unknown")
    commit, dirty, _ = (manifest.get("git_commit") or "unknown").partition("-dirty")
    return f"version {version}, commit {commit[:12]}{dirty}"


def _matters(path: Path) -> bool:
    """Whether a file shows that a folder is in use, not that a run died before it had written its manifest."""
    return not (path.name.startswith(f".{MANIFEST}.") or (path.name == ROWS and path.stat().st_size == 0))


def _command() -> str:
    return shlex.join(["python", *sys.orig_argv[1:]])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lock(file: TextIO, out_dir: Path) -> None:
    """Hold `file` for this process until it is closed; the lock of a process that dies goes with it."""
    if sys.platform == "win32":
        return  # an open file cannot be replaced or deleted there anyway
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SpecmdError(f"{out_dir}: another run is writing here; wait for it or choose another --out") from None
