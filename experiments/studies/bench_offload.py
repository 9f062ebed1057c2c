"""The work of `experiments.bench_offload`: its sections, and the table of what they gave."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# pinned host memory is limited to 64 GB by default, and torch needs its share of the device's
os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax

from experiments.benchmarks.offloading import engines, hardware, host, predictors, streaming, variants
from experiments.benchmarks.offloading.bench import Bench, Result, line
from experiments.benchmarks.offloading.cpu_offload import accelerated
from specmd_jax.report.provenance import versions
from specmd_jax.report.terminal import aligned

SECTIONS: dict[str, Callable[[Bench], Result]] = {
    "bfloat16": streaming.bfloat16,
    "int4": streaming.int4,
    "mxfp4": streaming.mxfp4,
    "copies": hardware.copies,
    "resident": hardware.resident,
    "engines": engines.fused_beside_layerwise,
    "accelerate": accelerated,
    "layerwise": engines.layerwise,
    "equality": engines.equality,
    "host": host.host,
    "batches": variants.batches,
    "precisions": variants.precisions,
    "by_cache": variants.by_cache,
    "predictors": predictors.predictors,
}


def table(result: Result) -> str:
    """Gives everything measured: a table per section, and one more of its rows where it has some."""
    lines = []
    for section, values in result.items():
        facts = values if isinstance(values, dict) else {"": values}
        body = [(name, _shown(value)) for name, value in facts.items() if name != "rows"]
        lines += [*aligned((section, ""), body), ""]
        rows = facts.get("rows", [])
        head = list(dict.fromkeys(name for row in rows for name in row))
        if rows:
            lines += [*aligned(head, [[_shown(row.get(name)) for name in head] for row in rows]), ""]
    return "\n".join(lines).rstrip()


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def run(sections: Sequence[str], path: Path, *, smoke: bool, seconds: float, host_gb: float | None) -> None:
    """Measures the sections, prints one table, and writes `path` after each."""
    bench = Bench(smoke, seconds, None if host_gb is None else int(host_gb * 1e9))
    path.parent.mkdir(parents=True, exist_ok=True)
    bench.path = path
    bench.result["setting"] = {
        "model": bench.name,
        "device": str(jax.devices()[0].device_kind),
        "versions": versions(),
        "prompt_tokens": bench.prompt,
        "decoded_tokens": bench.steps,
        "requests": bench.requests,
        "made_s": time.perf_counter() - bench.begin_s,
    }
    for name in sections:
        begin = time.perf_counter()
        try:
            bench.result[name] = SECTIONS[name](bench)
        except Exception as error:  # the other steps' numbers are worth keeping
            bench.result[f"{name} failed"] = line(error)
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        bench.save()
    print(table(bench.result))
