"""The command line of the two training commands."""

from __future__ import annotations

from collections.abc import Sequence

from configs.learned import TrainConfig
from experiments.common.command_line import parser, printing, results_folder
from experiments.common.options import names, options_of, settings_of


def train(doc: str | None, name: str, config: TrainConfig, argv: Sequence[str] | None) -> None:
    """Trains one head, or averages some that are trained; `doc` is the help."""
    options = parser(doc, name, formats=("table", "json"))
    options_of(options, config)
    options.add_argument(
        "--average", type=names, metavar="A,B", help="train nothing: one predictor of these .npz, trained alike"
    )
    args = options.parse_args(argv)
    config = settings_of(args, config)
    from experiments.common import train as work

    out = results_folder(options, args)
    with printing(args, out / f"{config.settings.head}.json"):
        if args.average:
            work.average(args.average, config.settings.head, out, args.overwrite)
        else:
            work.run(config, out, args.overwrite)
