"""The least stall that CONTRACT.md allows, by trying everything: for a handful of visits of one-size experts.

What a policy may decide is tried in all ways: whether the demand is pinned or competes (once for the whole replay),
which copies are turned away, which absent experts are copied ahead and in what order, and who leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from typing import NamedTuple


class Gate(NamedTuple):
    """What a replay knows when a visit begins."""

    resident: frozenset[int]
    flying: int  # whose copy is under way; -1: none
    link_s: float  # until it ends


class Tiny(NamedTuple):
    """Visits in order; flat ids are ``layer * experts + expert``."""

    demands: Sequence[tuple[int, ...]]  # flat ids
    layers: Sequence[int]
    experts: int
    slots: int  # of each pool
    layered: bool
    copy_s: float
    expert_s: float
    dense_s: float
    ends: Sequence[bool]  # the last visit of its layer in a pass: it runs the dense part, and may copy ahead


def least_stall_s(tiny: Tiny) -> float:
    """Over all policies that pin the demand, and all in which it competes."""
    return min(_least(tiny, pins) for pins in (True, False))


def _least(tiny: Tiny, pins: bool) -> float:
    costs: dict[Gate, float] = {Gate(frozenset(), -1, 0.0): 0.0}
    for v in range(len(tiny.demands)):
        found: dict[Gate, float] = {}
        for gate, cost in costs.items():
            for after, stall_s in _visit(tiny, v, gate, pins):
                found[after] = min(found.get(after, cost + stall_s), cost + stall_s)
        costs = found
    return min(costs.values())


def _visit(tiny: Tiny, v: int, gate: Gate, pins: bool) -> Iterator[tuple[Gate, float]]:
    demand = frozenset(tiny.demands[v])
    missing = demand - gate.resident
    done_s = tiny.expert_s * len(demand - missing - {gate.flying})
    if gate.flying in demand:
        done_s = max(done_s, gate.link_s) + tiny.expert_s
    ready_s = gate.link_s
    for _ in missing:
        ready_s += tiny.copy_s
        done_s = max(done_s, ready_s) + tiny.expert_s
    stall_s = done_s - tiny.expert_s * len(demand)
    end_s = done_s + tiny.dense_s * tiny.ends[v]
    own = tiny.layers[v] if tiny.layered else 0
    if len(demand) > tiny.slots:
        for kept in _shrunk(tiny, gate.resident | demand, frozenset(), {own}):
            flying = gate.flying if gate.link_s > end_s and gate.flying in kept else -1
            yield Gate(kept, flying, max(ready_s - end_s, 0.0)), stall_s
        return
    for number in range(len(missing) + 1) if pins else (0,):  # where the demand competes, turning away is leaving
        for away in map(frozenset, combinations(sorted(missing), number)):
            resident = gate.resident | (demand - away)
            pinned = (resident & demand if pins else frozenset()) | ({gate.flying} - {-1})
            for copied in _ahead(tiny, resident | demand, pinned, ready_s, end_s) if tiny.ends[v] else ((),):
                link_s = max(ready_s + tiny.copy_s * len(copied) - end_s, 0.0)
                last = copied[-1] if copied else gate.flying
                pools = {own} | {_pool(tiny, f) for f in copied}
                for kept in _shrunk(tiny, resident | set(copied), pinned | set(copied), pools):
                    flying = last if link_s > 0 and (copied or gate.link_s > end_s) else -1
                    yield Gate(kept, flying, link_s), stall_s


def _ahead(
    tiny: Tiny, here: frozenset[int], pinned: frozenset[int], ready_s: float, end_s: float
) -> Iterator[tuple[int, ...]]:
    """Copies that have time, one behind the other, and room beside what is pinned."""
    absent = [f for f in range((max(tiny.layers) + 1) * tiny.experts) if f not in here]
    number = 0
    while number <= len(absent) and (number == 0 or ready_s + tiny.copy_s * (number - 1) < end_s):
        for copied in permutations(absent, number):
            if all(sum(_pool(tiny, g) == _pool(tiny, f) for g in pinned | set(copied)) <= tiny.slots for f in copied):
                yield copied
        number += 1


def _shrunk(
    tiny: Tiny, resident: frozenset[int] | set[int], pinned: frozenset[int] | set[int], pools: set[int]
) -> Iterator[frozenset[int]]:
    """All that may be left when the pools are brought within their budgets."""
    results = [frozenset(f for f in resident if _pool(tiny, f) not in pools)]
    for pool in sorted(pools):
        mine = frozenset(f for f in resident if _pool(tiny, f) == pool)
        stays = mine & pinned
        room = max(tiny.slots - len(stays), 0)
        free = sorted(mine - stays)
        some = [stays | set(few) for few in combinations(free, min(room, len(free)))]
        results = [result | few for result in results for few in some]
    return iter(results)


def _pool(tiny: Tiny, flat: int) -> int:
    return flat // tiny.experts if tiny.layered else 0
