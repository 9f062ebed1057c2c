"""The work of `experiments.evaluate_learned`: which weights and requests are judged."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from configs.evaluate_learned import EvaluateConfig
from experiments.common.evaluate_rows import Judged, study
from experiments.common.train import read, read_card
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.evaluation import HeldOut, held_out
from specmd_jax.learn.training import fingerprint
from specmd_jax.policies.trained import DATA, HEADS
from specmd_jax.report.pages.evaluate_learned import TABLE
from specmd_jax.report.writer import ResultWriter
from specmd_jax.trace import select_requests
from specmd_jax.trace.prompts import clip_requests


def run(config: EvaluateConfig, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Judges the predictors, study by study."""
    sizes = dict(config.capacities)
    config = replace(config, capacities=tuple((scope, sizes[scope]) for scope in config.scopes))
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
    with ResultWriter(out, asdict(config) | {"weights_bytes": weights}, TABLE, overwrite, resume, digest) as writer:
        study(judged, config, writer)


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
