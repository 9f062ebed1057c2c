"""The replay contract (`specmd_jax/CONTRACT.md`) in slow, plain Python: what the JAX engine is compared with.

Nothing here is vectorised or clever; numpy appears where the contract says float32, and for the arrays that go in and
come out. An expert is named by its flat id ``layer * E + expert``. Where the contract leaves room, this file decides:

Residency
  * The *copy in flight* is the one whose end lies strictly after t0 of the visit. It is pinned even where the demand
    is not (`belady_bypass`), but not by `oversize="stream"`, which pins nothing at all. Demand and a copy in flight
    can together exceed the budget; the pool is then over budget by at most that copy until a later visit's eviction.
  * A visit evicts in its own pool and in those it prefetched into, so a held oversize pool shrinks at its next use.
  * The room test of a prefetch counts what step 7 will pin: the demand (not for `belady_bypass`), the copy in flight,
    the prefetches so far.
  * `stream` starts no prefetch in any pool, but predictors still predict: what they select is still marked for
    Least-Stale.
  * A prefetch never upgrades: an expert resident at any level is not wanted.
  * An upgrade is a load to the policies (`fifo`, `lfu_resident`, `slru`), but `loads` counts only arrivals of absent
    experts, so ``loads - evictions - emptied = occupancy``.
  * A reset empties cache, policies, predictors, selections and routing averages. Time goes on and the link stays busy
    until its copy ends. Unused prefetches that it throws out are wasted. What `belady` knows of the future is no
    memory and stays.

Policies
  * Every demanded expert is used, whether it then ran from the device, on the host, by a stand-in or not at all. A
    stand-in is not used.
  * `lfu_resident`: the visit that loads an expert counts (1 after a demand load, 0 after a prefetch).
  * `lfru`: a prefetch arrival is a touch for the age too. `lfu_decay` decays at each visit, also of a sequential
    schedule.
  * `slru`: only a hit promotes; the share of the budget is taken in whole units of the expert sizes, in float32.
  * `belady` under changed routing reads ``next_use`` of the schedule as it stands.

Prefetch
  * `previous` and `transition` see the demand of a whole (pass, layer), also when it is spread over sequential visits.
  * `perfect`, `noisy` and `shuffled` all want ``future[visit, h - 1, expert]`` where it is positive.
  * The percentile histogram belongs to the target layer, whatever the distance h.

Miss rules and routing: see their docstrings.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import reference_learned

from specmd_jax.types import DECODE, NEVER, Schedule

NOT_DEMANDED, HIT_REUSE, HIT_PREFETCH, HIT_LATE, FETCHED, DROPPED, SUBSTITUTED, ON_CPU = range(8)
"""Values of `Replay.outcome`."""


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

    def copy_s(self, size_bytes: int) -> float:
        return self.link_latency_s + size_bytes / self.link_bytes_per_s

    def expert_s(self, layer: int, level: int, tokens: int) -> float:
        compute_s = tokens * self.expert_flops[layer] / self.peak_flops_per_s
        return max(compute_s, self.expert_mem_s[level - 1][layer]) + self.launch_s

    def dense_s(self, layer: int, tokens: int) -> float:
        return max(tokens * self.dense_flops[layer] / self.peak_flops_per_s, self.dense_mem_s[layer]) + self.launch_s

    def host_s(self, layer: int, tokens: int) -> float:
        return max(tokens * self.host_expert_flop_s[layer], self.host_expert_mem_s[layer])


@dataclass
class Replay:
    """What happened, visit by visit (counts and lists cover all visits, also those that are not counted in metrics)."""

    outcome: npt.NDArray[np.int8]  # [V, E] one of the codes above
    collision: npt.NDArray[np.bool_]  # [V, E] missed after being evicted earlier in the same pass
    stand_in: npt.NDArray[np.int32]  # [V, E] expert that ran in place of a substituted one, else -1
    resident: npt.NDArray[np.int8]  # [V, L, E] level after the visit, 0: absent
    visit_s: npt.NDArray[np.float64]  # [V] from this gate to the next
    stall_late_s: npt.NDArray[np.float64]  # [V]
    stall_miss_s: npt.NDArray[np.float64]  # [V]
    stall_link_busy_s: npt.NDArray[np.float64]  # [V]
    demand_bytes: npt.NDArray[np.int64]  # [V] copied for misses
    prefetch_bytes: npt.NDArray[np.int64]  # [V] copied ahead
    loads: npt.NDArray[np.int64]  # [L] absent experts that became resident, by demand or prefetch
    upgrades: npt.NDArray[np.int64]  # [L] lower copies replaced by a higher one
    evictions: npt.NDArray[np.int64]  # [L]
    emptied: npt.NDArray[np.int64]  # [L] residents thrown out by a reset
    evicted: list[list[int]] = field(default_factory=list)  # [V] flat ids as they left
    prefetched: list[list[int]] = field(default_factory=list)  # [V] flat ids as their copies started
    prefetch_used: int = 0  # prefetched experts that were hit before they left
    prefetch_wasted: int = 0  # prefetched experts that left, or stayed to the end, unused


@dataclass
class Visit:
    """One visit as its gate shows it; the last fields are filled in once the visit is classified."""

    index: int
    layer: int
    pass_id: int
    clock: int
    tokens: int
    one_decode_token: bool
    ends_layer: bool
    demand: list[int]  # expert ids by rank
    count: dict[int, int]  # tokens of each demanded expert
    mass: dict[int, np.float32]
    next_use: dict[int, int]
    logits: npt.NDArray[np.float32] | None  # [E] of the only token of a one-token pass
    experts: int  # E
    hits: set[int] = field(default_factory=set)
    loaded: set[int] = field(default_factory=set)  # misses that are copied
    runs_at: dict[int, int] = field(default_factory=dict)  # level of hits and fetched misses

    @property
    def after_demand(self) -> int:
        """Touch of what arrives at this visit by prefetch."""
        return self.clock + len(self.demand)

    @property
    def by_mass(self) -> list[int]:
        return sorted(self.demand, key=lambda e: (-self.mass[e], e))

    def flat(self, expert: int) -> int:
        return self.layer * self.experts + expert


def read_visit(schedule: Schedule, v: int) -> Visit:
    ids = [int(e) for e in np.flatnonzero(schedule.count[v] > 0)]
    one_token = int(schedule.tokens[v]) == 1
    return Visit(
        index=v,
        layer=int(schedule.layer[v]),
        pass_id=int(schedule.pass_id[v]),
        clock=int(schedule.clock[v]),
        tokens=int(schedule.tokens[v]),
        one_decode_token=one_token and int(schedule.phase[v]) == DECODE,
        ends_layer=bool(schedule.ends_layer[v]),
        demand=sorted(ids, key=lambda e: int(schedule.rank[v, e])),
        count={e: int(schedule.count[v, e]) for e in ids},
        mass={e: np.float32(schedule.mass[v, e]) for e in ids},
        next_use={e: int(schedule.next_use[v, e]) for e in ids},
        logits=schedule.logits[v, 0] if one_token and schedule.logits is not None else None,
        experts=schedule.experts,
    )


class Cache:
    """Who is resident at which level, in one pool or in one a layer."""

    def __init__(self, layers: int, experts: int, budget: int | Sequence[int], level_bytes: Sequence[Sequence[int]]):
        self.layers, self.experts, self.level_bytes = layers, experts, level_bytes
        self.global_pool = isinstance(budget, (int, np.integer))
        self.budgets = [int(budget)] if isinstance(budget, (int, np.integer)) else [int(b) for b in budget]
        if len(self.budgets) != (1 if self.global_pool else layers):
            raise ValueError(f"{len(self.budgets)} layer budgets for {layers} layers")
        self.pools: list[dict[int, int]] = [{} for _ in self.budgets]  # flat id -> level
        self.held_bytes = [0] * len(self.budgets)
        self.table = np.zeros((layers, experts), np.int8)  # the same levels as an array, to be recorded

    @property
    def top(self) -> int:
        return len(self.level_bytes)

    def pool(self, flat: int) -> int:
        return 0 if self.global_pool else flat // self.experts

    def level(self, flat: int) -> int:
        return self.pools[self.pool(flat)].get(flat, 0)

    def size_bytes(self, flat: int, level: int) -> int:
        return self.level_bytes[level - 1][flat // self.experts] if level else 0

    def set(self, flat: int, level: int) -> None:
        pool = self.pool(flat)
        self.held_bytes[pool] += self.size_bytes(flat, level) - self.size_bytes(flat, self.level(flat))
        if level:
            self.pools[pool][flat] = level
        else:
            del self.pools[pool][flat]
        self.table[flat // self.experts, flat % self.experts] = level

    def bytes_of(self, flats: set[int], pool: int) -> int:
        """Bytes that the residents among `flats` hold in a pool."""
        return sum(self.size_bytes(f, self.level(f)) for f in flats if self.pool(f) == pool)


# ------------------------------------------------------------------------------------------------- eviction (section 3)


class Eviction:
    """Lowest `keep` leaves first. The base remembers touches, which is all that `lru` needs."""

    pins_demand: ClassVar[bool] = True

    def __init__(self, cache: Cache, next_use: list[int]):
        self.cache = cache
        self.next_use = next_use  # of each flat id, kept up to date by the replay; only the oracles read it
        self.size = cache.layers * cache.experts
        self.touch = [-1] * self.size

    def observe(self, visit: Visit) -> None:
        for rank, e in enumerate(visit.demand):
            self.touch[visit.flat(e)] = visit.clock + rank

    def arrive(self, visit: Visit, flat: int) -> None:
        """A prefetch copy was started."""
        self.touch[flat] = visit.after_demand

    def select(self, flat: int, for_pass: int) -> None:
        """A predictor selected this expert for its layer's visit in that pass."""
        del flat, for_pass

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        del visit
        return (self.touch[flat],)


