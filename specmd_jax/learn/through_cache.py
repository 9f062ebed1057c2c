"""Moves a trained predictor's last layer along the gradient of a soft cache: of misses or stall, not of labels.

What is moved is what leads from the hidden numbers to the scores (`out` and `bias` of the part that serves the trace's
shape); hidden numbers stay as they are. Training requests are cut into windows of some tokens. A window knows all that
its request did before, but begins with an empty cache, so that no gradient has to come from far back. The forward pass
sees the stored integers (straight through, as in `learn.predictor`).

With a prefetcher both heads move together, or the evictor alone learns what the prefetcher brings anyway. Of its scores
the soft cache wants the `count` best for the next layer, as the selection `topk` does.

Axes: W windows of a batch, T tokens of a window, V = T * L visits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from specmd_jax.checkpoints import checkpoints
from specmd_jax.engines.prepared import prepare
from specmd_jax.errors import SpecmdError
from specmd_jax.files import claim
from specmd_jax.learn.examples import Batch, Examples, Ids, batch, examples
from specmd_jax.learn.predictor import INT8, INT16, PLACES, STEP, rounded
from specmd_jax.learn.settings import CacheSettings
from specmd_jax.learn.splits import Split, split
from specmd_jax.learn.training import fingerprint
from specmd_jax.policies.features import Features
from specmd_jax.policies.trained import HEADS, MOST_HIDDEN, ONE, Context, Free, Weights, checked
from specmd_jax.programs import room_for_programs
from specmd_jax.soft import replay as soft
from specmd_jax.soft.replay import Given, Knobs
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.trace import select_requests
from specmd_jax.trace.prompts import without_prompts
from specmd_jax.types import Trace

EVICTOR, PREFETCHER = "evictor", "prefetcher"
STEPS = 10  # halvings that look for the eviction's cut
JUDGED = 1e-3  # temperature at which validation windows are replayed: eviction is all but hard
FINEST = 1.0 / ONE  # of a bias

Params = dict[str, dict[str, jax.Array]]
"""By head: `out` and `bias`, and where the shape is that of the weights `wave` and `topic`; in logits."""


class Windows(NamedTuple):
    """Requests cut into windows, as requests of a trace, and what predictors see of their tokens."""

    trace: Trace
    found: Examples
    first: Ids  # [N] of each window, in rows of `found`


class Tuned(NamedTuple):
    """A finished run."""

    weights: dict[str, Weights]  # of the heads that move
    parts: Split
    history: list[float]  # validation: what `Settings` says, as it was and after each round
    chosen: int  # the round that is kept; 0: as it was


def tune(
    trace: Trace,
    weights: Mapping[str, Weights],
    budget: Budget,
    hardware: Hardware | None,
    settings: CacheSettings,
    folder: Path,
    report: Callable[[str], object] = print,
    progress: Callable[[int, int], object] | None = None,
    moves: Sequence[str] = HEADS,
) -> Tuned:
    """Moves the weights of an evictor, and of a prefetcher if there is one, or goes on from the last checkpoint.

    Args:
      trace: prompts are left out.
      weights: by head; a prefetcher among them fetches.
      budget: bytes of one pool, or [L] of a pool per layer.
      hardware: the stall on it is what falls; None: the misses do.
      folder: for the checkpoints of this run.
      moves: heads that move, as far as there are weights of them; the others stay as they are.

    Raises:
      SpecmdError: no evictor, a prefetcher without hardware, settings out of range, or a folder of another run.
    """
    room_for_programs()
    settings.check()
    if EVICTOR not in weights:
        raise SpecmdError(f"heads are {', '.join(weights)}, expected the evictor among them: it decides what is missed")
    if PREFETCHER in weights and hardware is None:
        raise SpecmdError("a prefetcher is tuned by the stall that it saves: expected hardware")
    trace = without_prompts(trace)
    parts = split(trace, settings.split, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    moves = [head for head in weights if head in moves]
    told = {
        "heads": sorted(weights),
        "moves": sorted(moves),
        "budget": np.asarray(budget).tolist(),
        "hardware": None if hardware is None else _floats(hardware),
    }
    claim(folder / "settings.json", {**asdict(settings), "trace_sha256": fingerprint(trace), **told})
    every = {head: _params(each, trace) for head, each in weights.items()}
    begin = {head: every[head] for head in moves}
    static, still = _Static(tuple(weights), settings.count), frozen(weights, trace)

    def measure(params: Params, *rest: Any) -> jax.Array:
        return _cost(static, still, every | params, *rest)

    train, held = (cut_up(trace, rows, settings.tokens) for rows in (parts.train, parts.validation))
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.updates, 0.05))

    def given(windows: Windows, rows: Ids) -> tuple[Given, dict[str, Batch]]:
        return _given(windows, rows, tuple(weights), hardware, settings.tokens)

    bytes_ = jnp.asarray(np.asarray(budget, np.float64), jnp.float32)

    @jax.jit
    def update(params: Params, memory: Any, step: jax.Array, some: Given, seen: dict[str, Batch]) -> Any:
        cooling = step.astype(jnp.float32) / max(1, settings.updates - 1)
        temperature = settings.hot * (settings.cold / settings.hot) ** cooling
        value, slope = jax.value_and_grad(measure)(params, some, seen, bytes_, temperature)
        change, memory = optimizer.update(slope, memory)
        return optax.apply_updates(params, change), memory, value

    judge = jax.jit(measure)

    def validation(params: Params) -> float:
        costs, sizes = [], []
        for at in range(0, len(held.first), settings.batch):
            rows = np.arange(at, min(at + settings.batch, len(held.first)))
            some, seen = given(held, np.resize(rows, settings.batch))
            fresh = jnp.arange(settings.batch) < len(rows)  # the others repeat them
            some = some._replace(counted=some.counted * fresh)
            costs.append(float(judge(params, some, seen, bytes_, jnp.float32(JUDGED))))
            sizes.append(float(jnp.sum(some.demand * some.counted[:, None])))
        return float(np.average(costs, weights=sizes))

    each_epoch = max(1, len(train.first) // settings.batch)
    rounds = min(settings.rounds, settings.updates)
    params, memory, step = begin, optimizer.init(begin), 0
    history = np.full(rounds + 1, np.nan)
    best, chosen = begin, 0
    with checkpoints(folder / "checkpoints") as kept:
        if kept.latest is not None:
            like = {"params": params, "memory": memory, "step": step, "history": history, "best": best, "chosen": 0}
            old = kept.restore(like)
            params, memory, best = old["params"], old["memory"], old["best"]
            history, step, chosen = np.array(old["history"]), int(old["step"]), int(old["chosen"])
            report(f"goes on after update {step} of {settings.updates}")
        else:
            history[0] = validation(begin)
            report(f"as it is: validation {settings.measure(hardware is not None)} {history[0]:.4f}")
        for nth in range(1, rounds + 1):
            end = settings.updates * nth // rounds
            if step >= end:
                continue
            while step < end:
                order = np.random.default_rng([settings.seed, step // each_epoch]).permutation(len(train.first))
                at = step % each_epoch * settings.batch
                rows = np.take(order, np.arange(at, at + settings.batch), mode="wrap")
                params, memory, _ = update(params, memory, jnp.int32(step), *given(train, rows))
                step += 1
                if progress is not None:
                    progress(step, settings.updates)
            history[nth] = validation(params)
            if history[nth] < np.nanmin(history[:nth]):
                best, chosen = params, nth
            kept.save(step, {"params": params, "memory": memory, "step": step, "history": history, "best": best,
                             "chosen": chosen})  # fmt: skip
            report(f"update {step} of {settings.updates}: validation {history[nth]:.4f}")
    found = {head: _stored(weights[head], best[head], trace, str(folder)) for head in moves}
    return Tuned(found, parts, [float(value) for value in history], chosen)


def cut_up(trace: Trace, requests: Ids, tokens: int) -> Windows:
    """Cuts some requests (without prompts) into windows of up to `tokens` tokens."""
    part = select_requests(trace, requests)
    lengths = [min(tokens, int(length) - at) for length in part.lengths for at in range(0, int(length), tokens)]
    meta = {key: value for key, value in part.meta.items() if key not in ("requests", "accepted")}
    cut = replace(part, lengths=np.array(lengths, np.int32), prompt_lengths=np.zeros(len(lengths), np.int32), meta=meta)
    return Windows(cut, examples(trace, requests), np.cumsum([0, *lengths[:-1]]).astype(np.int64))


def _given(
    windows: Windows, rows: Ids, heads: tuple[str, ...], hardware: Hardware | None, tokens: int
) -> tuple[Given, dict[str, Batch]]:
    parts = [prepare(select_requests(windows.trace, [int(row)])) for row in rows]
    some = soft.given(parts, hardware, least=tokens * windows.trace.layers)
    last = len(windows.found.demand) - 1
    token = np.minimum(windows.first[rows][:, None] + np.arange(tokens), last).reshape(-1)  # [W * T]; the rest is blank
    return some, {head: batch(windows.found, windows.found.demand.astype(np.float32), token, head) for head in heads}


class Frozen(NamedTuple):
    """The stored integers of a head that do not move, as floats."""

    hidden: jax.Array  # [F, J]
    hidden_bias: jax.Array  # [J]
    wave: tuple[jax.Array, jax.Array] | None  # [L, L * E, D], [L, D]
    topic: tuple[jax.Array, jax.Array] | None  # [1 or L, L * E, S], [L, S]


def frozen(weights: Mapping[str, Weights], trace: Trace) -> dict[str, Frozen]:
    """Gives what does not move, by head."""

    def context(part: Context) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(part.into, jnp.float32), jnp.asarray(part.bias, jnp.float32)

    found = {}
    for head, each in weights.items():
        tied, free = _fits(each, trace), _free(each, trace)
        found[head] = Frozen(
            jnp.asarray(free.hidden, jnp.float32),
            jnp.asarray(free.hidden_bias, jnp.float32),
            context(each.tied.wave) if tied else None,
            context(each.tied.topic) if tied else None,
        )
    return found


def logits(place: int, params: Mapping[str, jax.Array], still: Frozen, seen: Batch) -> jax.Array:
    """Gives [N, L, E], what `policies.trained.scores` gives in 1/4096, from [N] tokens; `place` as in `PLACES`."""
    tokens, layers, experts, _ = seen.seen.shape
    hidden = _active(jnp.asarray(seen.seen, jnp.float32) @ still.hidden + still.hidden_bias, 2**-8)
    found = hidden @ rounded(params["out"], INT16)
    bias = params["bias"] + jax.lax.stop_gradient(jnp.round(params["bias"] / FINEST) * FINEST - params["bias"])
    found = found + bias
    target = np.arange(layers)[:, None]
    passed = jnp.asarray(np.arange(layers) < target + place)[..., None]  # [target, layer, 1]
    for name, part, scale, now, before in (
        ("wave", still.wave, 2**-4, seen.wave, seen.wave_before),
        ("topic", still.topic, 2**-6, seen.topic, seen.topic_before),
    ):
        if part is None:
            continue
        into, begins = part
        table = (jnp.asarray(x, jnp.float32).reshape(tokens, 1, layers, experts) for x in (now, before))
        mixed = jnp.where(passed, *table).reshape(tokens, layers, layers * experts)  # [N, target, L * E]
        into = jnp.broadcast_to(into, (layers, *into.shape[1:]))
        raw = jnp.einsum("nti,tid->ntd", mixed, into, precision=jax.lax.Precision.HIGHEST) + begins
        found = found + jnp.einsum("ntd,ted->nte", _active(raw, scale), rounded(params[name], INT8))
    return found


def _active(raw: jax.Array, scale: float) -> jax.Array:
    """Gives hidden numbers, which do not move."""
    return jax.lax.stop_gradient(jnp.clip(jnp.floor(raw * scale), 0, MOST_HIDDEN) * STEP)


class _Static(NamedTuple):
    heads: tuple[str, ...]
    selected: int  # by the prefetcher


def _cost(
    static: _Static,
    still: Mapping[str, Frozen],
    params: Params,
    some: Given,
    seen: Mapping[str, Batch],
    budget: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """Gives misses, or seconds of stall in mean copies, over the counted demand of a batch of windows."""
    windows = some.demand.shape[2]

    def by_visit(head: str) -> jax.Array:  # [V, E, W]
        found = logits(PLACES[head], params[head], still[head], seen[head])
        return jnp.moveaxis(found.reshape(windows, -1, found.shape[-1]), 0, -1)

    weights = jnp.append(jnp.zeros(len(Features._fields)), 1.0)
    knobs = Knobs(weights, budget)
    if PREFETCHER in static.heads:
        # a visit wants for the next one; the last one has none
        score = by_visit(PREFETCHER)
        want = jnp.concatenate([score[1:], jnp.full_like(score[:1], soft.LEAST_WANT)])
        best = -jnp.sort(-want, axis=1)
        edge = (best[:, static.selected - 1] + best[:, static.selected]) / 2  # between what is selected and what is not
        knobs = knobs._replace(threshold=jnp.zeros(()), want=want - edge[:, None])
    found = soft.replay(some._replace(score=by_visit(EVICTOR)), knobs, temperature, steps=STEPS)
    demand = jnp.sum(some.demand * some.counted[:, None])
    if some.seconds is None:
        return jnp.sum(found.misses) / demand
    return jnp.sum(found.stall_s) / jnp.mean(some.seconds.copy_s) / demand


def _fits(weights: Weights, trace: Trace) -> bool:
    return weights.tied.bias.shape == (trace.layers, trace.experts)


def _free(weights: Weights, trace: Trace) -> Free:
    return weights.tied.free if _fits(weights, trace) else weights.free


def _params(weights: Weights, trace: Trace) -> dict[str, jax.Array]:
    free = _free(weights, trace)
    found: dict[str, Any] = {"out": free.out * STEP, "bias": free.bias * FINEST}
    if _fits(weights, trace):
        found["bias"] = (free.bias + weights.tied.bias) * FINEST  # what serves all experts goes into that of each
        found |= {"wave": weights.tied.wave.out * STEP, "topic": weights.tied.topic.out * STEP}
    return {name: jnp.asarray(np.asarray(value, np.float64), jnp.float32) for name, value in found.items()}


def _stored(weights: Weights, moved: Mapping[str, jax.Array], trace: Trace, where: str) -> Weights:
    """Gives the weights with the moved ones in their places, as whole numbers."""

    def whole(name: str, unit: float, kind: Any) -> Any:
        most = np.iinfo(kind).max
        return np.clip(np.rint(np.asarray(moved[name], np.float64) / unit), -most, most).astype(kind)

    free = _free(weights, trace)._replace(out=whole("out", STEP, np.int16))
    if not _fits(weights, trace):
        return checked(weights._replace(free=free._replace(bias=whole("bias", FINEST, np.int32))), where)
    tied = weights.tied._replace(
        free=free._replace(bias=np.zeros_like(free.bias)),
        bias=whole("bias", FINEST, np.int32),
        wave=weights.tied.wave._replace(out=whole("wave", STEP, np.int8)),
        topic=weights.tied.topic._replace(out=whole("topic", STEP, np.int8)),
    )
    return checked(weights._replace(tied=tied), where)


def _floats(hardware: Hardware) -> list[float]:
    return [float(leaf) for leaf in jax.tree.leaves(hardware)]
