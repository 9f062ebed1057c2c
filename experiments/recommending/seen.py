"""What trained policies have learned of the requests that are replayed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from experiments.common.train import read_card
from specmd_jax.learn.evaluation import seen_requests
from specmd_jax.learn.training import fingerprint
from specmd_jax.policies import EVICTION, PREFETCH
from specmd_jax.policies.adaptive_eviction import NOBODY
from specmd_jax.policies.trained import DATA
from specmd_jax.types import Trace


def what_was_seen(trace: Trace, evictions: Sequence[str], prefetches: Sequence[str]) -> tuple[str, ...]:
    """Gives a sentence for each policy, of those that are named, whose weights know requests of a recorded trace."""
    said: list[str] = []
    for table, names, head in ((EVICTION, evictions, "evictor"), (PREFETCH, prefetches, "prefetcher")):
        for name in names:
            make = table[name]
            given = None if make is None else inspect.signature(make).parameters.get("checkpoint")
            if given is None or given.default == NOBODY:
                continue
            count, why = seen_requests(trace, read_card(DATA / f"{head}.npz"), fingerprint(trace))
            if not count and why is not None:
                continue
            share = "perhaps some" if why is None else str(count)
            said.append(
                f"the weights of {name} ({head}) were trained beforehand on {share} of the {trace.requests} requests "
                "that are replayed: it may do better here than on others (see python -m experiments.evaluate_learned)"
            )
    return tuple(said)
