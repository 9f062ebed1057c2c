"""Compiled programs are let go before a process has more memory maps than the system allows.

Every program that XLA compiles for a CPU keeps some maps, a replay some hundreds. Linux ends a process that asks for
more than ``vm.max_map_count`` (65,530 unless set otherwise) with a segmentation fault inside the compiler.
"""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.core import Tracer

SHARE = 0.5
"""Of the maps that the system allows: with more, programs are let go."""

_MAPS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_since = [0]  # programs compiled since the maps were last counted


def _listen(event: str, duration_secs: float, **kwargs: object) -> None:
    del duration_secs, kwargs
    if event == _COMPILED:
        _since[0] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


@functools.cache
def most_maps() -> int | None:
    """Gives how many maps a process may have before its programs are let go; None where there is no such limit."""
    try:
        return int(SHARE * int(_LIMIT.read_text())) if _MAPS.exists() else None
    except (OSError, ValueError):
        return None


def maps() -> int:
    """Gives how many maps this process has, where the system says."""
    return _MAPS.read_bytes().count(b"\n")


def room_for_programs() -> bool:
    """Lets go of all compiled programs if they have come to hold too many maps; says whether it did.

    It costs nothing unless something was compiled since the last call, then some milliseconds. What was let go is
    compiled again when it is asked for. To be called between replays; while JAX traces a function, it waits for the
    next call.
    """
    if not _since[0]:
        return False
    most = most_maps()
    if most is None or maps() <= most:
        _since[0] = 0
        return False
    if isinstance(jnp.zeros(()), Tracer):
        return False
    _since[0] = 0
    jax.clear_caches()
    gc.collect()
    return True
