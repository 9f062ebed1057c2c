"""My model, this much accelerator memory, this link: what do I run?

    python -m experiments.recommend --model gpt-oss-20b --memory 6GiB --hardware pcie4-x16
    python -m experiments.recommend --model Qwen3-30B-A3B --bits 4.5 --context 32k --memory 12GiB --link 12
    python -m experiments.recommend --model FOLDER/config.json --memory 24GiB --hardware rtx4090 --target-tpot-ms 40
    python -m experiments.recommend --model gpt-oss-120b --memory 16GiB --ram 32GiB --ssd nvme-4 --hardware rtx4090
    python -m experiments.recommend --smoke                     # seconds: see that it works
    python -m experiments.recommend --timeline best.json        # and the best mix over time, for ui.perfetto.dev

Replays routing of the model's shape (recorded where there is such a trace, else synthetic with the model's own
locality) through eviction policies, then through prefetchers with the best of them and with LRU, at the memory that is
there. The first line is the answer; it is printed, and written, before the studies beside it begin: what more or less
memory buys, the cold start, a bound, other links, misses on the host's processor, other precisions. One that fails
costs a line, an interrupt keeps what is there. Writes rows.csv, manifest.json, report.html
(self-contained), report.md and figures/pareto.png to results/recommend.

Numbers are those of a warm cache: the cache is filled, and some requests run, before any is counted. Intervals are
bootstrapped over requests; what they do not tell apart, or differs by less than 1 %, is a tie, and of a tie the
plainest is recommended.

Memory is all of the accelerator's. What is left for cached experts: memory - dense layers - head - embedding - keys and
values of the --context - workspace - the experts of one decode visit, which are copied in before older ones leave. A
model that is not listed is read from its config.json, whose path or folder --model takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.recommend import RecommendConfig
from experiments.common.cluster import split_cpu
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of
from experiments.common.timelines import passes_shown, timeline_options, timeline_path


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "recommend", resume=True)
    options.of_model = True
    options_of(options, RecommendConfig())
    timeline_options(options, "the best mix at the cache that fits")
    args = options.parse_args(argv)
    path = timeline_path(args)
    config = settings_of(args, RecommendConfig())
    from experiments.studies import recommend as work

    split_cpu()
    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume, timeline=path, passes=passes_shown(args))


if __name__ == "__main__":
    main_guard(main)
