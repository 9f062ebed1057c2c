"""Trains a predictor from routing alone, with checkpoints from which a killed run goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specmd_jax.checkpoints import checkpoints
from specmd_jax.errors import SpecmdError
from specmd_jax.files import claim, replace_text, whole_file
from specmd_jax.learn.device import Device, first_params
from specmd_jax.learn.examples import Ids, Windows, examples
from specmd_jax.learn.host import Host
from specmd_jax.learn.predictor import whole
from specmd_jax.learn.settings import BATCHES, Settings
from specmd_jax.learn.splits import Split, split
from specmd_jax.policies.trained import Context, Free, Tied, Weights, checked, flatten
from specmd_jax.trace import select_requests
from specmd_jax.types import Trace
from specmd_jax.units import MIB


class Trained(NamedTuple):
    """A finished run."""

    weights: Weights
    parts: Split
    scores: dict[str, float]  # losses on validation and test requests
    tokens_per_s: float  # of the updates of this process, compiling left out (nan: none were left to do)
    left_out: dict[str, int]  # requests by part that have no decoded tokens, and so teach and tell nothing


def fit(
    trace: Trace,
    settings: Settings,
    folder: Path,
    report: Callable[[str], object] = print,
    parts: Split | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Trained:
    """Trains, or goes on from the last checkpoint in `folder`, and scores the best epoch on requests held out.

    `parts` says which requests those are; None: as `split` draws them. Every epoch ends with a checkpoint. The epoch is
    chosen on validation requests; test requests are scored once. All requests take part, however many there are: what
    does not fit `Settings.window_bytes` at once is drawn window by window. `progress` hears of the tokens of the
    updates so far and of all.

    Raises:
      SpecmdError: settings out of range, a trace that cannot be split, or a folder that another run began.
    """
    settings.check()
    given = {} if parts is None else {part: rows.tolist() for part, rows in parts._asdict().items()}
    if parts is None:
        parts = split(trace, settings.split, settings.seed, validation=settings.validation, test=settings.test)
    settings = resolved(settings)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / "settings.json", {**asdict(settings), "trace_sha256": fingerprint(trace), **given})
    train, validation, test = (Windows(trace, part, settings.window_bytes, settings.seed) for part in parts)
    left_out = {name: len(rows) - len(held.requests) for name, rows, held in
                zip(parts._fields, parts, (train, validation, test), strict=True)}  # fmt: skip
    report(_told(train, left_out, settings))
    engine = _engine(trace, train, settings)
    each_epoch = train.steps(settings.batch)
    rates = _rates(settings, each_epoch)
    state, spent, trained = engine.start(), 0.0, 0
    best, best_loss = _copied(state.weights), np.array(np.inf)
    with checkpoints(folder / "checkpoints") as kept:
        latest = kept.latest
        if latest is not None:
            found = kept.restore({"engine": state._asdict(), "best": best, "best_loss": best_loss})
            state = type(state)(**_copied(found["engine"]))
            best, best_loss = found["best"], found["best_loss"]
            report(f"goes on after epoch {int(state.step) // each_epoch} of {settings.epochs}")
        step = int(state.step)  # counted here: to ask a device for it would wait for every update
        for epoch in range(step // each_epoch, settings.epochs):
            total, began, first = 0.0, time.perf_counter(), trained == 0
            for held, rows in train.shuffled(settings.batch, settings.seed, epoch):
                state, value = engine.update(state, held, rows, rates[step])
                total, step = total + value, step + 1
                if first:
                    float(value)  # has been waited for: the first update of a process compiles
                    began, first = time.perf_counter(), False
                else:
                    trained += len(rows)
                if progress is not None:
                    progress(step * settings.batch, each_epoch * settings.epochs * settings.batch)
            mean = float(total) / each_epoch
            spent += time.perf_counter() - began
            held_out = _mean_loss(engine, state.weights, validation, settings)
            if held_out < float(best_loss):
                best, best_loss = _copied(state.weights), np.array(held_out)
            kept.save(step, {"engine": state._asdict(), "best": best, "best_loss": best_loss})
            speed = f"{trained / spent:.0f} tokens/s" if trained else ""
            if trained and epoch + 1 < settings.epochs:
                to_come = (settings.epochs - epoch - 1) * each_epoch * settings.batch
                speed += f", about {to_come * spent / trained:.0f} s left"
            report(f"epoch {epoch + 1} of {settings.epochs}: loss {mean:.5f}, validation {held_out:.5f}; {speed}")
    weights = checked(whole(engine.params(best)), str(folder))
    scores = {"validation_loss": float(best_loss), "test_loss": _mean_loss(engine, best, test, settings)}
    return Trained(weights, parts, scores, trained / spent if trained else float("nan"), left_out)


def averaged(parts: Sequence[Weights]) -> Weights:
    """Gives one predictor whose logits are the mean of those of several: their hidden numbers side by side.

    What leads from the hidden numbers to the logits is divided by their number, and rounded to whole steps again.
    Raises SpecmdError if their shapes do not fit, or if the sums could leave the exact integers.
    """

    def share(arrays: Sequence[npt.NDArray[np.generic]], axis: int) -> npt.NDArray[Any]:
        return np.concatenate([np.rint(a.astype(np.float64) / len(arrays)).astype(a.dtype) for a in arrays], axis)

    def mean(arrays: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.int32]:
        return np.rint(np.mean([np.asarray(a, np.float64) for a in arrays], axis=0)).astype(np.int32)

    def free(each: Sequence[Free]) -> Free:
        return Free(
            np.concatenate([f.hidden for f in each], axis=1),
            np.concatenate([f.hidden_bias for f in each]),
            share([f.out for f in each], 0),
            mean([f.bias for f in each]),
        )

    def context(each: Sequence[Context]) -> Context:
        return Context(
            np.concatenate([c.into for c in each], axis=2),
            np.concatenate([c.bias for c in each], axis=1),
            share([c.out for c in each], 2),
        )

    if len({part.tied.bias.shape for part in parts}) != 1:
        raise SpecmdError("expected predictors of the same layers and experts")
    tied = [part.tied for part in parts]
    joined = Tied(
        free([t.free for t in tied]),
        mean([t.bias for t in tied]),
        context([t.wave for t in tied]),
        context([t.topic for t in tied]),
    )
    return checked(Weights(free([part.free for part in parts]), joined), "average")


def export(path: Path, weights: Weights, head: str, card: dict[str, Any]) -> None:
    """Writes `path` (an npz that `policies.trained.load` reads) and its card beside it, ``<stem>.json``."""
    if path.suffix != ".npz":
        raise SpecmdError(f"{path}: expected a name that ends in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = dict(flatten(weights))
    with whole_file(path) as file:
        np.savez_compressed(file, head=np.array(head), **arrays)
        file.flush()
        os.fsync(file.fileno())  # a disk that is full says so before anything is there under its own name
        replace_text(path.with_suffix(".json"), json.dumps(card, indent=2, sort_keys=True) + "\n")  # before the weights


def card(trace: Trace, settings: Settings, trained: Trained) -> dict[str, Any]:
    """Gives what the weights saw and how they score: the text that travels with them."""
    rows = trace.meta.get("requests")
    seen = trained.parts

    def names(requests: Ids) -> list[str]:
        if settings.split == "request" or not isinstance(rows, list):
            return [str(int(r)) for r in requests]
        return sorted({str(rows[int(r)][settings.split]) for r in requests})

    tied, settings = trained.weights.tied, resolved(settings)
    return {
        "head": settings.head,
        "inputs": "expert ids and gates of earlier visits; units and formulas: specmd_jax/policies/trained.py",
        "settings": asdict(settings),
        "trace": {
            "model": trace.model,
            "sha256": fingerprint(trace),
            "licence": str(trace.meta.get("licence", "unknown")),
            "source": str(trace.meta.get("source", "unknown")),
            "layers": tied.bias.shape[0],
            "experts": tied.bias.shape[1],
            "top_k": trace.top_k,
        },
        "requests": {part: len(getattr(seen, part)) for part in seen._fields},
        "tokens": {part: int(trace.lengths[getattr(seen, part)].sum()) for part in seen._fields},
        settings.split: {part: names(getattr(seen, part)) for part in seen._fields},
        "left_out": trained.left_out,
        "scores": trained.scores,
        "licence": "Apache-2.0",
    }


def fingerprint(trace: Trace) -> str:
    """Gives the hex digest of what a predictor can see of a trace, and of the requests it is split by."""
    digest = hashlib.sha256()
    for array in (trace.expert_ids, trace.gates, trace.lengths, trace.prompt_lengths):
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(json.dumps(trace.meta.get("requests"), sort_keys=True).encode())
    return digest.hexdigest()


def resolved(settings: Settings) -> Settings:
    """Gives settings with an engine other than "auto", its own batch where none is chosen, and its `every`."""
    engine = settings.engine
    if engine == "auto":
        engine = "host" if jax.default_backend() == "cpu" else "jax"
    every = settings.every if engine == "host" else 1
    return replace(settings, engine=engine, batch=settings.batch or BATCHES[engine], every=every)


def _engine(trace: Trace, train: Windows, settings: Settings) -> Any:  # a `Host` or a `Device`, each with its own state
    first = select_requests(trace, train.requests[:1])
    params = first_params(examples(first, np.zeros(1, np.int64)), settings)
    return Host(params, settings, trace.top_k) if settings.engine == "host" else Device(params, settings)


def _rates(settings: Settings, each_epoch: int) -> npt.NDArray[np.float32]:
    """Gives the learning rate of every update."""
    steps = each_epoch * settings.epochs
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(max(1, steps // 20), steps - 1), steps, settings.learning_rate / 100
    )
    return np.asarray(jax.vmap(rate)(jnp.arange(steps)), np.float32)


def _copied(weights: Any) -> Any:
    return jax.tree.map(lambda array: array.copy(), weights)  # a host's are changed in place


def _mean_loss(engine: Any, weights: Any, held: Windows, settings: Settings) -> float:
    total = 0.0
    for found, rows, new in held.in_turn(settings.batch):
        total += float(engine.losses(weights, found, rows)[0][:new].sum())
    return total / sum(held.tokens)


def _told(train: Windows, left_out: dict[str, int], settings: Settings) -> str:
    """Gives the line that says what a run learns from, and what it leaves out."""
    lacking = sum(left_out.values())
    text = f"learns from all {len(train.requests):,} training requests ({sum(train.tokens):,} decoded tokens)"
    if len(train) > 1:
        text += f" in {len(train)} windows of at most {settings.window_bytes / MIB:.0f} MiB"
    return text + (f"; {lacking} requests without decoded tokens are left out" if lacking else "")
