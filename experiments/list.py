"""What there is to choose from: models, machines, traces, policies of each axis, importers, engines.

    python -m experiments.list                              # everything, by name
    python -m experiments.list models --format json         # one kind with its numbers and sources
    python -m experiments.list hardware eviction --format csv

A machine's numbers are bytes/s and seconds, and `evidence` says for each whether it is measured, nominal or estimated.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.common.command_line import FORMATS, bare_parser, format_option, main_guard, rows_as

KINDS = (
    "models",
    "hardware",
    "traces",
    "eviction",
    "admission",
    "prefetch",
    "selection",
    "miss",
    "routing",
    "importers",
    "engines",
    "engines_of_others",
)
ALSO = {"machines": "hardware", "policies": "eviction,admission,prefetch,selection,miss,routing"}
"""Other words for them."""


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "list")
    options.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"some of: {', '.join(KINDS)}, {', '.join(ALSO)} (default: all)"
    )
    format_option(options, FORMATS)
    args = options.parse_args(argv)
    from specmd_jax.errors import find

    asked = [find("kind of list", kind.replace("-", "_"), [*KINDS, *ALSO]) for kind in args.kinds]
    kinds = [part for kind in asked for part in ALSO.get(kind, kind).split(",")] or list(KINDS)
    from experiments.common.listing import listed

    tables = {kind: listed(kind) for kind in dict.fromkeys(kinds)}
    if args.format == "table":
        from specmd_jax.report.terminal import aligned

        brief = len(tables) > 1
        for kind, rows in tables.items():
            print(f"{kind}: {', '.join(str(row['name']) for row in rows)}" if brief and not asked else kind)
            if asked:
                print("\n".join(aligned(list(rows[0]), [[_shown(row[name]) for name in rows[0]] for row in rows])))
    elif args.format == "json":
        print(rows_as("json", tables if len(tables) != 1 else next(iter(tables.values()))))
    else:
        parts = [[{"kind": kind, **row} for row in rows] for kind, rows in tables.items()]
        names = dict.fromkeys(name for rows in parts for row in rows for name in row)
        print(rows_as("csv", [{name: row.get(name) for name in names} for rows in parts for row in rows]))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main_guard(main)
