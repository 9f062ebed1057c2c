"""What do a visit's experts, the rest of a layer and a copy cost on this machine? Writes a hardware file.

    python -m experiments.calibrate                                     # a small model
    python -m experiments.calibrate --model OLMoE-1B-7B                 # a published shape, made-up weights
    python -m experiments.sweep --hardware results/calibrate/hardware.json

Measures what a pass of the fused engine is made of, by the kernels where they serve and by XLA's operations elsewhere
(rows.csv says which): the experts of one token with some of them missing, and of several tokens; what is dense in a
layer; the policy's visit; the head; an empty launch. Beside them copies from pinned memory by size, the start of an
empty program and numpy on the host. Parts are timed as loops of many steps inside one program.

hardware.json has the rates with which the simulator's timing (CONTRACT.md, section 5) gives these times. rates.json has
the engine's pass rates (`specmd_jax.moe.measure.predict.PassRates`) derived from the points alone, those fitted to two
runs of the whole engine, and what each, and the simulator with hardware.json, predicts of these runs. The table shows
how far they are apart. Experts are made for a few layers (--layers). The tiny model takes a minute, OLMoE-1B-7B on an
H100 is meant to take two. A rate that launches hide is a lower bound: measure with the shapes to be simulated.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.calibrate import CalibrateConfig
from experiments.common.command_line import main_guard, parser, printing, results_folder
from experiments.common.options import options_of, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "calibrate")
    options_of(options, CalibrateConfig())
    args = options.parse_args(argv)
    config = settings_of(args, CalibrateConfig())
    from experiments.studies import calibrate as work
    from specmd_jax.report.pages.calibrate import draw

    out = results_folder(options, args)
    with printing(args, out):
        work.run(config, out, overwrite=args.overwrite)
        print(draw(out))


if __name__ == "__main__":
    main_guard(main)
