"""Which eviction policy, and how large a cache? Every policy at 200 capacities on a recorded trace.

    python -m experiments.sweep                                    # gpt-oss-20b, every policy
    python -m experiments.sweep --smoke                            # seconds: see that it works
    python -m experiments.sweep --trace mine.npz --capacities 5%,10%,4GiB --hardware rtx4090
    python -m experiments.sweep --miss split --hardware rtx4090:overlaps=0:host_moe_bytes_per_s=30e9
    python -m experiments.sweep --capacities 10%,25% --host-capacity 50% --storage nvme-4 --hardware rtx4090
    srun python -m experiments.sweep --cluster                     # every process of a Slurm job

Writes rows.csv (one row per policy, capacity and hardware), manifest.json, figures/*.png, report.md and
report.html (self-contained) to results/sweep, and prints a table. An interrupted run keeps its rows; the
same command continues it.

A capacity is a share (25%), bytes (4GiB, 4000MiB), slots (51 slots), slots of every layer (12 slots/layer) or token
cycles (1.5 cycles). A bare number asks for that many, evenly spaced from 1 % to 100 % of all experts, joined by 5, 10,
25 and 50 % and one token cycle.

With --warm-start FILE caches begin with the most used experts of a profile (or of a trace: take other requests than the
replayed ones), --pin-share X keeps those that fill a share of the cache for good, and --admission turns demand copies
away; the table says which profile it was and whether it has seen the replayed requests.

With --drafts 0,2,4 --acceptance 0.5,0.9 --draft-ms 2 decode passes verify drafted tokens (speculative decoding), and
copies and times are those of a token that is kept. Each way of drafting has curves of its own.

A trace file larger than memory is read a stretch of requests at a time, and gives the same table: with --stream, and by
itself where its arrays take more than 1 GiB. That takes batch 1.

About a minute on 2 cores, compiling included. Expected, hit % of lru and of least_stale: 38 slots (5 %) 0 and 12.7; 96
slots (one token cycle) 43.2 and 43.2; 192 slots (25 %) 59.9 and 63.6; 384 slots (50 %) 90.0 and 89.4. From 96 slots on
least_stale has no collisions.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.sweep import SweepConfig
from experiments.common.cluster import add_options, join, one_line_if_lost
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "sweep", resume=True)
    options_of(options, SweepConfig())
    options.add_argument("--stream", action="store_true", help="read the trace file a stretch of requests at a time")
    add_options(options)
    args = options.parse_args(argv)
    config = settings_of(args, SweepConfig())
    from experiments.studies import sweep as work
    from specmd_jax.report.pages.sweep.page import draw

    first = join(args)
    out = results_folder(options, args)
    trace, sha256 = work.open_trace(config.trace, config.tokens, args.stream, config.batch)
    config = work.resolve(config)
    with one_line_if_lost(), printing(args, out):
        work.run(trace, config, out, sha256, overwrite=args.overwrite, resume=args.resume, first=first)
        if first:
            print(draw(out))


if __name__ == "__main__":
    main_guard(main)
