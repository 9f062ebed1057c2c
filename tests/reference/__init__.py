"""The replay contract (`specmd_jax/CONTRACT.md`) in slow, plain Python: what the JAX engine is compared with.

Nothing here is vectorised or clever; numpy appears where the contract says float32, and for the arrays that go in and
come out. Each axis has a file with the table of its policies; `step.py` has the order of events. An expert is named by
its flat id ``layer * E + expert``. Where the contract leaves room, these pages decide:

Residency
  * The *copy in flight* is the one whose end lies strictly after t0 of the visit. It is pinned even where the demand
    is not (`belady_bypass`), but not by `oversize="stream"`, which pins nothing at all. Demand and a copy in flight
    can together exceed the budget; the pool is then over budget by at most that copy until a later visit's eviction.
  * A visit evicts in its own pool and in those it prefetched into, so a held oversize pool shrinks at its next use.
  * The room test of a prefetch counts what step 7 will pin: the demand (not where it competes), the copy in flight,
    the prefetches so far, what pins keep.
  * `stream` starts no prefetch in any pool, but predictors still predict: what they select is still marked for
    Least-Stale.
  * A prefetch never upgrades: an expert resident at any level is not wanted.
  * An upgrade is a load to the policies (`fifo`, `lfu_resident`, `slru`), but `loads` counts only arrivals of absent
    experts, so ``loads - evictions - emptied = occupancy``.
  * What pins keep never leaves, not for a demand that is too large either. It takes its part of the budget in the room
    test and in the test for a demand that is too large; a demanded expert that pins keep counts once.
  * A copy that admission turns away is loaded to the policies (`fifo`, `lfu_resident`, `slru`), but not to `loads`. A
    lower copy of it stays where it was.
  * `loads` does not count what lies in the cache from the start.
  * A reset empties cache, policies, predictors, selections and routing averages. Time goes on and the link stays busy
    until its copy ends. Unused prefetches that it throws out are wasted. What `belady` knows of the future is no
    memory and stays.

Policies
  * Every demanded expert is used, whether it then ran from the device, on the host, by a stand-in or not at all. A
    stand-in is not used.
  * `lfu_resident`: the visit that loads an expert counts (1 after a demand load, 0 after a prefetch).
  * `lfru`: a prefetch arrival is a touch for the age too. `lfu_decay` decays at each visit, also of a sequential
    schedule.
  * `slru`: only a hit promotes; the share of the budget is taken in whole units of the expert sizes, in float32.
  * `belady` under changed routing reads ``next_use`` of the schedule as it stands.

Prefetch
  * `previous` and `transition` see the demand of a whole (pass, layer), also when it is spread over sequential visits.
  * `perfect` and `shuffled` want ``future[visit, h - 1, expert]`` where it is positive; `noisy` starts from the same.
  * The percentile histogram belongs to the target layer, whatever the distance h.

Miss rules and routing: see their docstrings.
"""

from .admission import ADMISSION
from .cache import Cache
from .events import (
    DROPPED,
    FETCHED,
    HIT_LATE,
    HIT_PREFETCH,
    HIT_REUSE,
    NOT_DEMANDED,
    ON_CPU,
    SUBSTITUTED,
    Replay,
)
from .eviction import EVICTION
from .hashing import hash31
from .miss import MISS
from .prefetch import PREFETCH
from .replay import replay
from .routing import ROUTING
from .selection import SELECTION, Percentile, TopK, score_bin
from .timing import Costs, Engine, HostWork, Job, Shared, experts_done

__all__ = [
    "ADMISSION",
    "DROPPED",
    "EVICTION",
    "FETCHED",
    "HIT_LATE",
    "HIT_PREFETCH",
    "HIT_REUSE",
    "MISS",
    "NOT_DEMANDED",
    "ON_CPU",
    "PREFETCH",
    "ROUTING",
    "SELECTION",
    "SUBSTITUTED",
    "Cache",
    "Costs",
    "Engine",
    "HostWork",
    "Job",
    "Percentile",
    "Replay",
    "Shared",
    "TopK",
    "experts_done",
    "hash31",
    "replay",
    "score_bin",
]
