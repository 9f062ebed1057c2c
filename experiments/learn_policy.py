"""Can a gradient tune a cache? Weights of the `weighted` eviction policy and budgets of the layers, by three searches.

    python -m experiments.learn_policy                                    # the bundled trace gpt-oss-20b
    python -m experiments.learn_policy --smoke                            # seconds: see that it works
    python -m experiments.learn_policy --on adaptive --capacities 25%     # on top of a policy that is there
    python -m experiments.learn_policy --trace mine.npz --capacities "25%" --split request --out results/mine

The gradient of the expected misses of a differentiable cache (`specmd_jax.soft.replay`) moves the weights, how many
slots each layer has of the same total, or both. An evolution strategy and random search do the same for as many
replays. All of them see training requests only; validation requests choose the round, and the best of the fixed
policies; test requests, of categories that neither had, are replayed once, by the exact engine, from an empty cache.

Writes rows.csv, manifest.json, figures/learn_policy.png and found.json to results/learn_policy. An entry of found.json
gives `specmd_jax.run(trace, "weighted", entry["capacity"], scope="layer", **entry["numbers"])`. With --on, the features
are weighed together with that policy's own scores, the search begins at the policy itself, everything is held against
it, and `tuned(entry["on"])` takes the place of "weighted". A run that was killed
goes on from its last checkpoint with the same command. About 6 minutes on 2 idle cores, 11 on busy ones.

Expected at 6 and 8 slots per layer, share of the misses between LRU and Belady that is saved on test requests: the best
fixed policy 0.33 and 0.30; weights by gradient 0.36 and 0.36, budgets alone 0.34 and 0.31, both 0.37 and 0.38. For the
weights alone, evolution and random search find as good ones; with the budgets, 30 numbers in all, the gradient has 0.3
and 0.6 % fewer misses than evolution, 1.1 and 2.8 % fewer than random search. `online`, which learns while it runs,
saves 0.51 and 0.50: weights found beforehand do not make up for that. Expected and exact misses differ by less than
0.1 % of the demand where a gradient found the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.learn_policy import LearnPolicyConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "learn_policy", resume=True)
    options_of(options, LearnPolicyConfig())
    args = options.parse_args(argv)
    config = settings_of(args, LearnPolicyConfig())
    from experiments.studies import learn_policy as work
    from specmd_jax.report.pages.learn_policy import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
