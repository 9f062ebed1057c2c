"""Trains the learned prefetcher and the learned evictor on a trace: weights for `learned` in minutes.

    python -m experiments.train                                  # the bundled trace gpt-oss-20b
    python -m experiments.train --smoke                          # seconds: see that it works
    python -m experiments.train --trace mine.npz --split request # weights for another model
    python -m experiments.train --trace mine.npz --heads evictor --seed 1
    python -m experiments.train --begin package --heads evictor --capacity 25% --out results/tuned
    python -m experiments.train --begin package --heads evictor --prefetching --hardware pcie4-x16 --out results/tuned

Whole groups of requests are held out for validation and for the test: categories, or what --split says. Every other
request takes part, however long the trace: what does not fit in memory at once is drawn window by window. Writes
prefetcher.npz and evictor.npz, the weights, a card beside each (what it saw and how it scores) and manifest.json (what
was done, how fast, what was left out) to results/train; prefetch="learned" and eviction="learned" read the weights with
checkpoint="results/train/evictor.npz". A run that was killed goes on from its last epoch with the same command, to the
same weights bit for bit.

With --begin weights that are there follow the gradient of a soft cache's misses, or with --hardware of its stall;
validation requests choose among them and what they were. About 3 minutes on 2 busy cores for an evictor alone, 11
beside a prefetcher. A run that was killed goes on from its last round.

What else can be said of a head (width, label, several networks in one) is an option of experiments.train_evictor and
experiments.train_prefetcher. What to expect of the weights, and how fast training is, stands in
specmd_jax/learn/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.learned import TrainHeadsConfig
from experiments.common.command_line import main_guard, parser, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "train", formats=())
    options_of(options, TrainHeadsConfig())
    args = options.parse_args(argv)
    config = settings_of(args, TrainHeadsConfig())
    out = results_folder(options, args)
    if config.begin:
        from experiments.common import train_through_cache

        train_through_cache.run(config, out, args.overwrite)
        return
    from experiments.common import train as work

    work.run_heads(config, out, args.overwrite)


if __name__ == "__main__":
    main_guard(main)
