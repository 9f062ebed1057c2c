"""The tables of policies, one per axis: a line adds one to the engines, the command line, the sweeps and the tests.

`base` says what a policy is, `choice` how a name or a function becomes a value.
"""

from specmd_jax.policies.admission import ADMISSION
from specmd_jax.policies.base import Admission, Eviction, Miss, Policies, Prefetch, Routing, Selection
from specmd_jax.policies.choice import AXES, Choice, Mix, choose
from specmd_jax.policies.eviction import EVICTION
from specmd_jax.policies.miss import MISS
from specmd_jax.policies.numbers import check_numbers
from specmd_jax.policies.pins import pinned, static
from specmd_jax.policies.prefetch import PREFETCH, SELECTION
from specmd_jax.policies.routing import ROUTING
from specmd_jax.policies.tuned import tuned

__all__ = [
    "ADMISSION",
    "AXES",
    "EVICTION",
    "MISS",
    "PREFETCH",
    "ROUTING",
    "SELECTION",
    "Admission",
    "Choice",
    "Eviction",
    "Miss",
    "Mix",
    "Policies",
    "Prefetch",
    "Routing",
    "Selection",
    "check_numbers",
    "choose",
    "pinned",
    "static",
    "tuned",
]
