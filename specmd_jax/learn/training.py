"""Trains a predictor from routing alone, with checkpoints from which a killed run goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specmd_jax.checkpoints import checkpoints
from specmd_jax.errors import SpecmdError
from specmd_jax.files import claim, replace_text, whole_file
from specmd_jax.learn.examples import Batch, Examples, batch, examples, labels
from specmd_jax.learn.predictor import Predictor, loss, whole
from specmd_jax.learn.settings import Settings
from specmd_jax.learn.splits import Split, split
from specmd_jax.policies import use_history as history
from specmd_jax.policies.trained import Context, Free, Tied, Weights, checked, flatten
from specmd_jax.types import Trace

Ids = npt.NDArray[np.int64]


class State(NamedTuple):
    """What a checkpoint holds: with the settings, all that the rest of a run depends on."""

    step: jax.Array  # int32: updates so far
    params: Any
    optimizer: Any
    best: Any  # parameters of the epoch with the lowest validation loss
    best_loss: jax.Array  # float32


class Trained(NamedTuple):
    """A finished run."""

    weights: Weights
    parts: Split
    scores: dict[str, float]  # losses on validation and test requests
    tokens_per_s: float  # of the updates of this process, compiling left out (nan: none were left to do)


def fit(
    trace: Trace,
    settings: Settings,
    folder: Path,
    report: Callable[[str], object] = print,
    parts: Split | None = None,
) -> Trained:
    """Trains, or goes on from the last checkpoint in `folder`, and scores the best epoch on requests held out.

    `parts` says which requests those are; None: as `split` draws them. Every epoch ends with a checkpoint. The epoch is
    chosen on validation requests; test requests are scored once.

    Raises:
      SpecmdError: settings out of range, a trace that cannot be split, or a folder that another run began.
    """
    settings.check()
    given = {} if parts is None else {part: rows.tolist() for part, rows in parts._asdict().items()}
    parts = split(trace, settings.split, settings.seed) if parts is None else parts
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / "settings.json", {**asdict(settings), "trace_sha256": fingerprint(trace), **given})
    train = examples(trace, _within_memory(trace, parts.train, settings, report))
    validation = examples(trace, _within_memory(trace, parts.validation, settings, report))
    model = _model(settings)
    each_epoch = -(-len(train.demand) // settings.batch)
    optimizer = _optimizer(settings, each_epoch)
    state = _start(model, optimizer, train, settings)
    update = _updater(model, optimizer, settings.seed)
    said = labels(train, settings.head, settings.fade)
    spent, trained = 0.0, 0
    with checkpoints(folder / "checkpoints") as kept:
        latest = kept.latest
        if latest is not None:
            state = State(**kept.restore(state._asdict()))
            report(f"goes on after epoch {int(state.step) // each_epoch} of {settings.epochs}")
        for epoch in range(int(state.step) // each_epoch, settings.epochs):
            began, total = time.perf_counter(), jnp.float32(0)
            for i, rows in enumerate(_rows(len(train.demand), settings, epoch)):
                state, value = update(state, batch(train, said, rows, settings.head))
                total += value
                if epoch * each_epoch + i == int(latest or 0):
                    value.block_until_ready()
                    began = time.perf_counter()  # the first update of a process compiles
                else:
                    trained += len(rows)
            mean = float(total) / each_epoch
            spent += time.perf_counter() - began
            held_out = _mean_loss(model, state.params, validation, settings)
            if held_out < float(state.best_loss):
                state = state._replace(best=state.params, best_loss=jnp.float32(held_out))
            kept.save(int(state.step), state._asdict())
            speed = f"{trained / spent:.0f} tokens/s" if trained else ""
            report(f"epoch {epoch + 1} of {settings.epochs}: loss {mean:.5f}, validation {held_out:.5f}; {speed}")
    weights = checked(whole(state.best), str(folder))
    test = examples(trace, _within_memory(trace, parts.test, settings, report))
    scores = {
        "validation_loss": float(state.best_loss),
        "test_loss": _mean_loss(model, state.best, test, settings),
    }
    return Trained(weights, parts, scores, trained / spent if trained else float("nan"))


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

    tied = trained.weights.tied
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


def _model(settings: Settings) -> Predictor:
    return Predictor(settings.head, settings.hidden, settings.width, settings.topics, settings.drop)


def _optimizer(settings: Settings, each_epoch: int) -> optax.GradientTransformation:
    steps = each_epoch * settings.epochs
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(max(1, steps // 20), steps - 1), steps, settings.learning_rate / 100
    )
    return optax.adamw(rate, b2=0.99, weight_decay=settings.weight_decay)


def _start(model: Predictor, optimizer: Any, train: Examples, settings: Settings) -> State:
    one = batch(train, train.demand[:1].astype(np.float16), np.zeros(1, np.int64), settings.head)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(settings.seed), one))["params"]
    return State(jnp.int32(0), params, optimizer.init(params), params, jnp.float32(jnp.inf))


def _updater(model: Predictor, optimizer: Any, seed: int) -> Callable[[State, Batch], tuple[State, jax.Array]]:
    @jax.jit
    def update(state: State, given: Batch) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def objective(params: Any) -> tuple[jax.Array, jax.Array]:
            free, tied = _logits(model, params, given, train=True, rngs={"dropout": key})
            return loss(free, given.label) + loss(tied, given.label), loss(tied, given.label)

        (_, value), slope = jax.value_and_grad(objective, has_aux=True)(state.params)
        change, memory = optimizer.update(slope, state.optimizer, state.params)
        params = optax.apply_updates(state.params, change)
        return state._replace(step=state.step + 1, params=params, optimizer=memory), value

    return update


def _logits(model: Predictor, params: Any, given: Batch, **options: Any) -> tuple[jax.Array, jax.Array]:
    return cast("tuple[jax.Array, jax.Array]", model.apply({"params": params}, given, **options))


def _rows(tokens: int, settings: Settings, epoch: int) -> Iterator[Ids]:
    """Gives the batches of an epoch, all of one size: the last is filled up from the first."""
    order = np.random.default_rng([settings.seed, epoch]).permutation(tokens)
    for start in range(0, tokens, settings.batch):
        yield np.take(order, np.arange(start, start + settings.batch), mode="wrap")


def _mean_loss(model: Predictor, params: Any, found: Examples, settings: Settings) -> float:
    said = labels(found, settings.head, settings.fade)
    total, count = 0.0, len(found.demand)
    for start in range(0, count, settings.batch):
        rows = np.arange(start, min(start + settings.batch, count))
        padded = batch(found, said, np.resize(rows, settings.batch), settings.head)
        each = _token_losses(model, params, padded)
        total += float(np.asarray(each)[: len(rows)].astype(np.float64).sum())
    return total / count


@partial(jax.jit, static_argnames="model")
def _token_losses(model: Predictor, params: Any, given: Batch) -> jax.Array:
    tied = _logits(model, params, given)[1]
    return jax.vmap(loss)(tied, given.label)


def _within_memory(trace: Trace, requests: Ids, settings: Settings, report: Callable[[str], object]) -> Ids:
    """As many of the requests, drawn by the seed, as `memory_bytes` of examples hold; at least one."""
    each = trace.layers * trace.experts * (history.FEATURES + 5)
    most = settings.memory_bytes // each
    if trace.lengths[requests].sum() <= most:
        return requests
    drawn = np.random.default_rng([settings.seed, len(requests)]).permutation(requests)
    fits = np.cumsum(trace.lengths[drawn]) <= most
    kept = np.sort(drawn[: max(1, int(fits.sum()))])
    report(f"memory_bytes {settings.memory_bytes} holds {len(kept)} of {len(requests)} requests")
    return kept
