"""One replay: this trace, these policies, this cache, this machine.

    python -m experiments.run                                              # gpt-oss-20b, lru, 25 %
    python -m experiments.run --trace mine.npz --eviction online --prefetch transition --capacity 4GiB
    python -m experiments.run --eviction lfu_decay --numbers decay=0.9 --hardware rtx4090 --json
    python -m experiments.run --timeline run.json --timeline-passes 20     # then open it at https://ui.perfetto.dev

Prints the metrics, simulated, as a table or as JSON, in seconds. Every option below is a field of `specmd_jax.Setting`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from configs.options import TRACES
from experiments.common.command_line import bare_parser, main_guard
from experiments.common.setting_options import setting_of, setting_options
from experiments.common.timelines import passes_shown, timeline_options, timeline_path, write_timelines
from specmd_jax import sweep, timeline
from specmd_jax.errors import SpecmdError
from specmd_jax.report.terminal import aligned
from specmd_jax.trace.bundled import load_named

TRACE, TOKENS = "gpt-oss-20b", 2_000


def main(argv: Sequence[str] | None = None) -> None:
    options = bare_parser(__doc__, "run")
    options.usage = f"{options.prog} [options]"
    options.add_argument("--trace", default=TRACE, metavar="TRACE", help=f"routing to replay (default: {TRACE})")
    options.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"only the first N; 0: all (default: {TOKENS})"
    )
    options.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    timeline_options(options, "the replay")
    setting_options(options.add_argument_group("the setting"))
    args = options.parse_args(argv)
    path = timeline_path(args)
    if args.tokens < 0:
        raise SpecmdError(f"tokens is {args.tokens}, expected at least 0")
    setting, name = setting_of(args), TRACES.find(args.trace)
    if path is not None and setting.hardware is None:
        raise SpecmdError("--timeline with --hardware none: a timeline is made of seconds, expected a machine")
    trace, _ = load_named(name, args.tokens or None)
    drawn = None if path is None else timeline(trace, setting, passes=passes_shown(args))
    (row,) = sweep(trace, [setting])
    row = {name: value for name, value in row.items() if value is not None}
    print(json.dumps(row) if args.json else "\n".join(table(row)))
    if path is not None and drawn is not None:
        told = write_timelines(path, drawn)
        if not args.json:
            print(told)


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
