"""Draws the pictures and the page of a result folder again, from its table alone (no JAX needed).

    python -m experiments.report results/sweep

Reads ``rows.csv``, ``manifest.json`` and, where there is one, ``routing_counts.csv``; writes ``figures/*.png`` and the
self-contained ``report.html`` beside them and prints the table. Takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common.command_line import bare_parser, main_guard
from specmd_jax.report.draw import draw
from specmd_jax.report.series import settings
from specmd_jax.report.table import read_manifest, read_rows
from specmd_jax.report.text import summary


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "report")
    options.add_argument("dir", type=Path, help="result folder of a sweep")
    folder = options.parse_args(argv).dir
    paths = draw(folder)
    for rows in settings(read_rows(folder)).values():
        print(summary(rows), end="\n\n")
    if not read_manifest(folder)["complete"]:
        print("! the run that made this table did not finish; the same command continues it\n")
    for path in paths:
        print(path)


if __name__ == "__main__":
    main_guard(main)
