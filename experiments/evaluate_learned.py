"""What the learned policies are worth on requests that they never saw.

    python -m experiments.evaluate_learned                                    # the bundled trace and checkpoints
    python -m experiments.evaluate_learned --trace mine.npz --checkpoint results/train_evictor/evictor.npz
    python -m experiments.evaluate_learned --scopes layer --capacities 25%,50% --links 0.5,1,pcie5-x16
    python -m experiments.evaluate_learned --smoke                            # seconds: see that it works

Of a trace of the model that a checkpoint was trained on, only requests of groups (categories, say) that neither
training nor validation had are used; the first line says which. A trace of another shape goes through the part of the
predictor that transfers. The cache and every policy start anew with each request.

Shows the share of the hits between LRU and Belady that each policy gains (gap closed), recall of the prefetchers, stall
on a link against the bounds on any policy, with the predictor's own time charged, controls, and routing that held-out
and training requests share. Intervals are the central 95 % of a bootstrap over requests. Writes rows.csv, manifest.json
and figures/*.png to results/evaluate_learned. About 5 minutes on 2 idle cores.

Expected of the first command with 25 % of each layer's experts: `learned` closes about 0.6 of the gap, the best classic
0.35.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from configs.evaluate_learned import EvaluateConfig
from experiments.common.command_line import main_guard, parser, results_folder
from experiments.common.evaluate_rows import Judged, study
from experiments.common.options import options_of, settings_of
from experiments.common.train import read, read_card
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.evaluation import HeldOut, held_out
from specmd_jax.learn.training import fingerprint
from specmd_jax.policies.trained import DATA, HEADS
from specmd_jax.report.pages.evaluate_learned import TABLE, draw
from specmd_jax.report.writer import ResultWriter
from specmd_jax.trace import select_requests
from specmd_jax.trace.prompts import clip_requests


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "evaluate_learned", resume=True)
    options_of(options, EvaluateConfig())
    args = options.parse_args(argv)
    config = settings_of(args, EvaluateConfig())
    sizes = dict(config.capacities)
    config = replace(config, capacities=tuple((scope, sizes[scope]) for scope in config.scopes))
    out = results_folder(options, args)
    trace = read(config.trace)
    digest = fingerprint(trace)
    files = checkpoints(config.checkpoint)
    cards = {head: read_card(path) for head, path in files.items()}
    kept = {head: held_out(trace, card, digest) for head, card in cards.items()}
    used = _both(kept)
    print("\n".join(f"{head}: {found.why}" for head, found in kept.items()), flush=True)
    chosen = used.requests[: config.requests or None]
    part = clip_requests(select_requests(trace, chosen), config.tokens) if config.tokens else None
    judged = Judged(trace, part or select_requests(trace, chosen), used, files)
    weights = {head: path.stat().st_size for head, path in files.items()}
    with ResultWriter(
        out, asdict(config) | {"weights_bytes": weights}, TABLE, args.overwrite, args.resume, digest
    ) as writer:
        study(judged, config, writer)
    print(draw(out))


def checkpoints(place: str) -> dict[str, Path]:
    """Gives the weights of both heads: of a folder, of one file and the package, or of the package."""
    files = {head: DATA / f"{head}.npz" for head in HEADS}
    if not place:
        return files
    path = Path(place)
    if path.is_dir():
        found = {head: path / f"{head}.npz" for head in HEADS if (path / f"{head}.npz").exists()}
    else:
        found = {str(read_card(path).get("head")): path}
    if not found or not found.keys() <= set(HEADS):
        raise SpecmdError(f"{path}: expected {' or '.join(f'{head}.npz' for head in HEADS)} there")
    return files | found


def _both(kept: dict[str, HeldOut]) -> HeldOut:
    """Gives the requests that neither head learned from, and those that one of them did."""
    first, second = kept.values()
    both = sorted(set(first.requests.tolist()) & set(second.requests.tolist()))
    if not both:
        raise SpecmdError("each request was learned from by one of the two predictors: give a checkpoint of both")
    trained = sorted(set(first.trained.tolist()) | set(second.trained.tolist()))
    return HeldOut(np.array(both, np.int64), np.array(trained, np.int64), first.why)


if __name__ == "__main__":
    main_guard(main)
