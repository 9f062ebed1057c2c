"""Reads a folder of results: ``rows.csv`` and ``manifest.json``, which has its columns and says where it is from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError, shown, unknown
from specmd_jax.inputs import read_json
from specmd_jax.report.columns import KINDS, Row, cell_value

ROWS, MANIFEST, FIGURES = "rows.csv", "manifest.json", "figures"
FORMAT = 1
_TYPES: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "columns": (dict,),
    "key": (list,),
    "complete": (bool,),
    "config_sha256": (str,),
    "study": (str, type(None)),
    "versions": (dict, type(None)),
    "git_commit": (str, type(None)),
    "command": (str, type(None)),
    "trace_sha256": (str, type(None)),
}


def read_manifest(out_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Gives the manifest of a result folder. Raises `SpecmdError` if there is none or it cannot be read."""
    path = Path(out_dir) / MANIFEST
    if not os.path.isfile(path):
        raise SpecmdError(f"{out_dir}: no results here (expected {MANIFEST} and {ROWS})")
    manifest = read_json(path)
    wanted = ("format", "config_sha256", "config", "columns", "key", "complete")
    missing = [name for name in wanted if not isinstance(manifest, dict) or name not in manifest]
    if missing:
        raise SpecmdError(f"{path}: expected a result manifest, but it lacks {', '.join(missing)}")
    if manifest["format"] != FORMAT:
        raise SpecmdError(f"{path}: format {shown(manifest['format'])}, expected {FORMAT}")
    for name, kind in _TYPES.items():
        if not isinstance(manifest.get(name), kind):
            expected = " or ".join({type(None): "null", dict: "object"}.get(k, k.__name__) for k in kind)
            raise SpecmdError(f"{path}: {name} is {shown(manifest.get(name))}, expected {expected}")
    if manifest["config_sha256"] != digest_of(manifest):
        raise SpecmdError(f"{path}: its config, columns or trace_sha256 are not those of its config_sha256: changed")
    for name, column in manifest["columns"].items():
        kind = column.get("kind") if isinstance(column, dict) else None
        if kind not in KINDS:
            raise SpecmdError(f"{path}: column {name} is {shown(column)}, expected a kind of {', '.join(KINDS)}")
    for name in manifest["key"]:
        if not isinstance(name, str) or name not in manifest["columns"]:
            raise SpecmdError(f"{path}: key has {shown(name)}, expected names of columns")
    for name, text in (manifest.get("versions") or {}).items():
        if not isinstance(text, str):
            raise SpecmdError(f"{path}: the version of {name} is {shown(text)}, expected text")
    return manifest


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Gives the SHA-256 of what a table is of: its config, columns and trace."""
    told = {name: manifest.get(name) for name in ("config", "columns", "trace_sha256")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_rows(path: str | os.PathLike[str], columns: Iterable[str] | None = None) -> list[Row]:
    """Reads the rows of a result folder (or of the ``rows.csv`` in one), in order, with the types that were written.

    `columns` picks some of them. A half-written last line, of a run that was killed or still goes on, is left out.
    Raises `SpecmdError` for a folder without results, an unknown column (it lists the known ones) or a damaged line.
    """
    out_dir = Path(path).parent if Path(path).name == ROWS else Path(path)
    manifest = read_manifest(out_dir)
    kinds = {name: column["kind"] for name, column in manifest["columns"].items()}
    wanted = list(kinds if columns is None else columns)
    for name in wanted:
        if name not in kinds:
            raise unknown("column", name, kinds)
    file = out_dir / ROWS
    if not os.path.isfile(file):
        raise SpecmdError(f"{out_dir}: no {ROWS} beside {MANIFEST}")
    rows = parse_rows(file, kinds)
    if manifest["complete"] and manifest.get("rows_sha256") is not None:
        data = file.read_bytes()
        if data.endswith(b"\n") and hashlib.sha256(data).hexdigest() != manifest["rows_sha256"]:
            raise SpecmdError(
                f"{file}: not the rows that were written (rows_sha256 of {MANIFEST}): run the study again"
            )
    return rows if columns is None else [{name: row[name] for name in wanted} for row in rows]


def whole_lines(path: Path) -> bytes:
    """Gives a table without a half-written last line; nothing if there is no table yet."""
    whole = path.read_bytes() if os.path.exists(path) else b""
    return whole[: whole.rfind(b"\n") + 1]


def parse_rows(path: Path, kinds: Mapping[str, str]) -> list[Row]:
    """Reads the whole lines of a table with columns of these kinds. Raises `SpecmdError` naming the first bad place."""
    rows: list[Row] = []
    try:
        text = whole_lines(path).decode()
    except UnicodeDecodeError as error:
        raise SpecmdError(f"{path}: {error}, expected UTF-8 text") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = _next(reader, path)
    if header is not None and header != list(kinds):
        raise SpecmdError(f"{path}: its header is not the columns of {MANIFEST}")
    while (cells := _next(reader, path)) is not None:
        if len(cells) != len(kinds):
            raise SpecmdError(f"{path}, line {reader.line_num}: {len(cells)} cells, expected {len(kinds)}")
        row: Row = {}
        for (name, kind), cell in zip(kinds.items(), cells, strict=True):
            try:
                row[name] = cell_value(kind, cell)
            except ValueError:
                place = f"{path}, line {reader.line_num}, column {name}"
                raise SpecmdError(f"{place}: expected {kind}, got {shown(cell)}") from None
        rows.append(row)
    return rows


def _next(reader: Any, path: Path) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise SpecmdError(f"{path}, line {reader.line_num}: {error}, expected cells with commas between") from None
