"""An exact, fast, differentiable explorer of mixture-of-experts caches.

`run` replays a trace through one cache, `sweep` through a grid of them; the tables name what there is to choose from.
Names are imported when they are first used, so that reading results or drawing them does not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specmd_jax.api import explain, run, sweep, totals
    from specmd_jax.bounds.stall import stall_bounds
    from specmd_jax.engines.prepared import prepare
    from specmd_jax.errors import SpecmdError
    from specmd_jax.policies import ADMISSION, EVICTION, MISS, PREFETCH, ROUTING, SELECTION, pinned, static, tuned
    from specmd_jax.replay.metrics import Metrics
    from specmd_jax.setting import Setting, grid
    from specmd_jax.specs.hardware import HARDWARE
    from specmd_jax.specs.models import MODELS
    from specmd_jax.timelines.chrome import write_chrome_trace
    from specmd_jax.timelines.record import timeline
    from specmd_jax.trace import (
        bundled,
        first_tokens,
        import_trace,
        load_trace,
        save_trace,
        select_requests,
        synthesize,
    )
    from specmd_jax.trace.profile import Profile, load_profile, profile_of, save_profile
    from specmd_jax.trace.stream import open_trace
    from specmd_jax.types import Trace

__version__ = "0.2.0"
__all__ = [
    "ADMISSION",
    "EVICTION",
    "HARDWARE",
    "MISS",
    "MODELS",
    "PREFETCH",
    "ROUTING",
    "SELECTION",
    "Metrics",
    "Profile",
    "Setting",
    "SpecmdError",
    "Trace",
    "bundled",
    "explain",
    "first_tokens",
    "grid",
    "import_trace",
    "load_profile",
    "load_trace",
    "open_trace",
    "pinned",
    "prepare",
    "profile_of",
    "run",
    "save_profile",
    "save_trace",
    "select_requests",
    "stall_bounds",
    "static",
    "sweep",
    "synthesize",
    "timeline",
    "totals",
    "tuned",
    "write_chrome_trace",
]

_HOMES = {
    "api": ("explain", "run", "sweep", "totals"),
    "engines.prepared": ("prepare",),
    "bounds.stall": ("stall_bounds",),
    "errors": ("SpecmdError",),
    "specs.hardware": ("HARDWARE",),
    "replay.metrics": ("Metrics",),
    "specs.models": ("MODELS",),
    "policies": ("ADMISSION", "EVICTION", "MISS", "PREFETCH", "ROUTING", "SELECTION", "pinned", "static", "tuned"),
    "trace": (
        "bundled",
        "first_tokens",
        "import_trace",
        "load_trace",
        "save_trace",
        "select_requests",
        "synthesize",
    ),
    "setting": ("Setting", "grid"),
    "timelines.chrome": ("write_chrome_trace",),
    "timelines.record": ("timeline",),
    "trace.profile": ("Profile", "load_profile", "profile_of", "save_profile"),
    "trace.stream": ("open_trace",),
    "types": ("Trace",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"specmd_jax.{home}"), name)
    raise AttributeError(f"module 'specmd_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
