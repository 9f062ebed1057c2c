"""What is a model's routing like? Reuse, overlap, evenness, predictability, domains; a small model beside big ones.

    python -m experiments.routing                                  # specmd-reference beside the public traces
    python -m experiments.routing --smoke                          # seconds: see that it works
    python -m experiments.routing --traces mine.npz,gpt-oss-20b    # my recording beside a big model's
    python -m experiments.routing --tokens 0 --scope layer

States for each trace how far back the last use of an expert lies, how many experts neighbouring tokens share, how even
use is (over all, and in a few tokens), how many experts of the next layer each predictor names, which part of the gap
from LRU to Belady each eviction policy closes, and, where requests have domains, what each expert is used for. The
first trace is held against the others, measure by measure. Prompts are left out and requests cut to as many tokens, so
that traces are alike; each request begins with an empty cache. specmd-reference is run for this on the held-out texts
that come with it. Policies are judged on requests that no learned policy has seen.

Writes rows.csv, manifest.json, report.md and report.html (self-contained) to results/routing. An interrupted run keeps
its rows; the same command continues it. About 1 minute on 2 idle cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.routing import RoutingConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "routing", resume=True)
    options_of(options, RoutingConfig())
    args = options.parse_args(argv)
    config = settings_of(args, RoutingConfig())
    from experiments.studies import routing as work
    from specmd_jax.report.pages.routing.page import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
