"""What is replayed: traces, capacities and how many configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from configs.benchmark import BenchmarkConfig
from specmd_jax.engines.prepared import Prepared
from specmd_jax.trace import bundled, synthesize
from specmd_jax.types import Trace


def olmoe(tokens: int, **changes: Any) -> Trace:
    """Gives synthetic routing in the shape of OLMoE-1B-7B, with the locality that earlier benchmarks had."""
    knobs = {"skew": 1.0, "stickiness": 0.5, "drift": 0.01, "topics": 4}
    return synthesize(**{"layers": 16, "experts": 64, "top_k": 8, "tokens": tokens, **knobs, **changes})


def traces(config: BenchmarkConfig) -> dict[str, Trace]:
    """Gives the two that the rivals are compared on."""
    recorded = bundled(config.trace, config.trace_tokens)
    return {
        f"{config.trace}, {recorded.tokens} tokens": recorded,
        f"synthetic 16x64 top-8, {config.synthetic_tokens} tokens": olmoe(config.synthetic_tokens),
    }


def slots_of(trace: Trace, count: int) -> list[int]:
    """Gives evenly spaced slot counts up to all experts."""
    most = trace.layers * trace.experts
    return sorted({round(size) for size in np.linspace(max(1, most / count), most, count).tolist()})


def slots_range(trace: Trace, slots: Sequence[int]) -> dict[str, str]:
    cycle = trace.layers * trace.top_k
    if len(slots) == 1:
        return {"capacity_slots": str(slots[0]), "cycles": f"{slots[0] / cycle:.2f}"}
    return {
        "capacity_slots": f"{slots[0]} to {slots[-1]}",
        "cycles": f"{slots[0] / cycle:.2f} to {slots[-1] / cycle:.2f}",
    }


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def configurations(config: BenchmarkConfig) -> int:
    return config.gpu_configurations if on_gpu() else config.cpu_configurations


def budgets_of(replays: Prepared, count: int) -> list[int]:
    """Gives the bytes of `count` caches, evenly spaced from one token cycle to half of all experts."""
    trace = replays.trace
    size, most = int(trace.expert_bytes[0]), trace.layers * trace.experts
    slots = np.linspace(min(trace.layers * trace.top_k, most / 2), most / 2, count)
    return [round(count) * size for count in slots.tolist()]
