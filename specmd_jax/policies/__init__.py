"""The four axes, a table each: a line adds a policy to the engine, the command line, the sweeps and the tests."""

from specmd_jax.policies.eviction import EVICTION, Eviction
from specmd_jax.policies.miss import MISS, NEEDS_LOGITS, NEEDS_PRECISIONS
from specmd_jax.policies.numbers import check_numbers
from specmd_jax.policies.prefetch import PREFETCH, SELECTION, Prefetch, Selection
from specmd_jax.policies.routing import ROUTING, Routing

__all__ = [
    "EVICTION",
    "MISS",
    "NEEDS_LOGITS",
    "NEEDS_PRECISIONS",
    "PREFETCH",
    "ROUTING",
    "SELECTION",
    "Eviction",
    "Prefetch",
    "Routing",
    "Selection",
    "check_numbers",
]
