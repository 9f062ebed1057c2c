"""A schedule and a cache as the compiled loops of this room read them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specmd_jax.bounds.kernels import Line, Pools
from specmd_jax.engines.prepared import Prepared
from specmd_jax.errors import SpecmdError
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.types import DECODE


def line_of(replays: Prepared, budget: Budget, hardware: Hardware) -> Line:
    """Gives the schedule with float64 times; a demand larger than its pool is copied by id and starts no prefetch."""
    if len(replays.sizes.level_bytes) != 1:
        raise SpecmdError(f"bounds are for one stored precision, not for {len(replays.sizes.level_bytes)}")
    s, costs = replays.schedule, seconds_of(replays, hardware)
    visit, expert = np.nonzero(s.count)
    start = np.zeros(s.visits + 1, np.int64)
    np.cumsum(np.bincount(visit, minlength=s.visits), out=start[1:])
    pool = replays.sizes.budget(budget)
    units = replays.sizes.units[1].astype(np.int64)
    streams = s.demanded * units[s.layer] > (pool[s.layer] if pool.ndim else pool)
    at = np.lexsort((expert, np.where(streams[visit], 0, -s.mass[visit, expert]), visit))
    visit, expert = visit[at], expert[at]
    layer = s.layer.astype(np.int64)
    tokens = s.count[visit, expert]
    compute_s = np.maximum(tokens * costs["expert_flop_s"][layer[visit]], costs["expert_read_s"][0, layer[visit]])
    compute_s = compute_s + costs["launch_s"]
    flop_s, read_s = costs["dense_flop_s"][layer], costs["dense_read_s"][layer]
    if "context_read_s" in costs:
        decode = s.phase == DECODE
        flop_s = flop_s + decode * costs["context_flop_s"][layer]
        read_s = read_s + decode * s.served * costs["context_read_s"][layer]
    dense_s = np.maximum(s.tokens * flop_s, read_s) + costs["launch_s"] + costs["layer_s"]
    dense_s = np.where(s.ends_layer, dense_s, 0.0)
    if s.drafting_s is not None:  # the link goes on while tokens are drafted, as it does beside the dense part
        dense_s = dense_s + s.drafting_s[:, 1]
    return Line(
        start=start,
        flat=layer[visit] * s.experts + expert,
        next_use=s.next_use[visit, expert].astype(np.int64),
        compute_s=compute_s,
        layer=layer,
        dense_s=dense_s,
        work_s=np.bincount(visit, compute_s, s.visits).astype(np.float64) + dense_s,
        reset=np.array(s.reset, np.bool_),
        counted=np.array(s.counted, np.bool_),
        prefetches=np.array(s.ends_layer & ~streams, np.bool_),
    )


def pools_of(replays: Prepared, budget: Budget, hardware: Hardware) -> Pools:
    """Gives the pools, whose is whose, and what a copy takes of room and of time."""
    layers, experts = replays.schedule.layers, replays.schedule.experts
    size = np.asarray(replays.sizes.budget(budget), np.int64)
    of_layer = np.arange(layers) if size.ndim else np.zeros(layers, np.int64)
    return Pools(
        of=np.repeat(of_layer, experts).astype(np.int64),
        budget=np.atleast_1d(size),
        units=np.repeat(replays.sizes.units[1].astype(np.int64), experts),
        copy_s=np.repeat(seconds_of(replays, hardware)["copy_s"][0], experts),
    )


def seconds_of(replays: Prepared, hardware: Hardware) -> dict[str, npt.NDArray[np.float64]]:
    """Gives the engine's float32 seconds, in float64."""
    costs = replays.costs(hardware)
    assert costs is not None
    return {name: np.asarray(value, np.float64) for name, value in costs._asdict().items() if value is not None}
