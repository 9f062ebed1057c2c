"""Records the routing of a transformers model on prompts of yours, and measures what recording costs.

    python -m experiments.capture --model FOLDER --prompts prompts.txt      # a local checkpoint, one prompt per line
    python -m experiments.capture --smoke                                   # a tiny random model built on the spot
    python -m experiments.sweep --trace results/capture/trace.npz

Needs torch and transformers (5 or later), which specmd-jax itself does not install. Generates greedily with hooks on
the routers and writes trace.npz; then decodes the first prompt without and with hooks, in turns, and writes rows.csv
and manifest.json. Prints seconds per decoded token (TPOT), median and range over the repeats, and the overhead of the
hooks in %. All of them are measured here.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.capture import CaptureConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of
from specmd_jax.errors import SpecmdError


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "capture")
    options_of(options, CaptureConfig())
    args = options.parse_args(argv)
    config = settings_of(args, CaptureConfig())
    if not config.model and not args.smoke:
        raise SpecmdError("--model FOLDER and --prompts FILE are missing; only --smoke does without")
    from experiments.studies import capture as work

    out = results_folder(options, args)
    with printing(args, out):
        print(work.run(config, out, overwrite=args.overwrite))


if __name__ == "__main__":
    main_guard(main)
