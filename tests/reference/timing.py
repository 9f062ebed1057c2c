"""Time (CONTRACT.md section 5): what things cost, and when the experts of a visit are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Costs:
    """What things cost. All lists have one entry a layer; ``expert_mem_s`` has such a list for each stored precision.

    An expert with n tokens takes ``max(n * expert_flops / peak, expert_mem_s) + launch_s``, the dense part of a layer
    ``max(tokens * dense_flops / peak, dense_mem_s) + launch_s`` (the last layer's numbers already include the head),
    an expert on the host ``max(n * host_expert_flop_s, host_expert_mem_s)``. The host keeps one precision and needs no
    launch.
    """

    link_bytes_per_s: float
    link_latency_s: float
    expert_flops: Sequence[float]  # [L] floating-point operations a token
    expert_mem_s: Sequence[Sequence[float]]  # [Q][L] seconds to read the expert's bytes from device memory
    peak_flops_per_s: float
    launch_s: float
    dense_flops: Sequence[float]  # [L] floating-point operations a token
    dense_mem_s: Sequence[float]  # [L] seconds
    host_expert_flop_s: Sequence[float]  # [L] seconds a token
    host_expert_mem_s: Sequence[float]  # [L] seconds
    context_flops: Sequence[float] | None = None  # [L] operations of one request on its context; None: no context
    context_mem_s: Sequence[float] | None = None  # [L] seconds to read the context of one request
    storage_bytes_per_s: float = float("inf")
    storage_latency_s: float = 0.0

    def copy_s(self, size_bytes: int) -> float:
        return self.link_latency_s + size_bytes / self.link_bytes_per_s

    def read_s(self, size_bytes: int) -> float:
        return self.storage_latency_s + size_bytes / self.storage_bytes_per_s

    def expert_s(self, layer: int, level: int, tokens: int) -> float:
        compute_s = tokens * self.expert_flops[layer] / self.peak_flops_per_s
        return max(compute_s, self.expert_mem_s[level - 1][layer]) + self.launch_s

    def dense_s(self, layer: int, tokens: int, decode: bool) -> float:
        flops, read_s = tokens * self.dense_flops[layer], self.dense_mem_s[layer]
        if decode and self.context_flops is not None and self.context_mem_s is not None:
            requests = tokens  # a decode pass has one token of each
            flops += requests * self.context_flops[layer]
            read_s += requests * self.context_mem_s[layer]
        return max(flops / self.peak_flops_per_s, read_s) + self.launch_s

    def host_s(self, layer: int, tokens: int) -> float:
        return max(tokens * self.host_expert_flop_s[layer], self.host_expert_mem_s[layer])


class Job(NamedTuple):
    """One expert that runs on the device."""

    expert: int
    compute_s: float
    late_until_s: float | None = None  # end of its copy, for a late hit
    copy_s: float | None = None  # length of its copy, for a fetched miss
    read_s: float | None = None  # length of the read before it, for one that is not in host memory


def link_walk(
    jobs: list[Job], copy_order: list[int], start_s: float, reads_from: float | None = None
) -> tuple[dict[int, float], float, float | None]:
    """Ends of the demand copies, one after the other from `start_s`, and when the last is over.

    With `reads_from` a copy waits for its read; reads follow one another from there, and the end of the last comes too.
    """
    length = {job.expert: job.copy_s for job in jobs if job.copy_s is not None}
    read = {job.expert: job.read_s for job in jobs if job.read_s is not None}
    ends, now = {}, start_s
    for e in copy_order:
        if reads_from is not None and e in read:
            reads_from += read[e]
            now = max(now, reads_from)
        now = ends[e] = now + length[e]
    return ends, now, reads_from


def device_walk(arrivals: list[tuple[float, float]], t0: float) -> float:
    """Experts run in order of arrival as (arrival, compute); returns when the last is done."""
    now = t0
    for arrival, compute_s in sorted(arrivals):
        now = max(now, arrival) + compute_s
    return now


def experts_done(
    jobs: list[Job],
    t0: float,
    host_s: float,
    copy_order: list[int],
    *,
    late_waits: bool,
    copies_from: float | None,
    reads_from: float | None = None,
) -> float:
    """End of the experts if late hits wait or not, and misses are copied from `copies_from` on or are there at once.

    With `reads_from`, those that are not in host memory are read first, from then on.
    """
    ends = {} if copies_from is None else link_walk(jobs, copy_order, copies_from, reads_from)[0]
    arrivals = []
    for job in jobs:
        late = job.late_until_s if late_waits and job.late_until_s is not None else t0
        arrivals.append((ends.get(job.expert, late), job.compute_s))
    return max(device_walk(arrivals, t0), t0 + host_s)
