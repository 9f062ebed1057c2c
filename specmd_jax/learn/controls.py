"""Controls of a learned policy: what is left when one thing that should matter is taken away."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.learn.examples import decoded
from specmd_jax.policies.base import Column, Eviction, Prefetch, Use
from specmd_jax.policies.by_score import Scored
from specmd_jax.policies.columns import TOUCH, scored
from specmd_jax.policies.learned_eviction import learned
from specmd_jax.policies.trained import SURE, load, scores
from specmd_jax.types import Trace

Ints = npt.NDArray[np.int64]


def frozen_at_access(checkpoint: str = "") -> Eviction:
    """Gives `learned` whose score of an expert is the one given at its last use, however long ago that was."""
    policy = learned(checkpoint)

    def observe(state: Scored, use: Use) -> Scored:
        new, layer = policy.observe(state, use), use.now.layer
        old, score = state.tables["score"], new.tables["score"]
        return _scoring(new, old.at[layer].set(jnp.where(use.demand, score[layer], old[layer])))

    return policy._replace(observe=observe, rows=None, curve=None)


def refreshed(checkpoint: str = "") -> Eviction:
    """`learned` whose scores of all layers are given anew at every visit, so that no victim is judged by an old one."""
    policy, weights = learned(checkpoint), load("evictor", checkpoint)

    def observe(state: Scored, use: Use) -> Scored:
        new = policy.observe(state, use)
        every = scores(weights, new.memory, jnp.arange(use.now.layers))
        return _scoring(new, jnp.where(new.tables["score"] == SURE, SURE, every))

    return policy._replace(observe=observe, static_rows=False, rows=None, curve=None)


def misplaced(checkpoint: str = "", seed: int = 0) -> Eviction:
    """Gives `learned` whose scores of a layer go to its experts in another, fixed order."""
    policy = learned(checkpoint)

    def observe(state: Scored, use: Use) -> Scored:
        new, layer = policy.observe(state, use), use.now.layer
        score = new.tables["score"]
        order = np.random.default_rng(seed).permutation(score.shape[1])
        return _scoring(new, score.at[layer].set(score[layer][order]))

    return policy._replace(observe=observe, rows=None, curve=None)


def _scoring(state: Scored, score: jax.Array) -> Scored:
    return state._replace(tables=state.tables | {"score": score})


def uses(trace: Trace, requests: Ints) -> npt.NDArray[np.int32]:
    """Gives [L, E] decoded tokens of some requests that use each expert."""
    return decoded(trace, requests)[0].sum(axis=0, dtype=np.int32)


def popularity(counts: npt.NDArray[np.int32]) -> Eviction:
    """Evicts first what is least used in `counts` [L, E], of other requests, then by recency. It never changes."""
    fixed = Column(lambda start: jnp.asarray(counts), lambda row, use: row)
    return scored(lambda now, layer, count, touch: (count, touch), count=fixed, touch=TOUCH)


def popular(counts: npt.NDArray[np.int32]) -> Prefetch:
    """Wants what is most used in `counts` [L, E], whatever happens."""
    return Prefetch(
        lambda size: (),
        lambda state, gate: (),
        lambda state, gate, size: jnp.asarray(counts, jnp.float32)[
            jnp.mod(gate.now.layer + 1 + jnp.arange(size.horizon), size.layers)
        ],
    )


def time_shuffled(trace: Trace, seed: int = 0) -> Trace:
    """Gives the same tokens in another order within each request: popularity stays, what follows what does not.

    A prompt's tokens stay before those that are decoded.
    """
    draw, order, first = np.random.default_rng(seed), [], 0
    for length, prompt in zip(trace.lengths, trace.prompt_lengths, strict=True):
        order += [first + draw.permutation(prompt), first + prompt + draw.permutation(length - prompt)]
        first += length
    at = np.concatenate(order)
    columns = {
        name: None if (column := getattr(trace, name)) is None else column[at]
        for name in ("expert_ids", "gates", "logits", "ahead")
    }
    return replace(trace, **columns)


def shared_runs(trace: Trace, trained: Ints, judged: Ints, tokens: int, layers: int) -> tuple[int, int]:
    """Runs of `tokens` decoded tokens in the `judged` requests, and how many of them a `trained` one has as well.

    Two runs are the same if their tokens use the same experts in the first `layers` layers.
    """

    def runs(request: int) -> list[bytes]:
        demand = decoded(trace, np.array([request]))[0][:, :layers]
        each = np.packbits(demand.reshape(len(demand), -1), axis=1)
        return [each[n : n + tokens].tobytes() for n in range(len(each) - tokens + 1)]

    known = {run for request in trained for run in runs(int(request))}
    found = [run in known for request in judged for run in runs(int(request))]
    return len(found), sum(found)
