"""Work shared out over the processor's cores, in ranges that write nothing in common."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def cores() -> int:
    """Gives the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="specmd-learn")


def over(count: int, work: Callable[[int, int], object]) -> None:
    """Calls ``work(first, last)`` for ranges that make up 0..count, one a core, side by side.

    Compiled loops let each other run; what they write must not overlap. Raises what the first of them raises.
    """
    parts = min(cores(), count)
    if parts <= 1:
        work(0, count)
        return
    ends = [count * part // parts for part in range(parts + 1)]
    for done in [_pool().submit(work, ends[part], ends[part + 1]) for part in range(parts)]:
        done.result()
