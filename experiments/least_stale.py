"""Where Least-Stale wins, ties and loses: its four readings against LRU and Belady, on recorded routing.

    python -m experiments.least_stale                              # the three bundled traces
    python -m experiments.least_stale --smoke                      # seconds: see that it works
    python -m experiments.least_stale --traces gpt-oss-20b --out results/ls20b

Cache sizes are in token cycles, C/T: 1 holds the experts of one token in all layers. Without prefetch, the first 8,000
tokens of a trace are replayed; with `previous` prefetch (the experts of the previous token, one layer ahead, on the
link of `pcie4-x16`), the first 300. Only decode passes count. Writes rows.csv, manifest.json, figures/*.png,
report.md and report.html (self-contained) to results/least_stale; the sentences of the page follow from the
rows by its rules. An interrupted run keeps its rows; the same command continues it. About 4 minutes on 2 idle cores.

Expected of gpt-oss-20b without prefetch, hit % of lru and of least_stale: 38 slots 0 and 12.9; 162 slots 53.0 and 58.2;
649 slots 99.5 and 99.4 (the page has the whole table beside what it finds).
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.least_stale import LeastStaleConfig
from experiments.common.cluster import split_cpu
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "least_stale", resume=True)
    options_of(options, LeastStaleConfig())
    args = options.parse_args(argv)
    config = settings_of(args, LeastStaleConfig())
    from experiments.studies import least_stale as work
    from specmd_jax.report.pages.least_stale.page import draw
    from specmd_jax.trace import bundled

    split_cpu()
    out = results_folder(options, args)
    traces = {name: bundled(name) for name in config.traces}
    with printing(args, out):
        work.replay_all(traces, config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
