"""The work of the two training commands: the run, the files it leaves, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.learned import TrainConfig
from experiments.common.command_line import output_paths
from specmd_jax.errors import SpecmdError
from specmd_jax.learn.training import averaged, card, export, fit
from specmd_jax.policies.trained import HEADS, load
from specmd_jax.trace import as_trace, select_requests
from specmd_jax.trace.prompts import clip_requests
from specmd_jax.types import Trace


def run(config: TrainConfig, out: Path, overwrite: bool) -> None:
    """Trains one head and writes ``<head>.npz`` and its card ``<head>.json``."""
    head = config.settings.head
    npz = weights_path(out, head, overwrite)
    trace = read(config.trace, config.requests, config.tokens)
    done = fit(trace, config.settings, out / "run", lambda line: print(line, flush=True))
    export(npz, done.weights, head, card(trace, config.settings, done))
    print(f"{npz}: " + ", ".join(f"{name} {value:.5f}" for name, value in done.scores.items()))


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
    trace = as_trace(name)
    if requests:
        trace = select_requests(trace, range(min(requests, trace.requests)))
    return clip_requests(trace, tokens) if tokens else trace
