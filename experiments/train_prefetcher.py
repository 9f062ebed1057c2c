"""Trains the learned prefetcher: which experts the next layer will use, from ids and gates alone.

    python -m experiments.train_prefetcher                                # the bundled trace gpt-oss-20b
    python -m experiments.train_prefetcher --smoke                        # seconds: see that it works
    python -m experiments.train_prefetcher --trace mine.npz --seed 1      # weights for another model
    python -m experiments.train_prefetcher --average a/prefetcher.npz,b/prefetcher.npz    # one of several trained alike

Whole categories of requests are held out for validation and for the test. Writes prefetcher.npz, the weights, and
prefetcher.json, what they saw and how they score, to results/train_prefetcher; prefetch="learned" with
checkpoint="prefetcher.npz" reads them. A run that was killed goes on from its last epoch with the same command, to the
same weights bit for bit. experiments.train trains both heads. What to expect of the weights is in
specmd_jax/learn/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.learned import PREFETCHER
from experiments.common.command_line import main_guard
from experiments.common.train_command import train


def main(argv: Sequence[str] | None = None) -> None:
    train(__doc__, "train_prefetcher", PREFETCHER, argv)


if __name__ == "__main__":
    main_guard(main)
