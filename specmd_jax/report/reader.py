"""Reads a folder of results: ``rows.csv`` and ``manifest.json``, which has its columns and says where it is from."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError, unknown
from specmd_jax.report.columns import Row, cell_value

ROWS, MANIFEST, FIGURES = "rows.csv", "manifest.json", "figures"
FORMAT = 1


def read_manifest(out_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Gives the manifest of a result folder. Raises `SpecmdError` if there is none or it cannot be read."""
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
    """Reads the rows of a result folder (or of the ``rows.csv`` in one), in order, with the types that were written.

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
    rows = parse_rows(file, kinds)
    return rows if columns is None else [{name: row[name] for name in wanted} for row in rows]


def whole_lines(path: Path) -> bytes:
    """Gives a table without a half-written last line; nothing if there is no table yet."""
    whole = path.read_bytes() if path.exists() else b""
    return whole[: whole.rfind(b"\n") + 1]


def parse_rows(path: Path, kinds: Mapping[str, str]) -> list[Row]:
    """Reads the whole lines of a table with columns of these kinds. Raises `SpecmdError` naming the first bad place."""
    rows: list[Row] = []
    reader = csv.reader(io.StringIO(whole_lines(path).decode(), newline=""))
    header = next(reader, None)
    if header is not None and header != list(kinds):
        raise SpecmdError(f"{path}: its header is not the columns of {MANIFEST}")
    for cells in reader:
        if len(cells) != len(kinds):
            raise SpecmdError(f"{path}, line {reader.line_num}: {len(cells)} cells, expected {len(kinds)}")
        row: Row = {}
        for (name, kind), cell in zip(kinds.items(), cells, strict=True):
            try:
                row[name] = cell_value(kind, cell)
            except ValueError:
                place = f"{path}, line {reader.line_num}, column {name}"
                raise SpecmdError(f"{place}: expected {kind}, got {cell!r}") from None
        rows.append(row)
    return rows
