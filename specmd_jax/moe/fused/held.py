"""How much a run has on the device at most, read out of its decisions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specmd_jax.moe.kernels.placed import Frame
from specmd_jax.moe.runtime.decider import Decision
from specmd_jax.replay.totals import FETCHED, PREFETCHED, REUSED, SUBSTITUTED


def held(
    decision: Decision, layer: int, tokens: int, frame: Frame, kernels: bool, level_bytes: Sequence[int]
) -> tuple[int, int]:
    """Gives how many experts are on the device at most while a visit is under way, and what they take.

    Args:
        decision: numpy. ``tokens``: of the pass.
        kernels: whether kernels run the experts.
        level_bytes: [Q] of one expert.
    """
    outcome, row = decision.outcome, decision.row
    runs = (outcome == REUSED) | (outcome == PREFETCHED) | (outcome == FETCHED)
    runs[decision.instead[outcome == SUBSTITUTED]] = True
    leaves, fetched = runs & (decision.level[layer] == 0), outcome == FETCHED
    if tokens == 1:
        beside = row[leaves]
    elif kernels:
        beside = row[leaves & fetched][: frame.staging]
    else:  # one is computed while the next one comes
        beside = np.repeat(row[fetched].max(initial=0), 2 * int(fetched.any()))
    size = np.array([0, *level_bytes], np.int64)
    stay = decision.level[decision.level > 0]
    return stay.size + beside.size, int(size[stay].sum() + size[beside].sum())
