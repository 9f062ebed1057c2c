"""What a run counts, and what its engine's rates predict of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.offloading.model import Engine
from specmd_jax.moe.fused.engine import Fused
from specmd_jax.moe.measure import predict
from specmd_jax.moe.runtime.decider import Decision
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import FETCHED, Events
from specmd_jax.types import DECODE, Schedule

Rates = predict.Rates | predict.PassRates


def made_of(engine: Engine) -> tuple[str, ...]:
    """Says what rates depend on: the prefetcher, and the parts of a fused pass that are no kernels."""
    prefetch = engine.policy.mix.prefetch.name
    return (prefetch, *sorted(engine.reasons)) if isinstance(engine, Fused) else (prefetch,)


def predicted(engine: Engine, run: Run, rates: Rates, warmup: int) -> predict.Predicted:
    """Gives the times that rates of the engine give for a run, without its ``warmup`` first requests."""
    if isinstance(rates, predict.PassRates):
        return predict.predict_passes(engine.policy, run.trace, rates, warmup)
    return predict.predict(engine.policy, run.trace, rates, warmup)


class Copied(NamedTuple):
    """What decode passes found and copied; rates are None where there is no decode pass."""

    hit_rate: float | None
    copies_per_token: float | None
    bytes_per_token: float | None


def copied(engine: Engine, schedule: Schedule, found: Events | Decision, warmup: int) -> Copied:
    """Counts the events of decode passes, a run's own or the simulator's, from the first prompt on that is none of the
    ``warmup`` first."""
    decode = (schedule.phase == DECODE) & (np.maximum.accumulate(schedule.request) >= warmup)
    tokens = int(schedule.tokens[decode].sum(dtype=np.int64)) / schedule.layers
    if not tokens:
        return Copied(None, None, None)
    outcome, row = np.asarray(found.outcome)[decode], np.asarray(found.row)[decode]
    ahead = 0 if found.prefetched is None else int((np.asarray(found.prefetched)[decode] > 0).sum())
    levels, level_bytes = row[outcome == FETCHED], engine.policy.sizes.level_bytes[:, 0]
    return Copied(
        hit_rate=float(((outcome > 0) & (outcome < FETCHED)).sum() / max(int((outcome > 0).sum()), 1)),
        copies_per_token=(levels.size + ahead) / tokens,
        bytes_per_token=float(level_bytes[levels - 1].sum() + ahead * level_bytes[-1]) / tokens,
    )


def stacked(run: Run) -> Decision:
    """Gives a run's decisions as one, with leaves [V, ...]."""
    return Decision(*(np.stack(column) for column in zip(*run.decisions, strict=True)))


def engine_name(engine: Engine) -> str:
    """Names the engine as `--engine` does."""
    return "fused" if isinstance(engine, Fused) else "layerwise"
