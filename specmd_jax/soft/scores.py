"""A policy's own scores for the soft cache: the routing alone decides them, so they are worked out once, beforehand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specmd_jax.engines.offline_scores import STRETCH, Scores
from specmd_jax.engines.prepared import prepare
from specmd_jax.policies.choice import Choice
from specmd_jax.policies.trained import ONE
from specmd_jax.policies.tuned import MOST, scored_alone
from specmd_jax.schedule.demand import cut
from specmd_jax.types import Trace


def scores_by_request(trace: Trace, policy: Choice) -> list[npt.NDArray[np.float32]]:
    """Gives [V, E] scores of the visited layer's experts for each request, in the units of `soft.replay`.

    Every request begins with an empty memory but for what the policy carries over (`Scorer.carried`): requests come in
    their order. Raises SpecmdError for a policy that declares no scorer.
    """
    replays = prepare(trace, reset_per_request=True)
    schedule = replays.schedule
    under_way = Scores(scored_alone(policy), schedule.layers, schedule.experts, everywhere=False)
    starts = range(0, schedule.visits, STRETCH)
    rows = np.concatenate([under_way.draw(cut(replays.demand, at, at + STRETCH), at) for at in starts])
    found = (np.clip(rows, -MOST, MOST) / ONE).astype(np.float32)
    ends = np.searchsorted(schedule.request, np.arange(1, trace.requests))
    return np.split(found, ends)
