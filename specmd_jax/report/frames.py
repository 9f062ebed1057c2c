"""A result folder as one value, and from it a data frame of pandas or a Parquet file, where these are installed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specmd_jax.errors import SpecmdError
from specmd_jax.files import whole_file
from specmd_jax.report.columns import Row
from specmd_jax.report.reader import read_manifest, read_rows

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

_PANDAS = {"int": "Int64", "float": "float64", "bool": "boolean", "str": "string"}
_ARROW = {"int": "int64", "float": "float64", "bool": "bool_", "str": "string"}


@dataclass(frozen=True)
class ResultTable:
    """The rows of a study with the kinds of their columns ("int", "float", "bool", "str") and where they come from."""

    rows: Sequence[Row]
    kinds: Mapping[str, str]
    manifest: Mapping[str, Any]

    def to_pandas(self) -> pandas.DataFrame:
        """Gives a data frame whose columns are of the kinds that were written; an empty cell is missing, in any kind.

        The manifest is in its ``attrs``. Raises `SpecmdError` where pandas is not installed.
        """
        pd = _installed("pandas", "a data frame")
        columns = {
            name: pd.Series([row[name] for row in self.rows], dtype=_PANDAS[kind]) for name, kind in self.kinds.items()
        }
        frame = pd.DataFrame(columns)
        frame.attrs["manifest"] = dict(self.manifest)
        return frame

    def write_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes a Parquet file, whole or not at all. Raises `SpecmdError` where pyarrow is not installed."""
        pa = _installed("pyarrow", "a Parquet file")
        schema = pa.schema([(name, getattr(pa, _ARROW[kind])()) for name, kind in self.kinds.items()])
        with whole_file(path) as file:
            import_module("pyarrow.parquet").write_table(pa.Table.from_pylist(list(self.rows), schema), file)


def read_table(folder: str | os.PathLike[str]) -> ResultTable:
    """Reads a result folder. Raises `SpecmdError` as `reader.read_rows` does."""
    manifest = read_manifest(Path(folder))
    kinds = {name: column["kind"] for name, column in manifest["columns"].items()}
    return ResultTable(read_rows(folder), kinds, manifest)


def _installed(package: str, for_what: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise SpecmdError(f"{package} is not installed, expected it for {for_what} (pip install {package})") from None
