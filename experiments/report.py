"""Draws the pictures, the page and the terminal's table of a result folder again, from its table alone (no JAX needed).

    python -m experiments.report results/sweep

Takes the folder of any study that writes a table: reads ``rows.csv``, ``manifest.json`` and what else the study keeps
there, and makes what the study's own command makes of them. Takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common.command_line import bare_parser, main_guard
from specmd_jax.report.studies import redraw


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "report")
    options.add_argument("dir", type=Path, help="result folder of a study")
    print(redraw(options.parse_args(argv).dir))


if __name__ == "__main__":
    main_guard(main)
