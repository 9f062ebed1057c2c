"""What is this installation like? Versions, devices, caches, and what is known not to work well.

    python -m experiments.doctor
    python -m experiments.doctor --format json

Ends with status 0, or with 1 if something is wrong: a package that is missing or of a version that does not go with the
others, a result folder that cannot be written. What is only slow or optional is told and is no fault.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.command_line import bare_parser, format_option, main_guard, rows_as


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "doctor")
    options.add_argument("--out", type=Path, metavar="DIR", default=Path("results"), help="folder of the results")
    format_option(options)
    args = options.parse_args(argv)
    from experiments.common.health import examined

    rows = examined(args.out)
    if args.format == "table":
        from specmd_jax.report.terminal import aligned

        print(
            "\n".join(aligned(["what", "state", "found"], [[row["what"], row["state"], row["found"]] for row in rows]))
        )
    else:
        print(rows_as(args.format, rows))
    if any(row["state"] == "wrong" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main_guard(main)
