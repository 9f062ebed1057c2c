"""Host memory as a cache between storage and the device (CONTRACT.md section 6).

Where the contract leaves room: ranks and arrivals of the host tier are counted among what its policy hears, which
orders them as the device's clock does. A demanded expert that is dropped, or has a stand-in, is not asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace

from .base import Eviction
from .cache import Cache
from .schedule import Visit


class HostTier:
    """Holds whole experts, at the highest precision."""

    def __init__(
        self,
        cache: Cache,
        policy: Callable[[Cache], Eviction],
        oracle: bool,
        hears_uses: bool,
        exclusive: bool,
        to_host: bool,
        device: Cache,
    ) -> None:
        self.cache, self.policy = cache, policy(cache)
        self.hears_all, self.exclusive, self.to_host = oracle or hears_uses, exclusive, to_host
        self.unused: set[int] = set()  # read ahead into it, and not asked for since
        self.pinned: set[int] = set()
        self.streams = False
        self.seen: Visit | None = None  # the visit, as the policy hears it
        full = [False] * len(cache.budgets)
        for e in range(cache.experts):
            for layer in range(cache.layers):
                flat = layer * cache.experts + e
                if exclusive and device.level(flat):
                    continue
                pool = cache.pool(flat)
                full[pool] |= cache.held_bytes[pool] + cache.room_bytes(flat, cache.top) > cache.budgets[pool]
                if not full[pool]:
                    cache.set(flat, cache.top)

    def holds(self, flat: int) -> bool:
        return self.cache.level(flat) > 0

    def ask(self, visit: Visit, levels: dict[int, int], away: set[int], in_flight: set[int], stream: bool) -> set[int]:
        """Serves the visit's copies, each at its level, some turned `away` by the device, and at level 0 what runs on
        the host.

        Returns the experts that are read from storage.
        """
        cache, top = self.cache, self.cache.top
        there = {e for e in range(visit.experts) if self.holds(visit.flat(e))}
        read, stays = set(levels) - there, {e for e in levels if not self.exclusive or levels[e] < top or e in away}
        for e in levels:
            if e in stays or e in there:
                cache.set(visit.flat(e), top if e in stays else 0)
        heard = [e for e in visit.demand if self.hears_all or e in levels]
        self.seen = replace(
            visit,
            demand=heard,
            mass={e: visit.mass[e] for e in heard},
            hits=there & set(heard),
            loaded=read & stays,
            runs_at=dict.fromkeys(heard, top),
        )
        self.policy.observe(self.seen)
        demanded = {visit.flat(e) for e in stays}
        pool = cache.pool(visit.flat(0))
        self.streams = stream and cache.bytes_of(demanded, pool) > cache.budgets[pool]
        self.pinned = in_flight | (demanded if self.policy.pins_demand else set())
        return read

    def has_room_ahead(self, flat: int, may_evict: bool) -> bool:
        """Whether an expert that is not here may be read ahead."""
        if self.exclusive and not self.to_host:
            return True
        pool = self.cache.pool(flat)
        in_the_way = self.cache.bytes_of(self.pinned, pool) if may_evict else self.cache.held_bytes[pool]
        return in_the_way + self.cache.room_bytes(flat, self.cache.top) <= self.cache.budgets[pool]

    def copied_ahead(self, flat: int) -> None:
        """A prefetch copy to the device has started."""
        assert self.seen is not None
        if self.exclusive:
            if self.holds(flat):
                self.cache.set(flat, 0)
            return
        self.pinned.add(flat)
        if not self.holds(flat):
            self.cache.set(flat, self.cache.top)
            self.policy.arrive(self.seen, flat)

    def read_ahead(self, flat: int) -> None:
        """A read that goes no further has started."""
        assert self.seen is not None
        self.cache.set(flat, self.cache.top)
        self.policy.arrive(self.seen, flat)
        self.pinned.add(flat)
        self.unused.add(flat)

    def take_back(self, flats: list[int]) -> None:
        """The device has evicted these, of the highest precision."""
        assert self.seen is not None
        for flat in flats if self.exclusive else ():
            self.cache.set(flat, self.cache.top)
            self.policy.arrive(self.seen, flat)

    def evict(self, started: list[int]) -> list[int]:
        assert self.seen is not None
        cache, gone = self.cache, []
        pinned = set(started) if self.streams else self.pinned
        pools = {cache.pool(flat) for flat in (self.seen.flat(0), *started)}
        for pool in range(len(cache.pools)) if self.exclusive else sorted(pools):
            leaving = [(self.policy.keep(self.seen, flat), -flat) for flat in cache.pools[pool] if flat not in pinned]
            heapq.heapify(leaving)
            while leaving and cache.held_bytes[pool] > cache.budgets[pool]:
                gone.append(-heapq.heappop(leaving)[1])
                cache.set(gone[-1], 0)
        return gone
