"""SpecMD (arXiv 2602.03921v1) again, as far as a simulator can: its tables and figures, with a verdict for each claim.

    python -m experiments.paper                                    # everything: 4 models, 3 recorded traces
    python -m experiments.paper --smoke                            # under a minute: one model
    python -m experiments.paper --models Mixtral-8x7B --traces "" --out results/mixtral

Writes rows.csv (one row per trace, mix of policies and capacity, and one for each of its layers), manifest.json,
figures/*.png, report.md and report.html (self-contained) to results/paper, and prints the verdicts. An interrupted run
keeps its rows; the same command continues it. About 180 replays are compiled, 4 s each: 13 minutes on 2 idle cores.

What the paper claims of quality is judged on held-out text, which a trained model reads under every rule: the rows of
`experiments.quality`, in quality/ of the folder; 9 minutes more. --smoke leaves it out, as --trained "" does.

The paper's four models have no public traces: their routing is made up (`synthesize`) in their shapes, and every number
says so. What needs neither logits nor gate-ahead scores is repeated on recorded routing, where `previous` (the experts
of the previous token) stands in for the paper's gate-ahead predictor.

A capacity is a share of the bytes of all experts at 16 bits, as in the paper, while experts are stored at fewer: 5 % of
the bytes is 10 % of the experts at 8 bits and 20 % at 4. Both readings are replayed. Verdicts follow from the rows by
the rules of `specmd_jax.report.verdicts`; nobody writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.paper import PaperConfig
from experiments.common.cluster import split_cpu
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "paper", resume=True)
    options_of(options, PaperConfig())
    args = options.parse_args(argv)
    config = settings_of(args, PaperConfig())
    from experiments.studies import paper as work
    from specmd_jax.report.pages.paper.page import draw

    split_cpu()
    out = results_folder(options, args)
    subjects = [
        *(work.synthetic(name, config) for name in config.models),
        *(work.recorded(name, config) for name in config.traces),
    ]
    with printing(args, out):
        work.replay_all(subjects, config, out, overwrite=args.overwrite, resume=args.resume, few=args.smoke)
        work.read_all(config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
