"""Draws the pictures, the page and the terminal's table of a result folder again, from its table alone (no JAX needed).

    python -m experiments.report results/sweep
    python -m experiments.report results/sweep --format csv         # the rows, for another program
    python -m experiments.report results/sweep --format parquet     # written to results/sweep/rows.parquet

Takes the folder of any study that writes a table: reads ``rows.csv``, ``manifest.json`` and what else the study keeps
there, and makes what the study's own command makes of them. Takes a few seconds. With another format than a table
nothing is drawn; Parquet needs pyarrow. In Python, ``specmd_jax.report.frames.read_table(folder).to_pandas()`` gives
the rows as a data frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common.command_line import FORMATS, bare_parser, config_options, main_guard, print_settings, rows_as

PARQUET = "parquet"


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "report")
    options.add_argument("dir", type=Path, help="result folder of a study")
    options.add_argument(
        "--format",
        choices=(*FORMATS, PARQUET),
        default=FORMATS[0],
        help="table: draw again; json, csv: print the rows; parquet: write them (default: table)",
    )
    config_options(options)
    args = options.parse_args(argv)
    print_settings(args)
    if args.format == "table":
        from specmd_jax.report.studies import redraw

        print(redraw(args.dir))
        return
    from specmd_jax.report.frames import read_table

    table = read_table(args.dir)
    if args.format == PARQUET:
        path = args.dir / "rows.parquet"
        table.write_parquet(path)
        print(path)
    else:
        print(rows_as(args.format, table.rows))


if __name__ == "__main__":
    main_guard(main)
