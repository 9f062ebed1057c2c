"""What the two training commands share: options, the run, the files it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.learned import TrainConfig
from experiments._cli import output_paths, parser
from specmd_jax.errors import unknown
from specmd_jax.learn.splits import UNITS
from specmd_jax.learn.training import card, export, fit
from specmd_jax.trace.prompts import clip_requests
from specmd_jax.trace.store import BUNDLED, bundled, load_trace, select_requests
from specmd_jax.types import Trace


def train(doc: str | None, name: str, config: TrainConfig, argv: Sequence[str] | None) -> None:
    """Trains one head and writes ``<head>.npz`` and its card ``<head>.json``."""
    options = parser(doc, name)
    options.add_argument("--trace", metavar="NPZ", help=f"a trace file or a bundled trace (default: {config.trace})")
    options.add_argument("--seed", type=int, metavar="N", help="of the split, the weights and the order (default: 0)")
    options.add_argument("--split", metavar="UNIT", help=f"one of {', '.join(UNITS)} (default: category)")
    options.add_argument("--epochs", type=int, metavar="N", help=f"default: {config.settings.epochs}")
    args = options.parse_args(argv)
    given = {name: getattr(args, name) for name in ("seed", "split", "epochs") if getattr(args, name) is not None}
    config = config.smoke() if args.smoke else config
    config = replace(config, trace=args.trace or config.trace, settings=replace(config.settings, **given))
    config.settings.check()
    trace = read(config.trace, config.requests, config.tokens)
    head = config.settings.head
    npz, _ = output_paths(args, f"{head}.npz", f"{head}.json")
    done = fit(trace, config.settings, args.out / "run", lambda line: print(line, flush=True))
    export(npz, done.weights, head, card(trace, config.settings, done))
    print(f"{npz}: " + ", ".join(f"{name} {value:.5f}" for name, value in done.scores.items()))


def read(name: str, requests: int = 0, tokens: int = 0) -> Trace:
    """A bundled trace or a trace file; its first requests and the first tokens of each, unless 0."""
    if name not in BUNDLED and not Path(name).suffix and not Path(name).exists():
        raise unknown("trace", name, BUNDLED)
    trace = bundled(name) if name in BUNDLED else load_trace(name)
    if requests:
        trace = select_requests(trace, range(min(requests, trace.requests)))
    return clip_requests(trace, tokens) if tokens else trace
