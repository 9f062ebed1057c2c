"""What is a profile worth? Warm starts, pinned experts and admission against plain recency, on requests it never saw.

    python -m experiments.starts                                  # gpt-oss-20b at 10 to 75 %
    python -m experiments.starts --smoke                          # seconds: see that it works
    python -m experiments.starts --reset-per-request              # a cache of its own for each request
    python -m experiments.starts --trace mine.npz --scope layer --tokens 0

Every other request of the trace is counted: that is the profile. The rest is replayed by one cache that is never
emptied, or that begins anew before each request, without prefetch and without seconds. Rows differ in how the cache
begins (empty, or with the profile's most used experts), in how much of it the profile pins for good (1: static, nothing
is ever exchanged), and in which demand copies may stay. Bounds that know the future stand beside them, of caches that
begin empty and of warm ones.

Writes rows.csv, manifest.json, report.md and report.html (self-contained) to results/starts; the sentences of the page
follow from the rows by its rules. An interrupted run keeps its rows; the same command continues it. About 3 minutes on
2 idle cores. Expected at 50 %: misses of lru 9.02 %, warm-started 8.92, a quarter of it pinned 9.37, static 19.89.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.starts import StartsConfig
from experiments.common.cluster import split_cpu
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "starts", resume=True)
    options_of(options, StartsConfig())
    args = options.parse_args(argv)
    config = settings_of(args, StartsConfig())
    from experiments.studies import starts as work
    from specmd_jax.report.pages.starts import draw

    split_cpu()
    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
