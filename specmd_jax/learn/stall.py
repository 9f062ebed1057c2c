"""What a policy is worth in seconds: stall by request on a link of a given speed, against the bounds on any policy.

The predictor's own work is charged to the timeline: each visit's dense part takes that much longer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specmd_jax.bounds.stall import bounds_of
from specmd_jax.engines.prepared import Prepared, prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.policies import use_history as history
from specmd_jax.policies.choice import Mix
from specmd_jax.policies.trained import Weights
from specmd_jax.replay.timing import Costs, dense
from specmd_jax.replay.totals import BUSY_S, LATE, LATE_S, MISS_S, PREFETCHED, REUSED, VISIT_S
from specmd_jax.specs.capacity import Budget
from specmd_jax.specs.hardware import Hardware
from specmd_jax.trace import select_requests
from specmd_jax.types import Trace

Floats = npt.NDArray[np.float64]


class Cost(NamedTuple):
    """What is predicted at one visit."""

    flops: int
    read_bytes: int  # weights and memory of the experts

    def seconds(self, hardware: Hardware, launched: bool) -> float:
        """Roofline, and a launch of its own unless it runs inside a kernel that is there anyway, such as the router."""
        rate_s = max(self.flops / hardware.peak_flops_per_s, self.read_bytes / hardware.memory_bytes_per_s)
        return float(rate_s + (hardware.launch_s if launched else 0.0))


class Seconds(NamedTuple):
    """[R] of each request."""

    total_s: Floats
    stall_s: Floats
    hits: Floats  # demanded experts that were resident, or on their way


class RequestBounds(NamedTuple):
    """[R] stall of each request: no policy has less than `lower_s`, one schedule has `feasible_s`."""

    lower_s: Floats
    feasible_s: Floats


def cost(weights: Weights, layers: int, experts: int, targets: int = 1) -> Cost:
    """Counts the cost of scoring experts of `targets` layers: a multiply-add is two FLOPs, features are left out."""
    tied = weights.tied
    if tied.bias.shape != (layers, experts):
        inner = experts * (weights.free.hidden.size + weights.free.out.size)
        return Cost(2 * inner * targets, (_bytes(weights.free) + 4 * experts * history.FEATURES) * targets)
    inner = experts * (tied.free.hidden.size + tied.free.out.size)
    read = _bytes(tied.free) + 4 * layers * experts * history.FEATURES
    for context in (tied.wave, tied.topic):
        one_layer = context.into[0].size + context.out[0].size
        inner, read = inner + one_layer, read + one_layer
    return Cost(2 * inner * targets, read * targets)


def _bytes(part: tuple[npt.NDArray[np.generic], ...]) -> int:
    return sum(array.nbytes for array in part)


def layer_time_s(replays: Prepared, hardware: Hardware) -> float:
    """Gives the mean seconds of a decoded token's layer that waits for nothing: its K experts and its dense part."""
    costs = replays.costs(hardware)
    assert costs is not None
    expert_s = np.maximum(costs.expert_flop_s, costs.expert_read_s[-1]) + costs.launch_s
    one = jnp.asarray(1, jnp.int32)
    dense_s = np.maximum(*dense(costs, slice(None), one, one > 0)) + costs.launch_s + costs.layer_s
    return float(np.mean(replays.trace.top_k * expert_s + dense_s))


def with_link(hardware: Hardware, replays: Prepared, layer_times: float) -> Hardware:
    """Gives the hardware with a link that copies one expert in so many layer times, latency included."""
    copy_s = layer_times * layer_time_s(replays, hardware)
    mean_bytes = float(replays.sizes.level_bytes[-1].mean())
    return hardware.replace(link_latency_s=0.0, link_bytes_per_s=mean_bytes / copy_s)


def seconds_by_request(
    replays: Prepared, mix: Mix, budget: Budget, hardware: Hardware, predictor_s: float = 0.0, horizon: int = 1
) -> Seconds:
    """Replays a prepared trace and adds the seconds up by request; `predictor_s` is charged at every visit."""
    setup = replays.setup(mix, hardware, detail="events", horizon=horizon)
    numbers = replays.numbers(budget, hardware)
    assert numbers.costs is not None
    numbers = numbers._replace(costs=charged(numbers.costs, predictor_s))
    events = replay_many(setup, (), numbers, mix.traced(), replays.visits(setup, mix))[1]
    assert events is not None
    seconds = np.asarray(events.seconds, np.float64)[: replays.schedule.visits]
    request, count = replays.schedule.request, replays.trace.requests

    def by_request(values: Floats) -> Floats:
        return np.bincount(request, values, count).astype(np.float64)

    outcome = np.asarray(events.outcome)[: replays.schedule.visits]
    return Seconds(
        by_request(seconds[:, VISIT_S]),
        by_request(seconds[:, [LATE_S, MISS_S, BUSY_S]].sum(axis=1)),
        by_request(np.isin(outcome, (REUSED, PREFETCHED, LATE)).sum(axis=1, dtype=np.float64)),
    )


def charged(costs: Costs, predictor_s: float | jax.Array) -> Costs:
    """The costs with `predictor_s` more in the dense part of a layer of one token (of n tokens, up to n times that)."""
    return costs._replace(dense_flop_s=costs.dense_flop_s + predictor_s, dense_read_s=costs.dense_read_s + predictor_s)


def bounds_by_request(trace: Trace, budget: Budget, hardware: Hardware) -> RequestBounds:
    """Bounds of each request replayed alone from an empty cache."""
    found = [bounds_of(prepare(select_requests(trace, [r])), budget, hardware) for r in range(trace.requests)]
    return RequestBounds(np.array([each.lower_s for each in found]), np.array([each.feasible_s for each in found]))
