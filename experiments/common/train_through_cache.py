"""The work of `experiments.train --begin`: weights that are there follow the gradient of a soft cache."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.learned import PACKAGE, TrainHeadsConfig
from experiments.common.command_line import output_paths
from experiments.common.train import Shown, read, read_card, weights_path
from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text
from specmd_jax.learn.settings import CacheSettings
from specmd_jax.learn.splits import Split, groups, split
from specmd_jax.learn.through_cache import tune
from specmd_jax.learn.training import export, fingerprint
from specmd_jax.policies.trained import DATA, load
from specmd_jax.report.provenance import command, git_commit, versions
from specmd_jax.setting import Setting
from specmd_jax.specs.hardware import hardware
from specmd_jax.trace.prompts import without_prompts
from specmd_jax.types import Trace

Card = dict[str, Any]


def run(config: TrainHeadsConfig, out: Path, overwrite: bool) -> None:
    """Moves the heads and writes for each its npz and card, and the manifest of the run."""
    (manifest,) = output_paths(out, overwrite, "manifest.json")
    folder = DATA if config.begin == PACKAGE else Path(config.begin)
    fetching = ("prefetcher",) if config.prefetching else ()
    weights = {head: load(head, str(folder / f"{head}.npz")) for head in sorted({*config.heads, *fetching})}
    cards = {head: read_card(folder / f"{head}.npz") for head in config.heads}
    trace = without_prompts(read(config.trace, config.requests, config.tokens))
    settings = CacheSettings(config.split, config.seed, config.updates)
    if config.small:
        settings = replace(settings, updates=2, rounds=2, batch=2, tokens=8)
    machine = None if config.hardware == "none" else hardware(config.hardware)
    budget = np.asarray(Setting(capacity=config.capacity, scope="layer").budget(trace), np.int64)
    held = split(trace, config.split, config.seed)
    seen = {head: card(each, trace, held, config) for head, each in cards.items()}  # before any work: it may refuse
    paths = {head: weights_path(out, head, overwrite) for head in cards}
    for path in paths.values():
        if folder.resolve() == path.parent.resolve():
            raise SpecmdError(f"{folder}: begins where it would write, expected another --out")
    began, shown = time.perf_counter(), Shown("cache", " updates")
    try:
        done = tune(trace, weights, budget, machine, settings, out / "run" / "cache", shown.line, shown, config.heads)
    finally:
        shown.close()
    told = {"capacity": config.capacity, "hardware": config.hardware, "history": done.history, "chosen": done.chosen}
    told |= {"heads": sorted(weights), "moved": sorted(cards), "settings": asdict(settings)}
    for head, path in paths.items():
        export(path, done.weights[head], head, seen[head] | {"through_cache": told})
        print(path)
    made_by = {"command": command(), "versions": versions(), "git_commit": git_commit(), "cores": os.cpu_count()}
    told |= {"wall_s": round(time.perf_counter() - began, 1), "begin": config.begin}
    replace_text(manifest, json.dumps({**made_by, "through_cache": told}, indent=2, sort_keys=True) + "\n")


def card(begin: Card, trace: Trace, parts: Split, config: TrainHeadsConfig) -> Card:
    """Gives what moved weights have seen: what they had, and the requests that moved them.

    Raises SpecmdError if they had learned from what this run held out.
    """
    unit, names = config.split, groups(trace, config.split)
    if unit == "request":
        names = np.array([str(int(name)) for name in names])
    mine = {part: set(names[rows].tolist()) for part, rows in parts._asdict().items()}
    if begin["trace"]["model"] != trace.model:  # another model's requests are none of these
        begin = begin | {unit: {part: [] for part in mine}}
    elif begin["settings"]["split"] != unit or (unit == "request" and begin["trace"]["sha256"] != fingerprint(trace)):
        raise SpecmdError(
            f"{config.begin}: its requests were held out by {begin['settings']['split']}, of the trace that it learned "
            f"from, expected the same --split and trace"
        )
    if known := set(begin[unit]["train"]) & (mine["validation"] | mine["test"]):
        raise SpecmdError(
            f"{config.begin}: it learned from {unit} {min(known)!r}, which this run holds out: expected its --seed"
        )
    seen = {part: sorted(set(begin[unit].get(part, [])) | mine[part]) for part in mine}
    return {
        **{key: value for key, value in begin.items() if key != "scores"},
        "settings": begin["settings"] | {"split": unit},
        "trace": begin["trace"] | {"model": trace.model, "sha256": fingerprint(trace)},
        unit: seen,
    }
