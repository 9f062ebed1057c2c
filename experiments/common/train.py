"""The work of the training commands: the run, the files it leaves, and what reads them."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.learned import HEADS as TRAINABLE
from configs.learned import TrainConfig, TrainHeadsConfig
from experiments.common.bars import bar
from experiments.common.command_line import output_paths
from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text
from specmd_jax.learn.training import averaged, card, export, fit, resolved
from specmd_jax.policies.trained import HEADS, load
from specmd_jax.report.provenance import command, git_commit, versions
from specmd_jax.trace import as_trace, select_requests
from specmd_jax.trace.prompts import clip_requests
from specmd_jax.types import Trace


def run(config: TrainConfig, out: Path, overwrite: bool) -> None:
    """Trains one head and writes ``<head>.npz``, its card ``<head>.json`` and the manifest of the run."""
    _run({config.settings.head: (config, "experiments.common.train:train_head")}, out, overwrite)


def run_heads(config: TrainHeadsConfig, out: Path, overwrite: bool) -> None:
    """Trains several heads, one after the other, and writes for each what `run` does."""
    _run({name: (TRAINABLE[name].config.of(config), TRAINABLE[name].work) for name in config.heads}, out, overwrite)


def _run(heads: Mapping[str, tuple[Any, str]], out: Path, overwrite: bool) -> None:
    (manifest,) = output_paths(out, overwrite, "manifest.json")
    for head, (config, _) in heads.items():
        # without a manifest, weights by these settings are of this run, which was ended before the next head was done
        if not _of_run(out / f"{head}.npz", config):
            weights_path(out, head, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {}
    for head, (config, work) in heads.items():
        module, _, function = work.partition(":")
        began = time.perf_counter()
        told[head] = getattr(import_module(module), function)(config, out)
        told[head] |= {"settings": asdict(config), "wall_s": round(time.perf_counter() - began, 1)}
    made_by = {"command": command(), "versions": versions(), "git_commit": git_commit(), "cores": os.cpu_count()}
    replace_text(manifest, json.dumps({**made_by, "heads": told}, indent=2, sort_keys=True) + "\n")


def _of_run(npz: Path, config: Any) -> bool:
    return npz.exists() and read_card(npz)["settings"] == asdict(resolved(config.settings))


def train_head(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Trains one head of `specmd_jax.policies.trained`; gives what the manifest of the run says of it."""
    head = config.settings.head
    npz = out / f"{head}.npz"
    whole = as_trace(config.trace)
    trace = _first(whole, config.requests, config.tokens)
    shown = Shown(head)
    not_read = {"requests": whole.requests - trace.requests, "tokens": whole.tokens - trace.tokens}
    if not_read["tokens"]:
        shown.line(f"reads {trace.requests} of {whole.requests} requests, {trace.tokens:,} of {whole.tokens:,} tokens")
    try:
        done = fit(trace, config.settings, out / "run" / head, shown.line, progress=shown)
    finally:
        shown.close()
    export(npz, done.weights, head, card(trace, config.settings, done))
    print(f"{npz}: " + ", ".join(f"{name} {value:.5f}" for name, value in done.scores.items()))
    return {
        "scores": done.scores,
        "tokens_per_s": None if math.isnan(done.tokens_per_s) else round(done.tokens_per_s),
        "not_read": not_read,
        "without_decoded_tokens": done.left_out,
    }


class Shown:
    """What a run tells: lines on stdout, each naming its head, and a bar on stderr that knows how long it takes."""

    def __init__(self, head: str, unit: str = " tokens") -> None:
        self._head, self._unit = head, unit
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = bar(total, self._unit, done)
        self._bar.update(done - self._bar.n)

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(f"{self._head}: {text}", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def average(names: Sequence[str], head: str, out: Path, overwrite: bool) -> None:
    """Writes the average of trained predictors; all of them must have held out the same requests of the same trace."""
    files = [Path(name) for name in names]
    if len(files) < 2:
        raise SpecmdError(f"--average {names[0]}: expected at least two files")
    parts = [load(head, str(file)) for file in files]
    cards = [read_card(file) for file in files]
    unit = cards[0]["settings"]["split"]
    for file, other in zip(files, cards, strict=True):
        for key in ("trace", unit):
            if other.get(key) != cards[0][key]:
                raise SpecmdError(f"{file}: its {key} is not that of {files[0]}, expected the same trace and split")
    npz = weights_path(out, head, overwrite)
    made_of = [{"settings": one["settings"], "scores": one["scores"]} for one in cards]
    told = {key: value for key, value in cards[0].items() if key != "scores"}
    export(npz, averaged(parts), head, told | {"averaged": made_of})
    print(npz)


def weights_path(out: Path, head: str, overwrite: bool) -> Path:
    """Gives where the weights go. Raises `SpecmdError` if there are some, or something else lies where their card goes.

    The card is written first: one without weights is of a run that was ended in between, and goes when it is repeated.
    """
    (npz,) = output_paths(out, overwrite, f"{head}.npz")
    if npz.with_suffix(".json").exists() and not overwrite:
        read_card(npz)
    return npz


def read_card(file: Path) -> dict[str, Any]:
    """Gives the card beside a file of weights."""
    beside = file.with_suffix(".json")
    try:
        card = json.loads(beside.read_text(encoding="utf-8"))
        head, unit = card["head"], card["settings"]["split"]
        assert head in HEADS and isinstance(card[unit]["train"], list) and card["trace"]["model"]
    except OSError as error:
        raise SpecmdError(f"{beside}: {error.strerror or error}; expected the card that training wrote there") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise SpecmdError(f"{beside}: expected the card that training wrote beside {file.name}") from None
    return card


def read(name: str, requests: int = 0, tokens: int = 0) -> Trace:
    """Reads a bundled trace or a trace file: its first requests and the first tokens of each, unless 0."""
    return _first(as_trace(name), requests, tokens)


def _first(trace: Trace, requests: int, tokens: int) -> Trace:
    if requests:
        trace = select_requests(trace, range(min(requests, trace.requests)))
    return clip_requests(trace, tokens) if tokens else trace
