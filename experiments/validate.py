"""How well does the timing model predict what others measured? Published tokens per second beside predicted ones.

    python -m experiments.validate                                # every cell of the table
    python -m experiments.validate --smoke                        # three engines
    python -m experiments.validate --engines imp,streamlx

The table has measurements of other engines, each with its source and with what had to be assumed
(experiments/validation/cells.csv). A prediction is the closed form of the contract's section 5 for one decoded token:
the model's bytes, the machine's rates and the misses that were published. Where none were, LRU on synthetic routing
with the model's locality gives them; the column `misses_from` says which. Two predictions are made: as shipped, with
nothing fitted; and with two constants of the engine (a layer's fixed time, the share of its link or host that it
reaches), fitted by least squares on that engine's cells of another model or capacity, for engines with three cells or
more. Cells that cannot be expressed stay in the table with the reason.

Writes rows.csv, manifest.json, a figure, report.md and report.html (self-contained) to results/validate. Takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.validate import ValidateConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "validate")
    options_of(options, ValidateConfig())
    args = options.parse_args(argv)
    config = settings_of(args, ValidateConfig())
    from experiments.studies import validate as work
    from specmd_jax.report.pages.validate import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
