"""How fast is it? Ratios measured side by side in one run, on this machine.

    python -m experiments.benchmark                          # everything: some minutes
    python -m experiments.benchmark --smoke                  # seconds, some sections: see that it works
    python -m experiments.benchmark --only engine,growth     # some sections
    python -m experiments.benchmark --only memory --full     # streams 10 million tokens too: up to half an hour

Sections: libcachesim, policylang (against these two, if they are installed: ``pip install libcachesim
moe-policylang``), curves (every capacity in one pass), engine (the scan with prefetch and time, and on a GPU its
program), growth (the cost of a visit over layers and experts), job (the main sweep from the shell), memory (a streamed
trace), study (a million cells; on a CPU extrapolated from a slice). Writes rows.csv (one row per number) and
manifest.json (machine and versions) to results/benchmark and prints the rows. Sections that the table already has are
not measured again; --overwrite begins a new one.

Each number is the median of some repeats after a first, unmeasured one that compiles. Times of a machine that does
other work besides are worth little; ratios of one run are worth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from configs.benchmark import FULL_STREAM_TOKENS, SMOKE_SECTIONS, BenchmarkConfig
from configs.options import Names
from experiments.common.cluster import add_cpu_devices, split_cpu
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import names, options_of, settings_of

SECTIONS = Names("section", "experiments.studies.benchmark", "SECTIONS")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "benchmark")
    options_of(options, BenchmarkConfig())
    known = ", ".join(SECTIONS.known())
    options.add_argument("--only", type=names, metavar="A,B", help=f"sections; some of: {known} (default: all)")
    options.add_argument("--full", action="store_true", help="stream 10 million tokens too")
    add_cpu_devices(options)
    args = options.parse_args(argv)
    config = settings_of(args, BenchmarkConfig())
    sections = [SECTIONS.find(name) for name in args.only or (SMOKE_SECTIONS if args.smoke else SECTIONS.known())]
    if args.full:
        config = replace(config, stream_tokens=config.stream_tokens + FULL_STREAM_TOKENS)
    from experiments.studies import benchmark as work

    split_cpu(args.cpu_devices)
    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, sections, out, overwrite=args.overwrite)


if __name__ == "__main__":
    main_guard(main)
