"""Time (CONTRACT.md section 5): what things cost, and when the experts of a visit are done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .sharing import SideBySide, Waits


class HostWork(NamedTuple):
    """What a visit computes on the host."""

    work_s: float = 0.0  # undisturbed
    draw: float = 0.0  # bytes a second of host memory, undisturbed
    after_s: float = 0.0  # to the host and back
    each: tuple[tuple[int, float], ...] = ()  # expert and seconds


@dataclass(frozen=True)
class Costs:
    """What things cost. All lists have one entry a layer; ``expert_mem_s`` has such a list for each stored precision.

    An expert with n tokens takes ``max(n * expert_flops / peak, expert_mem_s) + launch_s``, the dense part of a layer
    ``max(tokens * dense_flops / peak, dense_mem_s) + launch_s + layer_s + sync_s`` (the last layer's numbers already
    include the head), an expert on the host ``max(n * host_expert_flop_s, host_expert_mem_s)``. The host keeps one
    precision and needs no launch.
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
    host_bytes_per_s: float = math.inf  # of host memory, for copies and the host's work together
    handover_s: float = 0.0
    sync_s: float = 0.0
    layer_s: float = 0.0
    overlaps: float = 1.0
    storage_bytes_per_s: float = float("inf")
    storage_latency_s: float = 0.0

    def copy_s(self, size_bytes: int) -> float:
        return self.link_latency_s + size_bytes / self.link_bytes_per_s

    def link_draw(self, size_bytes: int) -> float:
        """Bytes a second that copies of this size take from host memory."""
        return size_bytes / self.copy_s(size_bytes) if self.copy_s(size_bytes) else 0.0

    def read_s(self, size_bytes: int) -> float:
        return self.storage_latency_s + size_bytes / self.storage_bytes_per_s

    def expert_s(self, layer: int, level: int, tokens: int) -> float:
        compute_s = tokens * self.expert_flops[layer] / self.peak_flops_per_s
        return max(compute_s, self.expert_mem_s[level - 1][layer]) + self.launch_s

    def dense_s(self, layer: int, tokens: int, requests: int) -> float:
        """`requests` take part in a decode pass; in a prefill pass, which reads no context, 0."""
        flops, read_s = tokens * self.dense_flops[layer], self.dense_mem_s[layer]
        if requests and self.context_flops is not None and self.context_mem_s is not None:
            flops += tokens * self.context_flops[layer]
            read_s += requests * self.context_mem_s[layer]
        compute_s = max(flops / self.peak_flops_per_s, read_s)
        return compute_s + self.launch_s + self.layer_s + self.sync_s

    def host_s(self, layer: int, tokens: int) -> float:
        return max(tokens * self.host_expert_flop_s[layer], self.host_expert_mem_s[layer])

    def host_work(self, layer: int, tokens: dict[int, int], size_bytes: int) -> HostWork:
        """The host's work on experts of this size with so many tokens each."""
        each = tuple((e, self.host_s(layer, n)) for e, n in tokens.items())
        work_s = sum(seconds for _, seconds in each)
        draw = len(tokens) * size_bytes / work_s if work_s else 0.0
        return HostWork(work_s, draw, self.handover_s if tokens else 0.0, each)


class Job(NamedTuple):
    """One expert that runs on the device."""

    expert: int
    compute_s: float
    late_until_s: float | None = None  # end of its copy, for a late hit
    copy_s: float | None = None  # length of its copy, for a fetched miss


class Shared:
    """Link and host at work on one memory, moment by moment, in seconds from the gate.

    The link has `link_s` seconds of work if undisturbed, and prefetch copies after that.
    """

    def __init__(self, link_s: float, link_draw: float, host: HostWork, limit: float) -> None:
        self.marks = [(0.0, 0.0)]  # (time, link's work done by then)
        now = done = 0.0
        host_left = host.work_s
        if link_s > 0 and host_left > 0:
            speed = min(1.0, limit / (link_draw + host.draw)) if link_draw + host.draw else 1.0
            done = min(link_s, host_left)
            now, host_left = done / speed, host_left - done
            self.marks.append((now, done))
        if host_left > 0:  # prefetch copies have what the host leaves
            speed = min(1.0, max(0.0, limit - host.draw) / link_draw) if link_draw else 1.0
            now, done = now + host_left, done + host_left * speed
            self.marks.append((now, done))
        self.host_s = now if host.work_s else 0.0

    def at(self, work: float) -> float:
        """When the link has done so much work."""
        for (start, before), (end, after) in zip(self.marks, self.marks[1:], strict=False):
            if work <= before:
                return start
            if work <= after:
                return start + (work - before) * (end - start) / (after - before)
        now, done = self.marks[-1]
        return now + work - done


