"""How the importers of foreign formats read files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from specmd_jax.archives import arrays_of
from specmd_jax.errors import SpecmdError
from specmd_jax.errors import shown as brief
from specmd_jax.inputs import head_of, parse_json, read_bytes, read_text, require_file

__all__ = ["brief", "head_of", "parse_json", "read_bytes", "read_text", "require_file"]

_FREE_CELLS, _MOST_SPREAD = 1 << 22, 64


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Gives (place, object) for each record of a file.

    ``.npz``: arrays are named ``<record>/<field>``; a plain ``<field>`` belongs to every record, or to the only one.
    ``.json``: one object or a list of them. Anything else: JSON Lines. Text may be packed with gzip or xz.
    """
    if path.suffix == ".npz":
        return read_members(path)
    text = read_text(path)
    plain = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
    if plain.suffix == ".json":
        content = parse_json(text, str(path))
        numbered = (
            [(f"{path}, record {i}", item) for i, item in enumerate(content)] if isinstance(content, list) else []
        )
        found = numbered or [(str(path), content)]
    else:
        lines = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        found = [(place := f"{path}, line {number}", parse_json(line, place)) for number, line in lines]
    if not found:
        raise SpecmdError(f"{path}: no records")
    for place, item in found:
        if not isinstance(item, dict):
            raise SpecmdError(f"{place}: {brief(item)}, expected a JSON object")
    return found


def read_members(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Gives (place, object) for each record of an ``.npz``; see `read_records`."""
    shared: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for key, value in arrays_of(path).items():
        record, _, field = key.rpartition("/")
        (records.setdefault(record, {}) if record else shared)[field] = value if value.ndim else value.item()
    for record in records:
        if not (record.isascii() and record.isdecimal() and len(record) < 10):
            raise SpecmdError(f"{path}: array group {brief(record)}, expected the number of a record before the '/'")
    if not records:
        return [(str(path), shared)]
    return [(f"{path}, record {record}", shared | records[record]) for record in sorted(records, key=int)]


def id_cells(value: Any, place: str, axes: tuple[str, str] = ("token", "layer")) -> npt.NDArray[np.int64]:
    """Reads nested lists or an array of expert ids [T, L, K] (or other `axes`); names the first cell that is none."""
    outer, inner = axes
    if isinstance(value, np.ndarray):
        if value.ndim != 3 or value.dtype.kind not in "iu":
            raise SpecmdError(
                f"{place} is {value.dtype} {list(value.shape)}, expected integers [{outer}s, {inner}s, k]"
            )
        return value.astype(np.int64)
    if not isinstance(value, list):
        raise SpecmdError(f"{place} is {brief(value)}, expected lists [{outer}s][{inner}s][k]")
    if not value:
        return np.empty((0, 0, 0), np.int64)
    width = len(value[0]) if isinstance(value[0], list) else 0
    top_k = len(value[0][0]) if width and isinstance(value[0][0], list) else 0
    for i, row in enumerate(value):
        if not isinstance(row, list) or not row or len(row) != width:
            raise SpecmdError(f"{place}, {outer} {i}: {brief(row)}, expected a list of {width or 'its'} {inner}s")
        for j, cell in enumerate(row):
            if not is_ids(cell) or len(cell) != top_k:
                raise SpecmdError(
                    f"{place}, {outer} {i}, {inner} {j}: {brief(cell)}, expected {top_k or 'a list of'} expert ids"
                )
    return np.array(value, np.int64)


def is_ids(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of at least one integer that fits an id."""
    return isinstance(value, list) and bool(value) and all(type(item) is int and abs(item) < 1 << 31 for item in value)


def check_cells(path: Path, cells: int, filled: int) -> None:
    """Raises `SpecmdError` if the `filled` ids of a file would be spread over many more `cells`."""
    most = _FREE_CELLS + _MOST_SPREAD * filled
    if cells > most:
        raise SpecmdError(
            f"{path}: {filled} expert ids are spread over {cells} places (tokens x layers x experts per token), "
            f"expected at most {most}"
        )


def check_shape(ids: npt.NDArray[Any], like: npt.NDArray[Any], place: str) -> None:
    """Raises `SpecmdError` unless both have the same L and K."""
    if ids.shape[1:] != like.shape[1:]:
        raise SpecmdError(
            f"{place} has {ids.shape[1]} layers of {ids.shape[2]} experts, "
            f"expected {like.shape[1]} of {like.shape[2]} as before"
        )


def whole_number(record: dict[str, Any], key: str, place: str, least: int = 0) -> int:
    """Gives an integer of a record."""
    value = record.get(key)
    if type(value) is not int or not least <= value < 1 << 62:
        raise SpecmdError(f"{place}: {key} is {brief(value)}, expected an integer >= {least}")
    return value
