"""The steps of one visit, in the order of CONTRACT.md section 2; sections 4 and 5 where they are due."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from specmd_jax.types import DECODE, Schedule

from .admission import Always
from .base import Eviction, Predictor
from .cache import Cache
from .events import EITHER, FETCHED, HIT_LATE, HIT_PREFETCH, HIT_REUSE, ON_CPU, SUBSTITUTED, Replay, nothing_yet
from .miss import Arrived, Plan
from .routing import CacheAware, Standard
from .schedule import Visit, read_visit
from .selection import Percentile, TopK
from .sharing import SideBySide, Waits
from .tiers import HostTier
from .timing import Costs, Engine, HostWork, Job, Shared, done_beside, experts_done, link_walk, side_by_side


class Memory(NamedTuple):
    """What a reset empties."""

    cache: Cache
    eviction: Eviction
    predictor: Predictor
    selector: TopK | Percentile
    router: Standard | CacheAware
    admission: Always
    kept: set[int]  # flat ids that never leave
    host: HostTier | None = None


class UnderWay:
    """A replay between two visits."""

    def __init__(
        self,
        schedule: Schedule,
        fresh: Callable[[], Memory],
        next_use: list[int],
        costs: Costs | None,
        draft_s: float = 0.0,
    ) -> None:
        self.schedule, self.fresh, self.costs = schedule, fresh, costs
        self.draft_s = draft_s  # before each decode pass
        self.next_use = next_use  # of each flat id; the oracles read it
        self.memory = fresh()
        self.out = nothing_yet(schedule.visits, schedule.layers, schedule.experts)
        self.clock = int(schedule.clock[0])  # routing may change how much a visit demands
        self.gate_s = 0.0  # t0 of the visit
        self.link_free_s = 0.0
        self.link_work_s = 0.0  # what the link has to do from the gate on but for prefetch, undisturbed
        self.storage_free_s = 0.0
        self.last_ahead: tuple[int, float] | None = None  # the prefetch copy started last: flat id and end
        self.last_read: tuple[int, float] | None = None  # the read ahead into host memory started last
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
        cache, policy, predictor, _, router, admission, kept, host = self.memory
        link_before_s = max(self.link_free_s, self.gate_s)
        # 1. Routing.
        visit = replace(router.route(read_visit(self.schedule, v), cache), clock=self.clock)
        self.clock += len(visit.demand) + 1
        # 2., 3. Classify against the state at the gate and ask the miss rule.
        in_flight = {self.last_ahead[0]} if self.last_ahead is not None and self.last_ahead[1] > self.gate_s else set()
        here = {e: cache.level(visit.flat(e)) for e in range(visit.experts)}
        own_pool = cache.pool(visit.flat(0))
        free = cache.budgets[own_pool] - cache.held_bytes[own_pool]
        arrived = Arrived(
            {e: q for e, q in here.items() if q and visit.flat(e) not in in_flight},
            cache.top,
            here,
            max(free // cache.room_bytes(visit.flat(0), cache.top), 0),
        )
        reading = {self.last_read[0]} if self.last_read is not None and self.last_read[1] > self.gate_s else set()
        late = {
            e
            for e in range(visit.experts)
            if visit.flat(e) in reading and host is not None and host.holds(visit.flat(e))
        }
        plans = self.divide(visit, rule(visit, arrived), here, in_flight, late)
        jobs, engine = self.work(visit, plans, here, in_flight)
        self.classify(visit, plans, here, in_flight)
        # 4. Observe.
        for e in visit.demand:
            self.next_use[visit.flat(e)] = visit.next_use[e]
        away = admission.turned_away(visit, bool(self.schedule.starts_pass[v]))
        read: set[int] = set()
        if host is not None:
            hosted = {e: 0 for e, _ in engine.host.each}
            asked = {e: plans[e].level for e in visit.loaded} | hosted
            self.use_reads({visit.flat(e) for e in asked}, host)
            read = host.ask(visit, asked, away, in_flight | reading, stream)
            late &= set(asked)
            self.out.read.append(sorted(visit.flat(e) for e in read))
            self.out.read_late.append(sorted(visit.flat(e) for e in late))
        policy.observe(visit)
        predictor.observe(visit)
        # 5. Demand copies.
        self.copy_demand(visit, plans, here, away)
        demanded = {visit.flat(e) for e in visit.demand if cache.level(visit.flat(e))}
        room_bytes = cache.budgets[own_pool] - cache.bytes_of(kept, own_pool)
        streamed = stream and cache.bytes_of(demanded - kept, own_pool) > room_bytes
        pinned = in_flight | kept | (demanded if policy.pins_demand and not admission.competes else set())
        every = sorted(visit.demand) if streamed else visit.by_mass
        order, waits = [e for e in every if e in visit.loaded], None
        if host is not None:
            waits = self.waits(visit, [e for e in every if e in read], late)
            self.out.reading_s.append(len(read) * self.read_s(visit))
            self.out.read_ahead.append([])
            self.out.skipped.append(0)
        done_s, shared = self.run_experts(visit, jobs, engine, order, waits)
        next_gate_s = done_s + self.drafting_s(v + 1)
        # 6. Prefetch copies.
        started: list[int] = []
        if visit.ends_layer:
            wanted = self.wanted(visit, horizon)
            if host is not None and host.to_host:
                self.read_ahead(visit, wanted, next_gate_s, may_evict, host)
            elif not streamed:
                started = self.prefetch(visit, wanted, pinned, next_gate_s, may_evict, shared)
        self.out.prefetched.append(started)
        # 7. Evict.
        pools = {own_pool} | {cache.pool(flat) for flat in started}
        new = {visit.flat(e) for e in visit.loaded - away if not here[e]}
        levels = cache.table.copy()
        self.evict(visit, kept if streamed else pinned | set(started), pools, new)
        self.out.admitted += sum(cache.level(visit.flat(e)) == plans[e].level for e in visit.loaded - away)
        if host is not None:
            whole = [flat for flat in self.out.evicted[-1] if levels.flat[flat] == cache.top]
            host.take_back(whole)
            gone = host.evict([*started, *self.out.read_ahead[-1]])
            self.out.host_evictions.append(len(gone))
            self.out.reads_wasted += len(host.unused & set(gone))
            host.unused -= set(gone)
            self.out.in_host.append(host.cache.table.copy())
        self.out.resident[v] = cache.table
        self.out.visit_s[v] = self.drafting_s(v) + done_s - self.gate_s
        self.out.link_s[v] = max(self.link_free_s, self.gate_s) - link_before_s
        if isinstance(shared, SideBySide):  # the link may wait between two copies
            self.out.link_s[v] = shared.copying_s
        self.gate_s = next_gate_s

    def drafting_s(self, v: int) -> float:
        """Drafting between the end of the visit before and the gate of this one."""
        s = self.schedule
        drafts = self.costs is not None and v < s.visits and s.starts_pass[v] and s.phase[v] == DECODE
        return self.draft_s if drafts else 0.0

    def reset(self) -> None:
        for residents in self.memory.cache.pools:
            for flat in residents:
                self.out.emptied[flat // self.schedule.experts] += 1
        self.waste()
        before, self.memory = self.memory, self.fresh()
        self.memory.eviction.carry(before.eviction)
        self.memory.predictor.carry(before.predictor)
        if self.memory.host is not None and before.host is not None:
            self.memory.host.policy.carry(before.host.policy)
        self.unused, self.evicted_in, self.last_ahead, self.last_read = set(), {}, None, None

    def waste(self) -> None:
        """What came early and is unused will not be used any more."""
        self.out.prefetch_wasted += len(self.unused)
        self.out.reads_wasted += 0 if self.memory.host is None else len(self.memory.host.unused)

    def work(
        self, visit: Visit, plans: dict[int, Plan], here: dict[int, int], in_flight: set[int]
    ) -> tuple[list[Job], Engine]:
        """What runs on the device, and what on the host, if all goes by these plans."""
        cache, costs = self.memory.cache, self.costs
        if costs is None:
            each = tuple((e, 0.0) for e in visit.demand if here[e] < plans[e].need and plans[e].action == ON_CPU)
            return [Job(e, 0.0, copy_s=0.0) for e in visit.demand], Engine(HostWork(each=each))
        jobs: list[Job] = []
        stand_ins: set[int] = set()
        on_host: dict[int, int] = {}  # tokens of each
        for e in visit.demand:
            flat, plan, level, late_until_s, copy_s = visit.flat(e), plans[e], here[e], None, None
            if level >= plan.need:
                if flat in in_flight and self.last_ahead is not None:
                    late_until_s = self.last_ahead[1]
            elif plan.action == FETCHED:
                level = plan.level
                copy_s = costs.copy_s(cache.size_bytes(flat, level))
            elif plan.action == SUBSTITUTED:
                level = 0 if plan.stand_in in stand_ins else here[plan.stand_in]
                stand_ins.add(plan.stand_in)  # one run serves all that it stands in for
            else:
                level = 0  # does not run on the device
                if plan.action == ON_CPU:
                    on_host[e] = visit.count[e]
            if level:
                jobs.append(Job(e, costs.expert_s(visit.layer, level, visit.count[e]), late_until_s, copy_s))
        top_bytes = cache.size_bytes(visit.flat(0), cache.top)
        host = costs.host_work(visit.layer, on_host, top_bytes)
        return jobs, Engine(host, costs.link_draw(top_bytes), costs.host_bytes_per_s, costs.overlaps)

    def divide(
        self, visit: Visit, plans: dict[int, Plan], here: dict[int, int], in_flight: set[int], late: set[int]
    ) -> dict[int, Plan]:
        """Tries every number of copies for the misses that may go either way."""
        free = [e for e in visit.by_mass if here[e] < plans[e].need and plans[e].action == EITHER]
        if not free:
            return plans
        if self.costs is None:
            raise ValueError("split needs costs")
        t0, copies_from = self.gate_s, max(self.gate_s, self.link_free_s)
        waits, host = None, self.memory.host
        if host is not None:
            missing = [e for e in visit.by_mass if here[e] < plans[e].need]
            waits = self.waits(visit, [e for e in missing if not host.holds(visit.flat(e))], late)
        found: list[tuple[float, dict[int, Plan]]] = []
        for k in range(len(free) + 1):
            sides = {e: plans[e]._replace(action=FETCHED if i < k else ON_CPU) for i, e in enumerate(free)}
            chosen = plans | sides
            jobs, engine = self.work(visit, chosen, here, in_flight)
            order = [e for e in visit.by_mass if any(job.expert == e and job.copy_s is not None for job in jobs)]
            if waits is None:
                end = experts_done(jobs, t0, engine, order, late_waits=True, copies_from=copies_from) - t0
            else:
                end = done_beside(jobs, engine, order, waits)
            found.append((end, chosen))
        least = min(end for end, _ in found)
        return [chosen for end, chosen in found if end <= least * (1 + 1e-6)][-1]

    def classify(self, visit: Visit, plans: dict[int, Plan], here: dict[int, int], in_flight: set[int]) -> None:
        """Says what becomes of each demanded expert."""
        out = self.out
        for e in visit.demand:
            flat, plan, level = visit.flat(e), plans[e], here[e]
            if level >= plan.need:
                visit.hits.add(e)
                if flat in in_flight and self.last_ahead is not None:
                    code = HIT_LATE
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
                elif code == SUBSTITUTED:
                    out.stand_in[visit.index, e] = plan.stand_in
                else:
                    level = 0
            out.outcome[visit.index, e] = code
            if level and code != SUBSTITUTED:
                visit.runs_at[e] = level

    def read_s(self, visit: Visit) -> float:
        cache = self.memory.cache
        return self.costs.read_s(cache.size_bytes(visit.flat(0), cache.top)) if self.costs else 0.0

    def waits(self, visit: Visit, read: list[int], late: set[int]) -> Waits:
        """What the visit waits for, with these experts read one after the other, and some `late` ones being read."""
        link_s, storage_s = (max(free_s - self.gate_s, 0.0) for free_s in (self.link_free_s, self.storage_free_s))
        ready_s = dict.fromkeys(late, storage_s)
        ready_s |= {e: storage_s + (place + 1) * self.read_s(visit) for place, e in enumerate(read)}
        return Waits(ready_s, link_s, storage_s)

    def copy_demand(self, visit: Visit, plans: dict[int, Plan], here: dict[int, int], away: set[int]) -> None:
        """Copies the fetched experts; those turned `away` leave residency alone."""
        out, cache = self.out, self.memory.cache
        for e in visit.loaded:
            if e not in away:
                (out.upgrades if here[e] else out.loads)[visit.layer] += 1
                cache.set(visit.flat(e), plans[e].level)
            out.demand_bytes[visit.index] += cache.size_bytes(visit.flat(e), plans[e].level)

    def run_experts(
        self, visit: Visit, jobs: list[Job], engine: Engine, order: list[int], waits: Waits | None
    ) -> tuple[float, Shared | SideBySide]:
        """Copies the misses in `order`, runs the experts and the dense part; returns when all that is done, and how
        link and host share the host's memory.
        """
        out, v, t0 = self.out, visit.index, self.gate_s
        copies_from = max(t0, self.link_free_s)
        no_wait = experts_done(jobs, t0, engine, order, late_waits=False, copies_from=None)
        only_late = experts_done(jobs, t0, engine, order, late_waits=True, copies_from=None)
        idle_link = experts_done(jobs, t0, engine, order, late_waits=True, copies_from=t0)
        done = experts_done(jobs, t0, engine, order, late_waits=True, copies_from=copies_from)
        out.stall_late_s[v] = only_late - no_wait
        out.stall_miss_s[v] = idle_link - only_late
        out.stall_link_busy_s[v] = done - idle_link
        if waits is None:
            self.link_work_s = link_walk(jobs, order, copies_from)[1] - t0
            shared = Shared(self.link_work_s, engine.link_draw, engine.host, engine.limit)
            out.host_s[v] = shared.host_s
            self.link_free_s = t0 + shared.at(self.link_work_s)
            delayed_s = shared.at
        else:
            found = t0 + done_beside(jobs, engine, order, waits)
            out.stall_storage_s.append(found - done)
            done, shared = found, side_by_side(jobs, engine, order, waits)
            out.host_s[v] = shared.busy_s(1)
            self.link_free_s = t0 + max(shared.link_ends, default=0.0)
            shared.copying_s = shared.busy_s(0) - waits.link_s + min(waits.link_s, waits.storage_s)
            if waits.ready_s:
                self.storage_free_s = t0 + max(waits.ready_s.values())
            delayed_s = lambda _: shared.link_ends[0]  # noqa: E731
        if self.last_ahead is not None and self.last_ahead[1] > t0:  # the host delays what is in flight, too
            self.last_ahead = self.last_ahead[0], t0 + delayed_s(self.last_ahead[1] - t0)
        if not self.costs or not visit.ends_layer:
            return done, shared
        s, requests = self.schedule, 0
        if s.phase[v] == DECODE:  # one token of each, unless some are drafted
            requests = visit.tokens if s.turns is None else int(s.turns[v])
        return done + self.costs.dense_s(visit.layer, visit.tokens, requests), shared

    def wanted(self, visit: Visit, horizon: int) -> list[int]:
        """Flat ids that are selected and not resident, in the order in which they are asked for."""
        cache, policy, predictor, selector, *_, host = self.memory
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
        self,
        visit: Visit,
        wanted: list[int],
        pinned: set[int],
        next_gate_s: float,
        may_evict: bool,
        shared: Shared | SideBySide,
    ) -> list[int]:
        """Starts the copies that have time and room; returns them."""
        cache, host, costs, started = self.memory.cache, self.memory.host, self.costs, []
        work_s = self.link_work_s  # of the link since the gate, undisturbed
        for flat in wanted:
            begin_s = self.gate_s + shared.at(work_s) if isinstance(shared, Shared) else self.link_free_s
            begin_s = max(begin_s, self.gate_s)
            if costs and begin_s >= next_gate_s:
                break
            pool, size_bytes = cache.pool(flat), cache.size_bytes(flat, cache.top)
            in_the_way = cache.bytes_of(pinned | set(started), pool) if may_evict else cache.held_bytes[pool]
            if in_the_way + cache.room_bytes(flat, cache.top) > cache.budgets[pool]:
                continue
            if host is not None:
                if not host.holds(flat):
                    begin_s = max(begin_s, self.storage_free_s)
                    late = costs is not None and begin_s >= next_gate_s
                    if late or host.streams or not host.has_room_ahead(flat, may_evict):
                        continue
                    read_s = costs.read_s(size_bytes) if costs else 0.0
                    begin_s = self.storage_free_s = begin_s + read_s
                    self.out.reading_s[-1] += read_s
                    self.out.read_ahead[-1].append(flat)
                host.copied_ahead(flat)
            copy_s = costs.copy_s(size_bytes) if costs else 0.0
            work_s += copy_s
            if isinstance(shared, Shared):
                self.link_free_s = self.gate_s + shared.at(work_s)
            else:
                self.link_free_s = self.gate_s + shared.copied_s(begin_s - self.gate_s, copy_s)
                shared.copying_s += self.link_free_s - begin_s
            self.last_ahead = flat, self.link_free_s
            cache.set(flat, cache.top)
            self.memory.eviction.arrive(visit, flat)
            started.append(flat)
            self.unused.add(flat)
            self.out.loads[flat // cache.experts] += 1
            self.out.prefetch_bytes[visit.index] += size_bytes
        return started

    def use_reads(self, asked: set[int], host: HostTier) -> None:
        """What is asked for, was read ahead into host memory and is still there is used."""
        used = host.unused & asked
        self.out.reads_used += len(used)
        host.unused -= used

    def read_ahead(self, visit: Visit, wanted: list[int], next_gate_s: float, may_evict: bool, host: HostTier) -> None:
        """Starts the reads into host memory that have time and room."""
        size_bytes = self.memory.cache.size_bytes
        for flat in () if host.streams else wanted:
            if host.holds(flat):
                continue
            begin_s = max(self.storage_free_s, self.gate_s)
            if self.costs and begin_s >= next_gate_s:
                break
            if not host.has_room_ahead(flat, may_evict):
                self.out.skipped[-1] += 1
                continue
            read_s = self.costs.read_s(size_bytes(flat, host.cache.top)) if self.costs else 0.0
            self.storage_free_s = begin_s + read_s
            self.last_read = flat, self.storage_free_s
            self.out.reading_s[-1] += read_s
            self.out.read_ahead[-1].append(flat)
            host.read_ahead(flat)

    def evict(self, visit: Visit, pinned: set[int], pools: set[int], new: set[int]) -> None:
        """Brings the pools within their budgets; `new` came by demand at this visit."""
        cache, admission, gone = self.memory.cache, self.memory.admission, []

        def score(flat: int) -> tuple[float, ...]:
            keys = self.memory.eviction.keep(visit, flat)
            return admission.handicap(keys) if flat in new else keys

        for pool in sorted(pools):
            if cache.held_bytes[pool] <= cache.budgets[pool]:
                continue
            residents = cache.pools[pool]
            leaving = [(score(flat), -flat) for flat in residents if flat not in pinned]
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
        self.waste()
        return self.out
