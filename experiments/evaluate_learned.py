"""What the learned policies are worth on requests that they never saw.

    python -m experiments.evaluate_learned                                    # the bundled trace and checkpoints
    python -m experiments.evaluate_learned --trace mine.npz --checkpoint results/train/evictor.npz
    python -m experiments.evaluate_learned --scopes layer --capacities 25%,50% --links 0.5,1,pcie5-x16
    python -m experiments.evaluate_learned --smoke                            # seconds: see that it works

Of a trace of the model that a checkpoint was trained on, only requests of groups (categories, say) that neither
training nor validation had are used; the first line says which. A trace of another shape goes through the part of the
predictor that transfers. The cache and every policy start anew with each request.

Shows the share of the hits between LRU and Belady that each policy gains (gap closed), recall of the prefetchers, stall
on a link against the bounds on any policy, with the predictor's own time charged, controls, and routing that held-out
and training requests share. Intervals are the central 95 % of a bootstrap over requests. Writes rows.csv, manifest.json
and figures/*.png to results/evaluate_learned. About 5 minutes on 2 idle cores.

Expected of the first command with 25 % of each layer's experts: `learned` closes about 0.6 of the gap, the best classic
0.35.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.evaluate_learned import EvaluateConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "evaluate_learned", resume=True)
    options_of(options, EvaluateConfig())
    args = options.parse_args(argv)
    config = settings_of(args, EvaluateConfig())
    from experiments.studies import evaluate_learned as work
    from specmd_jax.report.pages.evaluate_learned import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