class Fifo(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.load = [-1] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.loaded:
            self.load[visit.flat(e)] = self.touch[visit.flat(e)]

    def arrive(self, visit: Visit, flat: int) -> None:
        self.load[flat] = visit.after_demand

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.load[flat],)


def hash31(seed: int, visit: int, flat: int) -> int:
    mask = 0xFFFFFFFF
    x = (seed * 0x9E3779B1 + visit * 0x85EBCA77 + flat * 0xC2B2AE3D) & mask
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= x >> 15
    x = x * 0x846CA68B & mask
    x ^= x >> 16
    return x >> 1


class Random(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], seed: int = 0):
        super().__init__(cache, next_use)
        self.seed = seed

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (hash31(self.seed, visit.index, flat),)


class Lfu(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.uses = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.uses[visit.flat(e)] += 1

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.uses[flat], self.touch[flat])


class LfuResident(Lfu):
    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.loaded:
            self.uses[visit.flat(e)] = 1

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.uses[flat] = 0


class LfuDecay(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], decay: float = 0.9):
        super().__init__(cache, next_use)
        self.decay = np.float32(decay)
        self.value = np.zeros((cache.layers, cache.experts), np.float32)

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.value[visit.layer, e] += np.float32(1)
        self.value[visit.layer] *= self.decay
        self.value[visit.layer][self.value[visit.layer] < np.finfo(np.float32).tiny] = 0

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (float(self.value.flat[flat]), self.touch[flat])


