"""Quality against speed: a trained model reads held-out text under every rule that changes what it computes.

    python -m experiments.quality                     # the model that comes with this package
    python -m experiments.quality --smoke             # seconds: see that it works
    python -m experiments.quality --rules drop,substitute --steps 256
    python -m experiments.quality --hardware rtx4090 --sizes own
    python -m experiments.quality --model FOLDER      # config.json, safetensors and held_out.npz

The model reads texts that it was not trained on, token by token, with its experts behind a cache (lru, nothing copied
early). A row is a rule at a cache size: fetching experts of one precision; rules that choose a precision, drop experts
or let others stand in for them; routing that prefers what is there. Quality is measured: bits per byte, and the KL
divergence from the model with all experts on the device as shipped. The experts that come with the package are at 4
bits, so int8 and native show what holding the same numbers in more bits costs; what 4 bits cost is in the model's own
README. Time is simulated: the routing of that very run is replayed on a machine, layer by layer as if experts and dense
layers were as large as a published model's, since this model's own fit any cache.

A cache of 5 % has 5 % of the bytes that all experts take at 16 bits, as in the paper: 18 % of the experts at 4 bits.

Writes rows.csv, manifest.json, figures/quality.png, report.md and report.html (self-contained) to results/quality. An
interrupted run keeps its rows; the same command continues it. About 9 minutes on 2 idle cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.quality import QualityConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "quality", resume=True)
    options_of(options, QualityConfig())
    args = options.parse_args(argv)
    config = settings_of(args, QualityConfig())
    from experiments.studies import quality as work
    from specmd_jax.report.pages.quality.page import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite, resume=args.resume)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
