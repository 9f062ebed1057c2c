"""Which policy, with which number, at which capacity and link? All combinations, up to millions of cells.

    python -m experiments.study                                           # gpt-oss-20b, 4,032 cells
    python -m experiments.study --smoke                                   # seconds: see that it works
    python -m experiments.study --capacities 128 --links 32 --values 64   # a million, for a GPU
    srun python -m experiments.study --cluster                            # every process of a Slurm job

A cell is one replay of the trace: an eviction policy at one value of its number (`configs.study.RANGES`; policies
without one have one value), a predictor, a capacity (5 to 80 % of all experts) and a link (2 to 64 GB/s, the rest of
the machine as --hardware has it). Only decode passes count.

Writes rows.csv (for each policy, predictor, capacity and link the best value and what it gains), manifest.json,
cells/*.npz (every cell), figures/*.png, report.md and report.html (self-contained) to results/study. The page says what
the cells cost, and what a million would. An interrupted run keeps what it has; the same command continues it.

About a minute on 2 cores, compiling included. Expected there: at 2 to 32 GB/s lfu_decay or weighted without prefetch is
best up to half of all experts; at 64 GB/s the same with transition mostly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.study import StudyConfig
from experiments.common.cluster import add_options, join, one_line_if_lost
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of
from specmd_jax.errors import SpecmdError


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "study", resume=True)
    options_of(options, StudyConfig())
    add_options(options)
    args = options.parse_args(argv)
    config = settings_of(args, StudyConfig())
    from experiments.studies import study as work
    from specmd_jax.report.pages.study.page import draw
    from specmd_jax.trace.bundled import load_named

    first = join(args)
    out = results_folder(options, args)
    trace, digest = load_named(config.trace, config.tokens or None)
    if not (trace.lengths > trace.prompt_lengths).any():
        raise SpecmdError(f"{config.trace}: its first tokens are prompts only, expected some that are decoded")
    config = replace(config, trace=Path(config.trace).name)
    with one_line_if_lost(), printing(args, out):
        work.run(trace, config, out, digest, args.overwrite, args.resume, first)
        if first:
            print(draw(out))


if __name__ == "__main__":
    main_guard(main)
