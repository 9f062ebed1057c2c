"""One replay: this trace, these policies, this cache, this machine.

    python -m experiments.run                                              # gpt-oss-20b, lru, 25 %
    python -m experiments.run --trace mine.npz --eviction adaptive --prefetch transition --capacity 4GiB
    python -m experiments.run --eviction lfu_decay --numbers decay=0.9 --hardware rtx4090 --json
    python -m experiments.run --timeline run.json --timeline-passes 20     # then open it at https://ui.perfetto.dev
    python -m experiments.run --out results/run                  # and who is in the cache, pass by pass, as a page

Prints the metrics, simulated, as a table or as JSON, in seconds. With --out they are written to rows.csv in a folder,
with manifest.json, residency.csv (which expert of which layer is in the cache, in up to 256 passes), report.md and
report.html (self-contained). Every option below is a field of `specmd_jax.Setting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.options import TRACES
from experiments.common.command_line import (
    bare_parser,
    config_options,
    folder_options,
    format_option,
    main_guard,
    print_settings,
    rows_as,
)
from experiments.common.setting_options import given_fields, setting_options
from experiments.common.timelines import passes_shown, timeline_options, timeline_path
from specmd_jax.errors import SpecmdError
from specmd_jax.files import require_writable
from specmd_jax.report.terminal import aligned

TRACE, TOKENS = "gpt-oss-20b", 2_000


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "run")
    options.usage = f"{options.prog} [options]"
    options.add_argument("--trace", default=TRACE, metavar="TRACE", help=f"routing to replay (default: {TRACE})")
    options.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"only the first N; 0: all (default: {TOKENS})"
    )
    format_option(options)
    folder_options(options)
    options.add_argument("--json", action="store_const", dest="format", const="json", help="the same as --format json")
    timeline_options(options, "the replay")
    setting_options(options.add_argument_group("the setting"))
    config_options(options)
    args = options.parse_args(argv)
    path = timeline_path(args)
    if args.tokens < 0:
        raise SpecmdError(f"tokens is {args.tokens}, expected at least 0")
    name = TRACES.find(args.trace)
    print_settings(args)
    from experiments.studies import run as work

    out: Path | None = args.out
    if out is not None:
        require_writable(out)
    kept = {"overwrite": args.overwrite, "resume": args.resume}
    row, told = work.run(given_fields(args), name, args.tokens, path, passes_shown(args), out, **kept)
    print("\n".join(table(row)) if args.format == "table" else rows_as(args.format, row))
    written = [told] if told else []
    if out is not None:
        from specmd_jax.report.pages.run.page import draw

        written.append(draw(out))
    if written and args.format == "table":
        print("\n".join(written))


def table(row: dict[str, Any]) -> list[str]:
    """Gives the lines that a person reads."""
    return aligned(["simulated", ""], [[name, shown(value)] for name, value in row.items() if name != "evidence"])


def shown(value: Any) -> str:
    """Gives a value as text: whole numbers in full, others with five digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


if __name__ == "__main__":
    main_guard(main)
