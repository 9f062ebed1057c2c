"""The steps of one visit, in the order of CONTRACT.md section 2; sections 4 and 5 where they are due."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from specmd_jax.types import DECODE, Schedule

from .base import Eviction, Predictor
from .cache import Cache
from .events import FETCHED, HIT_LATE, HIT_PREFETCH, HIT_REUSE, ON_CPU, SUBSTITUTED, Replay, nothing_yet
from .miss import Arrived, Plan
from .routing import CacheAware, Standard
from .schedule import Visit, read_visit
from .selection import Percentile, TopK
from .tiers import HostTier
from .timing import Costs, Job, experts_done, link_walk


class Memory(NamedTuple):
    """What a reset empties."""

    cache: Cache
    eviction: Eviction
    predictor: Predictor
    selector: TopK | Percentile
    router: Standard | CacheAware
    host: HostTier | None = None


class UnderWay:
    """A replay between two visits."""

    def __init__(
        self, schedule: Schedule, fresh: Callable[[], Memory], next_use: list[int], costs: Costs | None
    ) -> None:
        self.schedule, self.fresh, self.costs = schedule, fresh, costs
        self.next_use = next_use  # of each flat id; the oracles read it
        self.memory = fresh()
        self.out = nothing_yet(schedule.visits, schedule.layers, schedule.experts)
        self.clock = int(schedule.clock[0])  # routing may change how much a visit demands
        self.gate_s = 0.0  # t0 of the visit
        self.link_free_s = 0.0
        self.storage_free_s = 0.0
        self.last_ahead: tuple[int, float] | None = None  # the prefetch copy started last: flat id and end
        self.unused: set[int] = set()  # residents that came by prefetch and were not hit since
        self.evicted_in: dict[int, int] = {}  # flat id -> pass of its last eviction

    def visit(
        self,
        v: int,
        rule: Callable[[Visit, Arrived], dict[int, Plan]],
        stream: bool,
        horizon: int,
        may_evict: bool,
    ) -> None:
        """The steps of section 2, and the time they take."""
        if self.schedule.reset[v]:
            self.reset()
        cache, policy, predictor, _, router, host = self.memory
        # 1. Routing.
        visit = replace(router.route(read_visit(self.schedule, v), cache), clock=self.clock)
        self.clock += len(visit.demand) + 1
        # 2., 3. Classify against the state at the gate and ask the miss rule.
        in_flight = {self.last_ahead[0]} if self.last_ahead is not None and self.last_ahead[1] > self.gate_s else set()
        here = {e: cache.level(visit.flat(e)) for e in range(visit.experts)}
        arrived = Arrived({e: q for e, q in here.items() if q and visit.flat(e) not in in_flight}, cache.top)
        plans = rule(visit, arrived)
        jobs, host_s = self.classify(visit, plans, here, in_flight)
        # 4. Observe.
        for e in visit.demand:
            self.next_use[visit.flat(e)] = visit.next_use[e]
        if host is not None:
            read = host.ask(visit, {e: plans[e].level for e in visit.loaded}, in_flight, stream)
            jobs = [self.reading(visit, job) if job.expert in read else job for job in jobs]
            self.out.read.append(sorted(visit.flat(e) for e in read))
        policy.observe(visit)
        predictor.observe(visit)
        # 5. Demand copies.
        self.copy_demand(visit, plans, here)
        demanded = {visit.flat(e) for e in visit.demand if cache.level(visit.flat(e))}
        own_pool = cache.pool(visit.flat(0))
        streamed = stream and cache.bytes_of(demanded, own_pool) > cache.budgets[own_pool]
        pinned = in_flight | (demanded if policy.pins_demand else set())
        order = [e for e in (sorted(visit.demand) if streamed else visit.by_mass) if e in visit.loaded]
        next_gate_s = self.run_experts(visit, jobs, host_s, order)
        if host is not None:
            self.out.copying_s.append(sum(job.copy_s or 0.0 for job in jobs))
            self.out.reading_s.append(sum(job.read_s or 0.0 for job in jobs))
            self.out.read_ahead.append([])
        # 6. Prefetch copies.
        started: list[int] = []
        if visit.ends_layer:
            wanted = self.wanted(visit, horizon)
            if not streamed:
                started = self.prefetch(visit, wanted, pinned, next_gate_s, may_evict)
        self.out.prefetched.append(started)
        # 7. Evict.
        pools = {own_pool} | {cache.pool(flat) for flat in started}
        levels = cache.table.copy()
        self.evict(visit, set() if streamed else pinned | set(started), pools)
        if host is not None:
            whole = [flat for flat in self.out.evicted[-1] if levels.flat[flat] == cache.top]
            host.take_back(whole)
            self.out.host_evictions.append(len(host.evict(started)))
            self.out.in_host.append(host.cache.table.copy())
        self.out.resident[v] = cache.table
        self.out.visit_s[v] = next_gate_s - self.gate_s
        self.gate_s = next_gate_s

    def reset(self) -> None:
        for residents in self.memory.cache.pools:
            for flat in residents:
                self.out.emptied[flat // self.schedule.experts] += 1
        self.out.prefetch_wasted += len(self.unused)
        self.memory = self.fresh()
        self.unused, self.evicted_in, self.last_ahead = set(), {}, None

    def classify(
        self, visit: Visit, plans: dict[int, Plan], here: dict[int, int], in_flight: set[int]
    ) -> tuple[list[Job], float]:
        """Says what becomes of each demanded expert; returns what runs on the device and how long the host works."""
        out, cache, costs = self.out, self.memory.cache, self.costs
        jobs: list[Job] = []
        stand_ins: set[int] = set()
        host_s = 0.0
        for e in visit.demand:
            flat, plan, level, late_until_s, copy_s = visit.flat(e), plans[e], here[e], None, None
            if level >= plan.need:
                visit.hits.add(e)
                if flat in in_flight and self.last_ahead is not None:
                    code, late_until_s = HIT_LATE, self.last_ahead[1]
                else:
                    code = HIT_PREFETCH if flat in self.unused else HIT_REUSE
                out.prefetch_used += flat in self.unused
                self.unused.discard(flat)
            else:
                code = plan.action
                out.collision[visit.index, e] = self.evicted_in.get(flat) == visit.pass_id
                if code == FETCHED:
                    visit.loaded.add(e)
                    level = plan.level
                    copy_s = costs.copy_s(cache.size_bytes(flat, level)) if costs else 0.0
                elif code == SUBSTITUTED:
                    out.stand_in[visit.index, e] = plan.stand_in
                    level = here[plan.stand_in]
                else:
                    level = 0  # does not run on the device
            out.outcome[visit.index, e] = code
            stand_in = int(out.stand_in[visit.index, e])
            if level and (stand_in < 0 or stand_in not in stand_ins):  # one run serves all that it stands in for
                compute_s = costs.expert_s(visit.layer, level, visit.count[e]) if costs else 0.0
                jobs.append(Job(e, compute_s, late_until_s, copy_s))
            if stand_in >= 0:
                stand_ins.add(stand_in)
            if level and code != SUBSTITUTED:
                visit.runs_at[e] = level
            if code == ON_CPU and costs:
                host_s += costs.host_s(visit.layer, visit.count[e])
        return jobs, host_s

    def reading(self, visit: Visit, job: Job) -> Job:
        cache = self.memory.cache
        return job._replace(
            read_s=self.costs.read_s(cache.size_bytes(visit.flat(job.expert), cache.top)) if self.costs else 0.0
        )

    def copy_demand(self, visit: Visit, plans: dict[int, Plan], here: dict[int, int]) -> None:
        out, cache = self.out, self.memory.cache
        for e in visit.loaded:
            (out.upgrades if here[e] else out.loads)[visit.layer] += 1
            cache.set(visit.flat(e), plans[e].level)
            out.demand_bytes[visit.index] += cache.size_bytes(visit.flat(e), plans[e].level)

    def run_experts(self, visit: Visit, jobs: list[Job], host_s: float, order: list[int]) -> float:
        """Copies the misses in `order`, runs the experts and the dense part; returns when the next gate is known."""
        out, v, t0 = self.out, visit.index, self.gate_s
        copies_from = max(t0, self.link_free_s)
        no_wait = experts_done(jobs, t0, host_s, order, late_waits=False, copies_from=None)
        only_late = experts_done(jobs, t0, host_s, order, late_waits=True, copies_from=None)
        idle_link = experts_done(jobs, t0, host_s, order, late_waits=True, copies_from=t0)
        all_in_host = experts_done(jobs, t0, host_s, order, late_waits=True, copies_from=copies_from)
        reads_from = max(t0, self.storage_free_s)
        done = experts_done(jobs, t0, host_s, order, late_waits=True, copies_from=copies_from, reads_from=reads_from)
        out.stall_late_s[v] = only_late - no_wait
        out.stall_miss_s[v] = idle_link - only_late
        out.stall_link_busy_s[v] = all_in_host - idle_link
        out.stall_storage_s.append(done - all_in_host)
        if order:
            _, self.link_free_s, reads_to = link_walk(jobs, order, copies_from, reads_from)
            self.storage_free_s = reads_from if reads_to is None else reads_to
        if not self.costs or not visit.ends_layer:
            return done
        decode = self.schedule.phase[v] == DECODE
        return done + self.costs.dense_s(visit.layer, visit.tokens, decode)

    def wanted(self, visit: Visit, horizon: int) -> list[int]:
        """Flat ids that are selected and not resident, in the order in which they are asked for."""
        cache, policy, predictor, selector, _, host = self.memory
        wanted: list[tuple[float, int, int, int]] = []
        for h in range(1, horizon + 1):
            target = (visit.layer + h) % cache.layers
            want = predictor.want(visit, h, target)
            for e in selector.choose(target, want):
                flat = target * cache.experts + e
                policy.select(flat, visit.pass_id + (target <= visit.layer))
                if host is not None:
                    host.policy.select(flat, visit.pass_id + (target <= visit.layer))
                if not cache.level(flat):
                    wanted.append((-float(want[e]), h, e, flat))
        return [flat for *_, flat in sorted(wanted)]

    def prefetch(
        self, visit: Visit, wanted: list[int], pinned: set[int], next_gate_s: float, may_evict: bool
    ) -> list[int]:
        """Starts the copies that have time and room; returns them."""
        cache, host, costs, started = self.memory.cache, self.memory.host, self.costs, []
        start_s = max(self.gate_s, self.link_free_s)
        for flat in wanted:
            if costs and start_s >= next_gate_s:
                break
            pool, size_bytes = cache.pool(flat), cache.size_bytes(flat, cache.top)
            in_the_way = cache.bytes_of(pinned | set(started), pool) if may_evict else cache.held_bytes[pool]
            if in_the_way + size_bytes > cache.budgets[pool]:
                continue
            if host is not None:
                if not host.holds(flat):
                    begin_s = max(start_s, self.storage_free_s)
                    late = costs is not None and begin_s >= next_gate_s
                    if late or host.streams or not host.has_room_ahead(flat, may_evict):
                        continue
                    read_s = costs.read_s(size_bytes) if costs else 0.0
                    start_s = self.storage_free_s = begin_s + read_s
                    self.out.reading_s[-1] += read_s
                    self.out.read_ahead[-1].append(flat)
                host.copied_ahead(flat)
                self.out.copying_s[-1] += costs.copy_s(size_bytes) if costs else 0.0
            start_s += costs.copy_s(size_bytes) if costs else 0.0
            self.link_free_s = start_s
            self.last_ahead = flat, start_s
            cache.set(flat, cache.top)
            self.memory.eviction.arrive(visit, flat)
            started.append(flat)
            self.unused.add(flat)
            self.out.loads[flat // cache.experts] += 1
            self.out.prefetch_bytes[visit.index] += size_bytes
        return started

    def evict(self, visit: Visit, pinned: set[int], pools: set[int]) -> None:
        cache, gone = self.memory.cache, []
        for pool in sorted(pools):
            if cache.held_bytes[pool] <= cache.budgets[pool]:
                continue
            residents = cache.pools[pool]
            leaving = [(self.memory.eviction.keep(visit, flat), -flat) for flat in residents if flat not in pinned]
            heapq.heapify(leaving)
            while leaving and cache.held_bytes[pool] > cache.budgets[pool]:
                flat = -heapq.heappop(leaving)[1]
                cache.set(flat, 0)
                gone.append(flat)
        for flat in gone:
            self.evicted_in[flat] = visit.pass_id
            self.out.evictions[flat // cache.experts] += 1
            self.out.prefetch_wasted += flat in self.unused
            self.unused.discard(flat)
            if self.last_ahead is not None and self.last_ahead[0] == flat:
                self.last_ahead = None
        self.out.evicted.append(gone)

    def end(self) -> Replay:
        self.out.prefetch_wasted += len(self.unused)
        return self.out
