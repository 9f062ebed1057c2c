"""Trains a small mixture of experts from scratch, on text of several domains: the model that comes with this package.

    python -m experiments.train_moe --smoke                               # seconds, on this package's own source
    python -m experiments.train_moe --corpus TEXTS --data DATA            # tokenizer and tokens; trains nothing
    python -m experiments.train_moe --data DATA --time-limit 280          # as many steps as fit, up to --epochs
    python -m experiments.train_moe --data DATA --time-limit 120 --dense --out results/train_dense
    python -m experiments.train_moe --data DATA --time-limit 150 --run-time 280  # the same goes on

A corpus has a file per domain (specmd_jax/moe/training/corpus.py). The last documents of each, about one part in
twenty, are held out. The network is a qwen3_moe; with --dense one expert per layer, as wide as the experts that a
token uses.

With a time, the first steps are measured and the number of steps is chosen so that the course of the learning rate ends
in time (run/plan.json has it). Every evaluation ends with a checkpoint. A run that was killed, or whose time was up,
goes on with the same command, on a CPU to the same weights bit for bit. The weights with the best held-out bits per
byte, plain mean of the domains, are the run's.

Writes rows.csv and manifest.json (the course of the run), results.json (all held-out text, beside what gzip and xz make
of it, and which experts each domain uses) and model/ (config.json, safetensors, tokenizer.json; transformers loads it)
to results/train_moe, and what it goes on from to run/ there.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()  # JAX's start counts against a time limit

from collections.abc import Sequence  # noqa: E402

from configs.train_moe import TrainMoEConfig  # noqa: E402
from experiments.common.command_line import main_guard, parser, printing, results_folder  # noqa: E402
from experiments.common.options import options_of, settings_of  # noqa: E402
from specmd_jax.errors import SpecmdError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "train_moe", resume=True)
    options_of(options, TrainMoEConfig())
    args = options.parse_args(argv)
    config = settings_of(args, TrainMoEConfig())
    if config.corpus is None and config.data is None and not args.smoke:
        raise SpecmdError("--data FOLDER is missing; --corpus TEXTS --data FOLDER makes one, only --smoke does without")
    from experiments.studies import train_moe as work
    from specmd_jax.report.pages.train_moe import draw

    if config.corpus is not None:
        work.make_data(config)
        return
    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume, began=BEGAN)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
