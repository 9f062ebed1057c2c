"""One measurement in a process of its own: ``python -m experiments.common.worker JOB`` (`subprocesses` starts it).

JOB is a JSON object: ``job`` names a function below, the rest are its arguments. A worker prints ``ready`` once it has
imported and prepared what is not to be measured, waits for a line, works, and prints a JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Job = Callable[[], dict[str, Any]]


def libcachesim(policy: str, trace: str, sizes: list[int], requests: int) -> Job:
    """Runs libCacheSim's own loop over a trace in its oracleGeneral format, size by size: hits of each."""
    rival: Any = import_module("libcachesim")

    kind = {"lru": rival.LRU, "lfu": rival.LFU, "belady": rival.Belady}[policy]
    reader = rival.TraceReader(trace, rival.TraceType.ORACLE_GENERAL_TRACE)

    def work() -> dict[str, Any]:
        # a hash table of 2^16 rather than its default 2^24: a cache of a few hundred objects then costs less to make
        missed = [kind(size, hashpower=16).process_trace(reader)[0] for size in sizes]
        return {"hits": [requests - round(ratio * requests) for ratio in missed]}

    return work


def policylang(policy: str, accesses: str, slots: int) -> Job:
    """Feeds moe-policylang's cache the flat ids of a .npy file, one call per access."""
    rival: Any = import_module("moe_policylang.runtime.cache")

    found = {"lru": rival.LRUCache, "lfu": rival.LFUCache}[policy](slots)
    ids = np.load(accesses).tolist()

    def work() -> dict[str, Any]:
        for expert in ids:
            found.access(expert)
        return {"hits": [found.stats.hits]}

    return work


def stream(trace: str, policy: str, slots: list[int]) -> Job:
    """Curves of a trace file that is streamed: peak resident bytes of this process before and after."""
    from specmd_jax.engines.stream import Curve, prepare_stream, stream_curves
    from specmd_jax.policies.choice import choose
    from specmd_jax.trace.stream import open_trace

    wanted = [Curve(choose("eviction", policy), slots)]
    # compiles the kernels, on a few tokens
    stream_curves(prepare_stream(open_trace(trace, 20)), wanted)
    before = _peak_bytes()

    def work() -> dict[str, Any]:
        found = stream_curves(prepare_stream(open_trace(trace)), wanted)[0]
        return {"before_bytes": before, "peak_bytes": _peak_bytes(), "hits": [int(curve.hits.sum()) for curve in found]}

    return work


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with what the parent held when it forked
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


JOBS: dict[str, Callable[..., Job]] = {"libcachesim": libcachesim, "policylang": policylang, "stream": stream}


def serve() -> None:
    settings = json.loads(sys.argv[1])
    work = JOBS[settings.pop("job")](**settings)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    result = work()
    print(json.dumps({"seconds": time.perf_counter() - began, **result}), flush=True)


if __name__ == "__main__":
    serve()
