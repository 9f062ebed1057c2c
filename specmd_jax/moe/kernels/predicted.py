"""What predictors say at a visit, before the cache decides: by a kernel if they declare what one knows, else by their
own code as XLA's operations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from specmd_jax.moe.kernels import pairs
from specmd_jax.moe.kernels.placed import Token, seen_of
from specmd_jax.moe.runtime.decider import Seen
from specmd_jax.policies.base import Gate, Now, Policies, Scorer, Size, routed
from specmd_jax.policies.prefetch import NO
from specmd_jax.replay.prefetching import foresee as foresee_all
from specmd_jax.replay.prefetching import targets_of
from specmd_jax.replay.state import Setup


def score(setup: Setup, scorer: Scorer, memory: Any, seen: Seen | Token, interpret: bool) -> tuple[Any, jax.Array]:
    """Gives the scorer's memory and the scores [E] int32 of the visited layer's experts, which an eviction policy
    keeps by."""
    if scorer.pairs is not None and pairs.serves(setup.experts):
        return pairs.score(scorer.pairs, memory, seen, interpret=interpret)
    row = _row(setup, seen)
    return scorer.observe(memory, routed(_now(setup, row), row.count > 0, row.mass))


def foresee(
    setup: Setup, policies: Policies, memories: tuple[Any, Any], seen: Seen | Token, interpret: bool
) -> tuple[Any, Any, jax.Array]:
    """Gives the memories of predictor and selection, and the want-scores of what is selected, [H, E] float32."""
    prefetch, selection = policies.prefetch, policies.selection
    assert prefetch is not None and selection is not None
    row, closing = _row(setup, seen), jnp.asarray(True)
    if prefetch.pairs is not None and pairs.serves(setup.experts):
        learned, want = pairs.foresee(prefetch.pairs, memories[0], seen, setup.horizon, interpret=interpret)
        memory, selected = selection.select(memories[1], want, targets_of(setup, row.layer), closing)
    else:
        size = Size(setup.layers, setup.experts, setup.horizon)
        gate = Gate(_now(setup, row), row.count > 0, row.mass, row.ahead, None)
        learned, memory, want, selected = foresee_all(prefetch, selection, memories, gate, size, closing)
    return learned, memory, jnp.where(selected, want, NO)


def _row(setup: Setup, seen: Seen | Token) -> Seen:
    return seen_of(seen, setup.experts) if isinstance(seen, Token) else seen


def _now(setup: Setup, row: Seen) -> Now:
    return Now(row.index, row.layer, row.pass_id, setup.layers)