def link_walk(jobs: list[Job], copy_order: list[int], start_s: float) -> tuple[dict[int, float], float]:
    """Ends of the demand copies, one after the other from `start_s`, and when the last is over."""
    length = {job.expert: job.copy_s for job in jobs if job.copy_s is not None}
    ends, now = {}, start_s
    for e in copy_order:
        now = ends[e] = now + length[e]
    return ends, now


def device_walk(arrivals: list[tuple[float, float]], t0: float) -> float:
    """Experts run in order of arrival as (arrival, compute); returns when the last is done."""
    now = t0
    for arrival, compute_s in sorted(arrivals):
        now = max(now, arrival) + compute_s
    return now


class Engine(NamedTuple):
    """What decides how the work of a visit goes together."""

    host: HostWork = HostWork()
    link_draw: float = 0.0
    limit: float = math.inf
    overlaps: float = 1.0


def experts_done(
    jobs: list[Job],
    t0: float,
    engine: Engine,
    copy_order: list[int],
    *,
    late_waits: bool,
    copies_from: float | None,
) -> float:
    """End of the experts if late hits wait or not, and misses are copied from `copies_from` on or are there at once."""
    ends, last = ({}, t0) if copies_from is None else link_walk(jobs, copy_order, copies_from)
    arrivals = []
    for job in jobs:
        late = job.late_until_s if late_waits and job.late_until_s is not None else t0
        arrivals.append((ends.get(job.expert, late) - t0, job.compute_s))
        last = max(last, late)
    shared = Shared(last - t0, engine.link_draw, engine.host, engine.limit)
    arrivals = [(shared.at(arrival) if arrival > 0 else 0.0, compute_s) for arrival, compute_s in arrivals]
    host_s = shared.host_s + engine.host.after_s
    beside_s = max(device_walk(arrivals, 0.0), host_s)
    after_s = max([host_s, *(arrival for arrival, _ in arrivals)]) + sum(compute_s for _, compute_s in arrivals)
    return t0 + engine.overlaps * beside_s + (1 - engine.overlaps) * after_s


def side_by_side(jobs: list[Job], engine: Engine, copy_order: list[int], waits: Waits) -> SideBySide:
    """Link and host, each of whose pieces waits for its read; what is in flight at the gate is the link's first."""
    length = {job.expert: job.copy_s for job in jobs if job.copy_s is not None}
    reading = min(waits.link_s, waits.storage_s)
    link = [(reading, waits.link_s - reading)] if waits.link_s > 0 else []
    link += [(waits.ready_s.get(e, 0.0), length[e]) for e in copy_order]
    host = sorted((waits.ready_s.get(e, 0.0), n, work_s) for n, (e, work_s) in enumerate(engine.host.each))
    draw = engine.link_draw + engine.host.draw
    speed = min(1.0, engine.limit / draw) if draw else 1.0
    share = min(1.0, max(0.0, engine.limit - engine.host.draw) / engine.link_draw) if engine.link_draw else 1.0
    return SideBySide(link, [(ready, work_s) for ready, _, work_s in host], speed, share)


def done_beside(jobs: list[Job], engine: Engine, copy_order: list[int], waits: Waits) -> float:
    """End of the experts, in seconds from the gate, where copies and the host wait for reads."""
    course = side_by_side(jobs, engine, copy_order, waits)
    ends = course.link_ends[-len(copy_order) :] if copy_order else []
    arrival = dict(zip(copy_order, ends, strict=True))
    late = course.link_ends[0] if waits.link_s > 0 else 0.0
    arrivals = [(arrival.get(job.expert, late if job.late_until_s is not None else 0.0), job.compute_s) for job in jobs]
    host_s = course.host_ends[-1] + engine.host.after_s if course.host_ends else 0.0
    beside_s = max(device_walk(arrivals, 0.0), host_s)
    after_s = max([host_s, *(at for at, _ in arrivals)]) + sum(compute_s for _, compute_s in arrivals)
    return engine.overlaps * beside_s + (1 - engine.overlaps) * after_s
