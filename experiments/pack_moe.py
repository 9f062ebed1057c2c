"""What packing costs: held-out bits per byte of a checkpoint before and after its experts are held at 4 bits.

    python -m experiments.pack_moe                    # the packed model that comes with this package, on its own text
    python -m experiments.pack_moe --smoke            # seconds
    python -m experiments.pack_moe --checkpoint results/train_moe/model --data DATA
    python -m experiments.pack_moe --plain            # also as bfloat16, for transformers

Experts are packed to int4 (a scale per 32 columns), all other matrices to int8 (a scale per row); routers and vectors
stay as they are. Both checkpoints read the same held-out text, in windows that begin without context. The bar is 2 %
more bits per byte, plain mean of the domains; the last line says whether it is met.

The 16-bit weights of the model that comes with this package are not part of it. Without --checkpoint its packed weights
are read, beside what was recorded for both when it was packed (packing.csv of its folder). On all of its windows the
packed ones must come out as recorded; the last line says whether they do.

Writes rows.csv and manifest.json to results/pack_moe, with --checkpoint packed/ (as specmd-reference is made), with
--plain also plain/ (config.json, safetensors, tokenizer.json). Half a minute on 2 idle cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.pack_moe import PackMoEConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "pack_moe")
    options_of(options, PackMoEConfig())
    args = options.parse_args(argv)
    config = settings_of(args, PackMoEConfig())
    from experiments.studies import pack_moe as work
    from specmd_jax.report.pages.pack_moe import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