class Lfru(Lfu):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.touched_at = [0] * self.size  # visit of the last touch

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.touched_at[visit.flat(e)] = visit.index

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.touched_at[flat] = visit.index

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        age = visit.index - self.touched_at[flat] + 1
        return (float(np.float32(self.uses[flat]) / np.float32(age)), self.touch[flat])


class Slru(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], protected: float = 0.8):
        super().__init__(cache, next_use)
        self.protected = protected
        self.segment = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            if e in visit.hits:
                self.segment[visit.flat(e)] = 1
            elif e in visit.loaded:
                self.segment[visit.flat(e)] = 0
        unit = math.gcd(*(int(size) for row in self.cache.level_bytes for size in row))
        for pool, residents in enumerate(self.cache.pools):
            shielded = {f for f in residents if self.segment[f]}
            limit = np.floor(np.float32(self.protected) * np.float32(self.cache.budgets[pool] // unit))
            while self.cache.bytes_of(shielded, pool) > int(limit) * unit:
                oldest = min(shielded, key=lambda f: self.touch[f])
                shielded.remove(oldest)
                self.segment[oldest] = 0
                self.touch[oldest] = visit.after_demand

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.segment[flat] = 0

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.segment[flat], self.touch[flat])


class Lhu(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.top_uses = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e, level in visit.runs_at.items():
            self.top_uses[visit.flat(e)] += level == self.cache.top

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.top_uses[flat], self.touch[flat])


def cyclic_distance(cache: Cache, visit: Visit, flat: int) -> int:
    return (flat // cache.experts - visit.layer) % cache.layers or cache.layers


class Fld(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], distance: str = "cyclic"):
        super().__init__(cache, next_use)
        if distance not in ("cyclic", "absolute"):
            raise ValueError(f"unknown fld distance {distance!r}")
        self.distance = distance

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        if self.distance == "cyclic":
            return (-cyclic_distance(self.cache, visit, flat),)
        return (-abs(flat // self.cache.experts - visit.layer),)


class Score(Eviction):
    def __init__(self, cache: Cache, next_use: list[int]):
        super().__init__(cache, next_use)
        self.score = np.zeros(self.size, np.float32)

    def observe(self, visit: Visit) -> None:
        for e in visit.demand:
            self.score[visit.flat(e)] += visit.mass[e]

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (float(self.score[flat]),)


class LeastStale(Eviction):
    def __init__(self, cache: Cache, next_use: list[int], reading: str = "cyclic"):
        super().__init__(cache, next_use)
        if reading not in ("cyclic", "left_first", "literal", "recency"):
            raise ValueError(f"unknown least_stale reading {reading!r}")
        self.reading = reading
        self.mark = [-1] * self.size  # pass for which it was last used or selected

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.mark[visit.flat(e)] = visit.pass_id

    def select(self, flat: int, for_pass: int) -> None:
        self.mark[flat] = for_pass

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        layer, touch = flat // self.cache.experts, self.touch[flat]
        current = self.mark[flat] >= visit.pass_id
        if self.reading == "cyclic":
            return (current, -cyclic_distance(self.cache, visit, flat), touch)
        if self.reading == "left_first":
            left = layer < visit.layer
            return (current, not left, layer if left else -layer, touch)
        return (current, flat) if self.reading == "literal" else (current, touch)


class Weighted(Lfu):
    """Sums of integers: weights and features in units of 1/1024, features rounded down (logs: linear in an octave)."""

    def __init__(
        self,
        cache: Cache,
        next_use: list[int],
        recency: float = 0.5,
        frequency: float = 0.0,
        fast: float = 1.0,
        slow: float = 1.0,
        mass: float = 0.0,
        distance: float = 0.0,
        fast_decay: float = 0.7,
        slow_decay: float = 0.95,
    ):
        super().__init__(cache, next_use)
        weights = (recency, frequency, fast, slow, mass, distance)
        self.weights = [int(np.rint(np.float32(weight) * np.float32(1024))) for weight in weights]
        self.decays = [np.float32(decay) for decay in (fast_decay, slow_decay, slow_decay)]
        self.last = [-1] * self.size  # pass of the last use, or that it was prefetched for
        self.values = [np.zeros((cache.layers, cache.experts), np.float32) for _ in self.decays]

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        for e in visit.demand:
            self.last[visit.flat(e)] = visit.pass_id
            for value, new in zip(self.values, (1, 1, visit.mass[e]), strict=True):
                value[visit.layer, e] += np.float32(new)
        for value, decay in zip(self.values, self.decays, strict=True):
            value[visit.layer] *= decay
            value[visit.layer][value[visit.layer] < np.finfo(np.float32).tiny] = 0

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.last[flat] = visit.pass_id + (flat // self.cache.experts <= visit.layer)

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        shares = [
            min(int(np.float32(value.flat[flat] * (np.float32(1) - decay)) * np.float32(1024)), 16 * 1024)
            for value, decay in zip(self.values, self.decays, strict=True)
        ]
        features = [
            -log2_eighths(max(visit.pass_id - self.last[flat], 0) + 1),
            log2_eighths(self.uses[flat] + 1),
            *shares,
            -(cyclic_distance(self.cache, visit, flat) * 1024 // self.cache.layers),
        ]
        return (sum(w * f for w, f in zip(self.weights, features, strict=True)), self.touch[flat])


def log2_eighths(count: int) -> int:
    """1024 * log2(count) / 8, linear between powers of two and rounded down."""
    octave = count.bit_length() - 1
    return 128 * octave + (128 * count >> octave) - 128


class Learned(Eviction):
    """A score for each expert of a layer at each of its visits; what was prefetched stays until then."""

    def __init__(self, cache: Cache, next_use: list[int], checkpoint: str = ""):
        super().__init__(cache, next_use)
        self.predictor = reference_learned.Predictor("evictor", cache.layers, cache.experts, checkpoint)
        self.score = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        self.predictor.visit(visit.layer, visit.mass)
        for e, score in enumerate(self.predictor.scores(visit.layer)):
            self.score[visit.flat(e)] = score

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.score[flat] = 1 << 24

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.score[flat], self.touch[flat])


class Online(Eviction):
    """Learns how soon experts are used again: the value of a visit should have been 1, or `fade` times the next one."""

    def __init__(self, cache: Cache, next_use: list[int], fade: float = 0.85, rate: float = 0.0625):
        super().__init__(cache, next_use)
        self.fade = int(np.rint(np.float32(fade) * np.float32(1024)))
        self.model = reference_learned.Online(cache.layers, cache.experts, 2, rate)
        self.latest: list[set[int]] = [set() for _ in range(cache.layers)]
        self.told: dict[int, tuple[list[set[int]], list[int]]] = {}  # layer -> sources and values of its latest visit
        self.score = [0] * self.size

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        model, layer, demand = self.model, visit.layer, set(visit.demand)
        before = model.inputs(layer)
        model.see(layer, demand)
        self.latest[layer] = demand
        inputs, sources = model.inputs(layer), [demand, self.latest[(layer - 1) % len(self.latest)]]
        later = [self.fade * min(max(v, 0), 16384) // 1024 for v in model.values(layer, inputs, sources)]
        if layer in self.told:
            told_sources, told = self.told[layer]
            errors = [(16384 if e in demand else later[e]) - told[e] for e in range(visit.experts)]
            model.learn(layer, before, told_sources, errors)
        values = model.values(layer, inputs, sources)
        self.told[layer] = sources, [min(max(v, 0), 16384) for v in values]
        for e, value in enumerate(values):
            self.score[visit.flat(e)] = value

    def arrive(self, visit: Visit, flat: int) -> None:
        super().arrive(visit, flat)
        self.score[flat] = 1 << 24

    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (self.score[flat], self.touch[flat])


class Belady(Eviction):
    def keep(self, visit: Visit, flat: int) -> tuple[float, ...]:
        return (-self.next_use[flat],)


class BeladyBypass(Belady):
    pins_demand = False


EVICTION: dict[str, type[Eviction]] = {
    "lru": Eviction,
    "fifo": Fifo,
    "random": Random,
    "lfu": Lfu,
    "lfu_resident": LfuResident,
    "lfu_decay": LfuDecay,
    "lfru": Lfru,
    "slru": Slru,
    "lhu": Lhu,
    "fld": Fld,
    "score": Score,
    "least_stale": LeastStale,
    "weighted": Weighted,
    "learned": Learned,
    "online": Online,
    "belady": Belady,
    "belady_bypass": BeladyBypass,
}


# ------------------------------------------------------------------------------------------------- prefetch (section 4)


class Predictor:
    """Wants nothing. The base remembers the latest complete demand of each layer, with its gate masses."""

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None):
        self.schedule, self.horizon, self.future = schedule, horizon, future
        self.latest: dict[int, dict[int, np.float32]] = {}  # layer -> expert -> mass
        self.now: dict[int, np.float32] = {}  # demand of this (pass, layer) so far

    def observe(self, visit: Visit) -> None:
        self.now.update(visit.mass)
        if visit.ends_layer:
            self.learn(visit.layer)
            self.latest[visit.layer], self.now = self.now, {}

    def learn(self, layer: int) -> None:
        """Sees ``self.now`` complete, before it replaces the layer's latest demand."""
        del layer

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        """Scores of the wanted experts of layer `target`, h layers ahead; all others are -inf."""
        del visit, h, target
        return {}


class Previous(Predictor):
    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        return dict(self.latest.get(target, {}))


class Popular(Predictor):
    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None):
        super().__init__(schedule, horizon, future)
        self.uses: dict[int, dict[int, int]] = {}

    def observe(self, visit: Visit) -> None:
        super().observe(visit)
        uses = self.uses.setdefault(visit.layer, {})
        for e in visit.demand:
            uses[e] = uses.get(e, 0) + 1

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        return {e: np.float32(uses) for e, uses in self.uses.get(target, {}).items()}


def positive(scores: npt.NDArray[Any]) -> dict[int, np.float32]:
    return {int(e): np.float32(scores[e]) for e in np.flatnonzero(scores > 0)}


class Future(Predictor):
    """`perfect`, `noisy` and `shuffled`: they differ in the array that the caller hands over."""

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        if self.future is None:
            raise ValueError("this predictor needs `future`")
        return positive(self.future[visit.index, h - 1])


class GateAhead(Predictor):
    """The next layer's gate on this layer's activations: one layer ahead, never from the last layer."""

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        if self.schedule.ahead is None:
            raise ValueError("gate_ahead needs `ahead` in the schedule")
        if h > 1 or visit.layer == self.schedule.layers - 1:
            return {}
        return positive(self.schedule.ahead[visit.index])


FUTURE_PREDICTORS = ("perfect", "noisy", "shuffled")


class TopK:
    """The n best, n = floor(top_k * overfetch + 1/2) in float64; `top_k` is K of the trace (no schedule carries it)."""

    def __init__(self, top_k: int = 1, overfetch: float = 1.0):
        self.n = int(np.floor(top_k * overfetch + 0.5))

    def choose(self, target: int, want: dict[int, np.float32]) -> list[int]:
        del target
        return sorted(want, key=lambda e: (-want[e], e))[: self.n]


def score_bin(score: np.float32) -> int:
    """Eighth of an octave (linear within it), read off the float's bits: 0 holds 2^-16, 159 ends at 2^4."""
    bits = int(np.float32(score).view(np.uint32))
    return min(max((bits >> 20) - ((127 - 16) << 3), 0), 159)


class Percentile:
    """Scores in a bin above t, the first with ``count(bins <= t) * 100 >= q * total``; only positive scores count."""

    def __init__(self, q: float = 90.0):
        self.q = q
        self.histogram: dict[int, list[int]] = {}

    def choose(self, target: int, want: dict[int, np.float32]) -> list[int]:
        histogram = self.histogram.setdefault(target, [0] * 160)
        bins = {e: score_bin(score) for e, score in want.items() if score > 0}
        for b in bins.values():
            histogram[b] += 1
        total, below, threshold = sum(histogram), 0, 159
        for t, count in enumerate(histogram):
            below += count
            if below * 100 >= self.q * total:
                threshold = t
                break
        return sorted(e for e, b in bins.items() if b > threshold)


SELECTION: dict[str, type[TopK] | type[Percentile]] = {"topk": TopK, "percentile": Percentile}


# ----------------------------------------------------------------------------------------------------------- miss rules


class Plan(NamedTuple):
    """What happens to a demanded expert that is not resident at `need`."""

    need: int
    action: int = FETCHED
    level: int = 0  # at which it is fetched
    stand_in: int = -1  # expert that replaces it


class Arrived(NamedTuple):
    """Residents of the visited layer when the visit begins, the copy in flight left out: expert -> level."""

    levels: dict[int, int]
    top: int


def fetch(visit: Visit, arrived: Arrived) -> dict[int, Plan]:
    return {e: Plan(arrived.top, level=arrived.top) for e in visit.demand}


def fetch_lowest_bit(visit: Visit, arrived: Arrived) -> dict[int, Plan]:
    """Any resident level is a hit; a missing expert is copied at the cheapest precision."""
    del arrived
    return {e: Plan(1, level=1) for e in visit.demand}


def fetch_priority(visit: Visit, arrived: Arrived, bottom: float = 0.6) -> dict[int, Plan]:
    """The `bottom` share of the demand by falling mass makes do with the lowest level, the rest needs the highest."""
    first_low = (1 - bottom) * len(visit.demand) - 1e-9
    levels = {e: 1 if r >= first_low else arrived.top for r, e in enumerate(visit.by_mass)}
    return {e: Plan(level, level=level) for e, level in levels.items()}


def cascade(visit: Visit, arrived: Arrived, high: float = 0.6, low: float = 0.2) -> dict[int, Plan]:
    """Precision by share of the visit's mass: >= high the highest, >= low the middle (Q + 1) // 2, else the lowest.

    Shares are float64 with a slack of 1e-6, so that equal gates that sit on a threshold fall on its upper side.
    """
    total = sum(float(m) for m in visit.mass.values())
    plans: dict[int, Plan] = {}
    for e in visit.demand:
        mass = float(visit.mass[e])
        if mass >= (high - 1e-6) * total:
            level = arrived.top
        elif mass >= (low - 1e-6) * total:
            level = (arrived.top + 1) // 2
        else:
            level = 1
        plans[e] = Plan(level, level=level)
    return plans


def drop(visit: Visit, arrived: Arrived, keep: int = 1) -> dict[int, Plan]:
    """Misses from rank `keep` on (by falling mass, over the whole demand) are left out, others fetched at the top."""
    return {
        e: Plan(arrived.top, DROPPED) if r >= keep else Plan(arrived.top, level=arrived.top)
        for r, e in enumerate(visit.by_mass)
    }


def cpu(visit: Visit, arrived: Arrived) -> dict[int, Plan]:
    """Every miss runs on the host; nothing is copied."""
    return {e: Plan(arrived.top, ON_CPU) for e in visit.demand}


# ----------------------------------------------------------------- rules that are likely to change, one after the other


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    powers = np.exp(logits.astype(np.float32) - np.float32(logits.max()))
    return np.asarray(powers / powers.sum(dtype=np.float32), np.float32)


def substitute(visit: Visit, arrived: Arrived, tolerance: float = 0.1) -> dict[int, Plan]:
    """A miss of a one-token pass is replaced by the likeliest arrived, non-demanded expert of its layer.

    Only experts whose router probability (float32 softmax over all E) differs from the missing one's by at most
    `tolerance` qualify; ties go to the lower id; one expert may stand in for several. If none qualifies, or the pass
    has several tokens: fetch.
    """
    plans = fetch(visit, arrived)
    if visit.tokens != 1 or not visit.demand:
        return plans
    if visit.logits is None:
        raise ValueError("substitute needs `logits` in the schedule")
    probability = softmax(visit.logits)
    spare = [e for e in arrived.levels if e not in visit.count]
    for missing in visit.demand:
        near = [e for e in spare if abs(probability[e] - probability[missing]) <= np.float32(tolerance)]
        if near:
            best = min(near, key=lambda e: (-probability[e], e))
            plans[missing] = Plan(arrived.top, SUBSTITUTED, stand_in=best)
    return plans


MISS = {
    "fetch": fetch,
    "fetch_lowest_bit": fetch_lowest_bit,
    "fetch_priority": fetch_priority,
    "cascade": cascade,
    "drop": drop,
    "cpu": cpu,
    "substitute": substitute,
}


class Standard:
    def route(self, visit: Visit, cache: Cache) -> Visit:
        del cache
        return visit


class CacheAware:
    """``z' = z + lam * delta * cached`` selects, the original logits weigh. One-token decode passes only.

    delta is the layer's mean of ``max(z) - min(z)`` over the tokens that this rule routed, this one included (a
    float32 running sum over a count). Cached is resident at any level when the visit begins, in flight or not. As many
    experts as before are selected (ties: lower id); gates are the softmax of the original logits over the selected,
    and the gate order is by falling original logit.
    """

    def __init__(self, lam: float = 1.0):
        self.lam = np.float32(lam)
        self.spread: dict[int, tuple[np.float32, int]] = {}  # layer -> summed max - min, tokens

    def route(self, visit: Visit, cache: Cache) -> Visit:
        if not visit.one_decode_token or not visit.demand:
            return visit
        if visit.logits is None:
            raise ValueError("cache_aware needs `logits` in the schedule")
        z = visit.logits.astype(np.float32)
        total, tokens = self.spread.get(visit.layer, (np.float32(0), 0))
        total, tokens = np.float32(total + (z.max() - z.min())), tokens + 1
        self.spread[visit.layer] = total, tokens
        delta = total / np.float32(tokens)
        cached = np.array([cache.level(visit.flat(e)) > 0 for e in range(visit.experts)], np.float32)
        moved = z + self.lam * delta * cached
        chosen = sorted(range(visit.experts), key=lambda e: (-moved[e], e))[: len(visit.demand)]
        chosen.sort(key=lambda e: (-z[e], e))
        gates = softmax(z[chosen])
        return replace(
            visit,
            demand=chosen,
            count=dict.fromkeys(chosen, 1),
            mass={e: np.float32(g) for e, g in zip(chosen, gates, strict=True)},
            next_use={e: visit.next_use.get(e, NEVER) for e in chosen},
        )


ROUTING: dict[str, type[Standard] | type[CacheAware]] = {"standard": Standard, "cache_aware": CacheAware}


class Transition(Predictor):
    """Co-activation learned online: how often expert f of a layer followed expert e of the layer h before (cyclically).

    At each complete demand of layer l and each h, every pair (e in the latest demand of layer l - h, f demanded now)
    counts once and every such e counts once as a source, also if nothing is demanded now; a layer not visited yet
    gives nothing. Learning comes first; then ``want[f] = sum_e pairs[e, f] / sum_e sources[e]`` over the e demanded
    now, float32, 0 being no want.
    """

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None):
        super().__init__(schedule, horizon, future)
        self.pairs: dict[tuple[int, int, int], dict[int, int]] = {}  # (layer, h, e) -> f -> count
        self.sources: dict[tuple[int, int, int], int] = {}  # (layer, h, e) -> count

    def learn(self, layer: int) -> None:
        for h in range(1, self.horizon + 1):
            for e in self.latest.get((layer - h) % self.schedule.layers, {}):
                self.sources[layer, h, e] = self.sources.get((layer, h, e), 0) + 1
                row = self.pairs.setdefault((layer, h, e), {})
                for f in self.now:
                    row[f] = row.get(f, 0) + 1

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        followed: dict[int, int] = {}
        for e in self.latest[visit.layer]:
            for f, count in self.pairs.get((target, h, e), {}).items():
                followed[f] = followed.get(f, 0) + count
        sources = sum(self.sources.get((target, h, e), 0) for e in self.latest[visit.layer])
        return {f: np.float32(count) / np.float32(sources) for f, count in followed.items()}


class LearnedPrefetch(Predictor):
    """The odds of a trained predictor, for every expert of the target."""

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None, checkpoint: str = ""):
        super().__init__(schedule, horizon, future)
        self.predictor = reference_learned.Predictor("prefetcher", schedule.layers, schedule.experts, checkpoint)

    def learn(self, layer: int) -> None:
        self.predictor.visit(layer, self.now)

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        del visit, h
        return {e: reference_learned.odds(score) for e, score in enumerate(self.predictor.scores(target))}


class OnlinePrefetch(Predictor):
    """Learns each layer's next demand from its last one and those of the three layers before it; wants every expert."""

    def __init__(self, schedule: Schedule, horizon: int, future: npt.NDArray[Any] | None, rate: float = 0.0625):
        super().__init__(schedule, horizon, future)
        self.model = reference_learned.Online(schedule.layers, schedule.experts, 4, rate)

    def sources(self, target: int) -> list[set[int]]:
        return [set(self.latest.get((target - back) % self.schedule.layers, {})) for back in range(4)]

    def learn(self, layer: int) -> None:
        inputs, sources = self.model.inputs(layer), self.sources(layer)
        told = self.model.values(layer, inputs, sources)
        errors = [(16384 if e in self.now else 0) - min(max(v, 0), 16384) for e, v in enumerate(told)]
        self.model.learn(layer, inputs, sources, errors)
        self.model.see(layer, set(self.now))

    def want(self, visit: Visit, h: int, target: int) -> dict[int, np.float32]:
        del visit, h
        values = self.model.values(target, self.model.inputs(target), self.sources(target))
        return {e: np.float32(min(max(v, 1), 4 * 16384)) / np.float32(16384) for e, v in enumerate(values)}


PREFETCH: dict[str, type[Predictor]] = {
    "none": Predictor,
    "previous": Previous,
    "popular": Popular,
    **dict.fromkeys(FUTURE_PREDICTORS, Future),
    "gate_ahead": GateAhead,
    "transition": Transition,
    "learned": LearnedPrefetch,
    "online": OnlinePrefetch,
}


# ----------------------------------------------------------------------------------------------------- time (section 5)


class Job(NamedTuple):
    """One expert that runs on the device."""

    expert: int
    compute_s: float
    late_until_s: float | None = None  # end of its copy, for a late hit
    copy_s: float | None = None  # length of its copy, for a fetched miss


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


def experts_done(
    jobs: list[Job], t0: float, host_s: float, copy_order: list[int], *, late_waits: bool, copies_from: float | None
) -> float:
    """End of the experts if late hits wait or not, and misses are copied from `copies_from` on or are there at once."""
    ends = {} if copies_from is None else link_walk(jobs, copy_order, copies_from)[0]
    arrivals = []
    for job in jobs:
        late = job.late_until_s if late_waits and job.late_until_s is not None else t0
        arrivals.append((ends.get(job.expert, late), job.compute_s))
    return max(device_walk(arrivals, t0), t0 + host_s)


# ----------------------------------------------------------------------------------------------------------- the replay


def lookup(table: Mapping[str, Any], kind: str, name: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r} (known: {', '.join(table)})")
    return table[name]


def replay(
    schedule: Schedule,
    *,
    eviction: str,
    numbers: Mapping[str, Any] | None = None,
    budget: int | Sequence[int],
    level_bytes: Sequence[Sequence[int]],
    oversize: str = "stream",
    prefetch: str = "none",
    prefetch_numbers: Mapping[str, Any] | None = None,
    selection: str = "topk",
    select_numbers: Mapping[str, Any] | None = None,
    horizon: int = 1,
    may_evict: bool = True,
    miss: str = "fetch",
    miss_numbers: Mapping[str, Any] | None = None,
    routing: str = "standard",
    routing_numbers: Mapping[str, Any] | None = None,
    costs: Costs | None = None,
    first_use: npt.NDArray[Any] | None = None,
    future: npt.NDArray[Any] | None = None,
) -> Replay:
    """Replays a schedule through one cache.

    Args:
        budget: bytes of the only pool, or of each layer's pool.
        level_bytes: [Q][L] bytes of an expert at each stored precision, ascending.
        select_numbers: `topk`: top_k (K of the trace), overfetch; `percentile`: q.
        horizon: layers ahead, 1..L.
        costs: None makes everything take no time and puts no time limit on prefetch.
        first_use: [L, E] first visit that demands each expert, read by `belady` for experts prefetched before any use.
        future: [V, H, E] what `perfect`, `noisy` and `shuffled` want for layer l + h, at h - 1.
    """
    layers, experts = schedule.layers, schedule.experts
    if oversize not in ("stream", "hold"):
        raise ValueError(f"unknown oversize {oversize!r}")
    if not 1 <= horizon <= layers:
        raise ValueError(f"horizon {horizon} outside 1..{layers}")
    if routing == "cache_aware" and not schedule.ends_layer.all():
        raise ValueError("cache_aware needs whole visits, not a sequential schedule")
    miss_rule = lookup(MISS, "miss rule", miss)

    def fresh() -> tuple[Cache, Eviction, Predictor, TopK | Percentile, Standard | CacheAware]:
        cache = Cache(layers, experts, budget, level_bytes)
        return (
            cache,
            lookup(EVICTION, "eviction", eviction)(cache, next_use, **(numbers or {})),
            lookup(PREFETCH, "prefetch", prefetch)(schedule, horizon, future, **(prefetch_numbers or {})),
            lookup(SELECTION, "selection", selection)(**(select_numbers or {})),
            lookup(ROUTING, "routing", routing)(**(routing_numbers or {})),
        )

    next_use = [NEVER] * (layers * experts)
    if first_use is not None:
        next_use = [int(v) for v in np.asarray(first_use).reshape(-1)]
    cache, policy, predictor, selector, router = fresh()

    visits = schedule.visits
    out = Replay(
        outcome=np.zeros((visits, experts), np.int8),
        collision=np.zeros((visits, experts), np.bool_),
        stand_in=np.full((visits, experts), -1, np.int32),
        resident=np.zeros((visits, layers, experts), np.int8),
        visit_s=np.zeros(visits),
        stall_late_s=np.zeros(visits),
        stall_miss_s=np.zeros(visits),
        stall_link_busy_s=np.zeros(visits),
        demand_bytes=np.zeros(visits, np.int64),
        prefetch_bytes=np.zeros(visits, np.int64),
        loads=np.zeros(layers, np.int64),
        upgrades=np.zeros(layers, np.int64),
        evictions=np.zeros(layers, np.int64),
        emptied=np.zeros(layers, np.int64),
    )
    t0 = 0.0  # the gate of the visit
    link_free_s = 0.0
    last_ahead: tuple[int, float] | None = None  # the prefetch copy started last: flat id and end
    unused: set[int] = set()  # residents that came by prefetch and were not hit since
    evicted_in: dict[int, int] = {}  # flat id -> pass of its last eviction

    for v in range(visits):
        if schedule.reset[v]:
            for residents in cache.pools:
                for flat in residents:
                    out.emptied[flat // experts] += 1
            out.prefetch_wasted += len(unused)
            cache, policy, predictor, selector, router = fresh()
            unused, evicted_in, last_ahead = set(), {}, None

        # 1. Routing.
        visit = router.route(read_visit(schedule, v), cache)
        layer = visit.layer
        in_flight = {last_ahead[0]} if last_ahead is not None and last_ahead[1] > t0 else set()

        # 2., 3. Classify against the state at the gate and ask the miss rule.
        here = {e: cache.level(visit.flat(e)) for e in range(experts)}
        arrived = Arrived({e: q for e, q in here.items() if q and visit.flat(e) not in in_flight}, cache.top)
        plans: dict[int, Plan] = miss_rule(visit, arrived, **(miss_numbers or {}))
        jobs: list[Job] = []
        stand_ins: set[int] = set()
        host_s = 0.0
        for e in visit.demand:
            flat, plan, level, late_until_s, copy_s = visit.flat(e), plans[e], here[e], None, None
            if level >= plan.need:
                visit.hits.add(e)
                if flat in in_flight and last_ahead is not None:
                    code, late_until_s = HIT_LATE, last_ahead[1]
                else:
                    code = HIT_PREFETCH if flat in unused else HIT_REUSE
                out.prefetch_used += flat in unused
                unused.discard(flat)
            else:
                code = plan.action
                out.collision[v, e] = evicted_in.get(flat) == visit.pass_id
                if code == FETCHED:
                    visit.loaded.add(e)
                    level = plan.level
                    copy_s = costs.copy_s(cache.size_bytes(flat, level)) if costs else 0.0
                elif code == SUBSTITUTED:
                    out.stand_in[v, e] = plan.stand_in
                    level = here[plan.stand_in]
                else:
                    level = 0  # does not run on the device
            out.outcome[v, e] = code
            stand_in = int(out.stand_in[v, e])
            if level and (stand_in < 0 or stand_in not in stand_ins):  # one run serves all that it stands in for
                compute_s = costs.expert_s(layer, level, visit.count[e]) if costs else 0.0
                jobs.append(Job(e, compute_s, late_until_s, copy_s))
            if stand_in >= 0:
                stand_ins.add(stand_in)
            if level and code != SUBSTITUTED:
                visit.runs_at[e] = level
            if code == ON_CPU and costs:
                host_s += costs.host_s(layer, visit.count[e])

        # 4. Observe.
        for e in visit.demand:
            next_use[visit.flat(e)] = visit.next_use[e]
        policy.observe(visit)
        predictor.observe(visit)

        # 5. Demand copies.
        for e in visit.loaded:
            (out.upgrades if here[e] else out.loads)[layer] += 1
            cache.set(visit.flat(e), plans[e].level)
            out.demand_bytes[v] += cache.size_bytes(visit.flat(e), plans[e].level)
        demanded = {visit.flat(e) for e in visit.demand if cache.level(visit.flat(e))}
        own_pool = cache.pool(visit.flat(0))
        oversized = cache.bytes_of(demanded, own_pool) > cache.budgets[own_pool]
        streamed = oversized and oversize == "stream"
        pinned = in_flight | (demanded if policy.pins_demand else set())

        # Time of the demand: the copies, the experts, the dense part.
        order = [e for e in (sorted(visit.demand) if streamed else visit.by_mass) if e in visit.loaded]
        copies_from = max(t0, link_free_s)
        no_wait = experts_done(jobs, t0, host_s, order, late_waits=False, copies_from=None)
        only_late = experts_done(jobs, t0, host_s, order, late_waits=True, copies_from=None)
        idle_link = experts_done(jobs, t0, host_s, order, late_waits=True, copies_from=t0)
        done = experts_done(jobs, t0, host_s, order, late_waits=True, copies_from=copies_from)
        out.stall_late_s[v] = only_late - no_wait
        out.stall_miss_s[v] = idle_link - only_late
        out.stall_link_busy_s[v] = done - idle_link
        if order:
            link_free_s = link_walk(jobs, order, copies_from)[1]
        next_gate_s = done + (costs.dense_s(layer, visit.tokens) if costs and visit.ends_layer else 0.0)

        # 6. Prefetch copies.
        started: list[int] = []
        if visit.ends_layer:
            wanted: list[tuple[float, int, int, int]] = []
            for h in range(1, horizon + 1):
                target = (layer + h) % layers
                want = predictor.want(visit, h, target)
                for e in selector.choose(target, want):
                    flat = target * experts + e
                    policy.select(flat, visit.pass_id + (target <= layer))
                    if not cache.level(flat):
                        wanted.append((-float(want[e]), h, e, flat))
            start_s = max(t0, link_free_s)
            for _, _, _, flat in [] if streamed else sorted(wanted):
                if costs and start_s >= next_gate_s:
                    break
                pool, size_bytes = cache.pool(flat), cache.size_bytes(flat, cache.top)
                in_the_way = cache.bytes_of(pinned, pool) if may_evict else cache.held_bytes[pool]
                if in_the_way + size_bytes > cache.budgets[pool]:
                    continue
                start_s += costs.copy_s(size_bytes) if costs else 0.0
                link_free_s = start_s
                last_ahead = flat, start_s
                cache.set(flat, cache.top)
                policy.arrive(visit, flat)
                started.append(flat)
                pinned.add(flat)
                unused.add(flat)
                out.loads[flat // experts] += 1
                out.prefetch_bytes[v] += size_bytes
        out.prefetched.append(started)

        # 7. Evict.
        if streamed:
            pinned = set()
        gone: list[int] = []
        for pool, residents in enumerate(cache.pools):
            copied_into = {own_pool} | {cache.pool(flat) for flat in started}
            if pool not in copied_into or cache.held_bytes[pool] <= cache.budgets[pool]:
                continue
            leaving = [(policy.keep(visit, flat), -flat) for flat in residents if flat not in pinned]
            heapq.heapify(leaving)
            while leaving and cache.held_bytes[pool] > cache.budgets[pool]:
                flat = -heapq.heappop(leaving)[1]
                cache.set(flat, 0)
                gone.append(flat)
        for flat in gone:
            evicted_in[flat] = visit.pass_id
            out.evictions[flat // experts] += 1
            out.prefetch_wasted += flat in unused
            unused.discard(flat)
            if last_ahead is not None and last_ahead[0] == flat:
                last_ahead = None
        out.evicted.append(gone)
        out.resident[v] = cache.table
        out.visit_s[v] = next_gate_s - t0
        t0 = next_gate_s

    out.prefetch_wasted += len(unused)
    return out
