"""Trains the learned eviction policy: how soon each expert of a layer is used again, from ids and gates alone.

    python -m experiments.train_evictor                                # the bundled trace gpt-oss-20b
    python -m experiments.train_evictor --smoke                        # seconds: see that it works
    python -m experiments.train_evictor --trace mine.npz --seed 1      # weights for another model
    python -m experiments.train_evictor --average a/evictor.npz,b/evictor.npz    # one of several trained alike

Whole categories of requests are held out for validation and for the test. Writes evictor.npz, the weights, and
evictor.json, what they saw and how they score, to results/train_evictor; eviction="learned" with
checkpoint="evictor.npz" reads them. A run that was killed goes on from its last epoch with the same command, to the
same weights bit for bit. experiments.train trains both heads. What to expect of the weights is in
specmd_jax/learn/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.learned import EVICTOR
from experiments.common.command_line import main_guard
from experiments.common.train_command import train


def main(argv: Sequence[str] | None = None) -> None:
    train(__doc__, "train_evictor", EVICTOR, argv)


if __name__ == "__main__":
    main_guard(main)
