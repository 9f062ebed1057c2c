"""Is prefetch better with hidden states? Maps from activations to routers against a predictor of ids alone.

    python -m experiments.hidden_prefetch                          # the model and texts of the package
    python -m experiments.hidden_prefetch --smoke                  # seconds: see that it works
    python -m experiments.hidden_prefetch --links pcie4-x16 --capacities 25% --eviction online
    python -m experiments.hidden_prefetch --data DATA --texts 40   # more text to learn from

specmd-reference reads texts that come with it. Linear maps learn to give the next router's logits from what a layer
sees: the residual stream in front of its attention, or its router's own input. A predictor that sees expert ids and
gates alone (`learned`) is trained on the same texts. All are judged on other texts: recall, and hits and stall of
replays, beside predictors without training, the next gate on this layer's activations (`gate_ahead`), no prefetch, and
one that knows the future. A predictor's work is charged by the machine's rates, and once more with a launch of its own.

--data takes a folder of `python -m experiments.train_moe --corpus TEXTS --data DATA` with the tokenizer of
specmd-reference; its training part, which the model has seen, trains as well.

Writes rows.csv, manifest.json, report.md and report.html (self-contained) to results/hidden_prefetch, and the trained
predictor of ids to run/ there. An interrupted run keeps its rows; the same command continues it. Takes a few minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.hidden_prefetch import HiddenPrefetchConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "hidden_prefetch", resume=True)
    options_of(options, HiddenPrefetchConfig())
    args = options.parse_args(argv)
    config = settings_of(args, HiddenPrefetchConfig())
    from experiments.studies import hidden_prefetch as work
    from specmd_jax.report.pages.hidden_prefetch.page import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
