"""The compiled loops of `curves`: one program for all policies, told apart by a few integers.

A keep-score is packed into one int64, so that comparing two experts is one instruction: the first key of CONTRACT.md
section 3 in the high bits, below it the touch, or the flipped flat id where the touch does not settle ties. Scores that
move by themselves have a part that belongs to the expert (`_used`) and one that `_refresh` adds: the pass flag, the
order of the layers, the age, or a fresh draw.

All kernels live in this one file because the compile cache notices changes of a function's own file only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.loops import compiled
from specmd_jax.schedule.demand import Demand
from specmd_jax.types import NEVER

PARTS = (
    "touch",
    "load",
    "count",
    "resident_count",
    "decay",
    "rate",
    "segment",
    "mass",
    "next_use",
    "hash",
    "id",
    "ascending",
    "given",
    "given_all",
)
"""What the expert's own part of the score is made of (`policies.base.Curve.own`). The last two come from
`engines.offline_scores`: at each visit, of the experts of its layer, or of all."""
TOUCH, LOAD, COUNT, RESIDENT_COUNT, DECAY, RATE, SEGMENT, MASS, NEXT_USE, HASH, ID, ASCENDING, GIVEN, GIVEN_ALL = range(
    len(PARTS)
)
NOT_GIVEN = np.zeros((1, 0), np.int32)
LEAST_GIVEN = -(1 << 30)

LOW_BITS, SEGMENT_ID_BITS = 31, 28
LOW = (1 << LOW_BITS) - 1
SEGMENT_LOW = (1 << SEGMENT_ID_BITS) - 1
PROTECTED = 1 << 60
CURRENT = 1 << 61  # above everything else in a score
PINNED = (1 << 62) + (1 << 61)
NOTHING = PINNED  # not a candidate; adding the part of a layer does not overflow
SMALLEST_NORMAL = np.float32(2.0**-126)


class Code(NamedTuple):
    """A policy, as the kernels read it."""

    own: int  # one of the constants above
    marks: bool  # experts used in this pass stay before all others
    bypass: bool
    seed: int
    decay: np.float32


class Memory(NamedTuple):
    """What a replay remembers of each expert, whatever the policy: [N] each, N = L * E."""

    base: npt.NDArray[np.int64]  # the expert's own part of the score
    uses: npt.NDArray[np.int32]
    seen: npt.NDArray[np.int32]  # visit of the last use
    mark: npt.NDArray[np.int32]  # pass of the last use
    value: npt.NDArray[np.float32]
    value_bits: npt.NDArray[np.int32]  # the same memory as integers: for floats >= 0 in the same order
    ratio: npt.NDArray[np.float32]
    ratio_bits: npt.NDArray[np.int32]


def memory(experts: int) -> Memory:
    """Nothing used yet."""
    base, mark = np.zeros(experts, np.int64), np.full(experts, -1, np.int32)
    count, seen = np.zeros(experts, np.int32), np.zeros(experts, np.int32)
    value, ratio = np.zeros(experts, np.float32), np.zeros(experts, np.float32)
    return Memory(base, count, seen, mark, value, value.view(np.int32), ratio, ratio.view(np.int32))


@compiled
def _hash31(seed, visit, flat):  # policies.hashing.hash31, to the bit
    mask = np.uint64(0xFFFFFFFF)
    x = np.uint64(seed) * np.uint64(0x9E3779B1) + np.uint64(visit) * np.uint64(0x85EBCA77)
    x = (x + np.uint64(flat) * np.uint64(0xC2B2AE3D)) & mask
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & mask
    return np.int64((x ^ (x >> np.uint64(16))) >> np.uint64(1))


@compiled
def _forget(memory):
    for f in range(memory.base.size):
        memory.base[f] = 0
        memory.uses[f] = 0
        memory.seen[f] = 0
        memory.mark[f] = -1
        memory.value[f] = 0


@compiled
def _used(own, f, touch, mass, next_use, visit, pass_id, loaded, memory):
    """Records one use of expert `f`: its part of the score."""
    base, count, value = memory.base, memory.uses, memory.value
    memory.mark[f] = pass_id
    own_part = np.int64(touch)
    if own == COUNT:
        count[f] += 1
        own_part |= np.int64(count[f]) << LOW_BITS
    elif own == RESIDENT_COUNT:
        count[f] = 1 if loaded else count[f] + 1
        own_part |= np.int64(count[f]) << LOW_BITS
    elif own == LOAD:
        own_part = own_part if loaded else base[f]
    elif own == DECAY:  # `_fade` makes the score
        value[f] += np.float32(1)
    elif own == RATE:  # `_refresh` makes the score
        count[f] += 1
        memory.seen[f] = visit
    elif own == SEGMENT:
        own_part = (own_part << SEGMENT_ID_BITS) | (SEGMENT_LOW - f) | (0 if loaded else PROTECTED)
    elif own == MASS:
        value[f] += mass
        own_part = (np.int64(memory.value_bits[f]) << LOW_BITS) + (LOW - f)
    elif own == NEXT_USE:
        own_part = (np.int64(NEVER - next_use) << LOW_BITS) | (LOW - f)
    elif own == ID:
        own_part = np.int64(LOW - f)
    elif own == ASCENDING:
        own_part = np.int64(f)
    base[f] = own_part


@compiled
def _fade(begin, end, decay, memory):
    """`lfu_decay` at a visit of the layer of experts begin..end-1; tiny values become 0, as XLA on a CPU has it."""
    for f in range(begin, end):
        faded = memory.value[f] * decay
        memory.value[f] = faded if faded >= SMALLEST_NORMAL else np.float32(0)
        memory.base[f] = (np.int64(memory.value_bits[f]) << LOW_BITS) | (memory.base[f] & LOW)


@compiled
def _give(begin, given, memory):
    """Gives the scores of the experts of a layer, the first of which is `begin`, at its visit."""
    for e in range(given.size):
        f = begin + e
        memory.base[f] = ((np.int64(given[e]) - LEAST_GIVEN) << LOW_BITS) | (memory.base[f] & LOW)


@compiled
def _refresh(own, marks, seed, visit, pass_id, first, last, experts, order, given, memory, out):
    """Whole scores of the experts of layers first..last-1, as of now; `order` [L] is the part of each layer."""
    for layer in range(first, last):
        part = order[layer]
        # slices, so that loops count from 0: one that must allow for negative indices is not vectorised
        row = slice(layer * experts, (layer + 1) * experts)
        line, base = out[row], memory.base[row]
        if own == HASH:
            for e in range(experts):
                f = layer * experts + e
                line[e] = (_hash31(seed, visit, f) << LOW_BITS) | (LOW - f)
        elif own == GIVEN_ALL:
            scores = given[row]
            for e in range(experts):
                line[e] = ((np.int64(scores[e]) - LEAST_GIVEN) << LOW_BITS) | base[e]
        elif own == RATE:
            count, seen, ratio, bits = memory.uses[row], memory.seen[row], memory.ratio[row], memory.ratio_bits[row]
            for e in range(experts):
                ratio[e] = np.float32(count[e]) / np.float32(visit - seen[e] + 1)
            for e in range(experts):
                line[e] = (np.int64(bits[e]) << LOW_BITS) | base[e]
        elif marks:
            mark = memory.mark[row]
            for e in range(experts):
                line[e] = base[e] + part + (CURRENT if mark[e] >= pass_id else 0)
        else:
            for e in range(experts):
                line[e] = base[e] + part


@compiled
def _add_residents(total, position, experts, sign):
    for f in range(position.size):
        if position[f] > 0:
            total[f // experts, position[f]] += sign


@compiled
def _stack(demand, first_visit, given, layers, experts, by_layer, code, moving, order, state):
    """Makes the pass of `stack`; `moving`: scores change without a use."""
    memory, held, score, depth, position, began, now, out = state
    limit = held.shape[1] - 2
    start, flat, mass, next_use, layer_of, pass_of, clock, starts_pass, reset, counted = demand
    own, marks, bypass, seed, decay = code
    base = memory.base
    counting = False
    for v in range(layer_of.size):
        layer, pass_id = layer_of[v], pass_of[v]
        if counting and (reset[v] or not counted[v]):
            counting = False
            _add_residents(out[2], position, experts, 1)
        if reset[v]:
            _forget(memory)
            for pool in range(depth.size):
                depth[pool] = 0
            for f in range(position.size):
                position[f] = 0
        if counted[v] and not counting:
            counting = True
            _add_residents(out[2], position, experts, -1)
        if starts_pass[v] or reset[v]:
            for f in range(position.size):
                began[f] = position[f]
        begin, end = start[v], start[v + 1]
        pool = layer if by_layer else 0
        who, line = held[pool], score[pool]  # position p holds expert who[p], whose score is line[p]

        for i in range(begin, end):
            f = flat[i]
            if counted[v]:
                at = position[f] if position[f] > 0 else limit + 1
                out[0, layer, at] += 1
                if 0 < began[f] < at:
                    out[1, layer, began[f]] += 1
                    out[1, layer, at] -= 1
            _used(own, f, clock[v] + i - begin, mass[i], next_use[i], first_visit + v, pass_id, True, memory)
        if own == DECAY:
            _fade(layer * experts, (layer + 1) * experts, decay, memory)
        if own == GIVEN:
            _give(layer * experts, given[v], memory)
        if own in (DECAY, GIVEN):
            for f in range(layer * experts, (layer + 1) * experts):
                line[position[f]] = base[f]  # position 0 is nobody's
        if begin == end:
            continue

        scores = base
        if moving:
            scores = now
            first, last = (layer, layer + 1) if by_layer else (0, layers)
            scored = given[v if own == GIVEN_ALL else 0]
            _refresh(
                own, marks, seed, first_visit + v, pass_id, first, last, experts, order[layer], scored, memory, now
            )
            for p in range(1, depth[pool] + 1):
                line[p] = now[who[p]]
        for i in range(begin, end):
            line[position[flat[i]]] = scores[flat[i]] if bypass else PINNED
        for i in range(begin, end):
            carried = flat[i]
            carried_score = scores[carried] if bypass else PINNED
            home = position[carried] if position[carried] > 0 else depth[pool] + 1
            for p in range(1, home):
                here = line[p]
                if here < carried_score:
                    lower = who[p]
                    who[p], line[p], position[carried] = carried, carried_score, p
                    carried, carried_score = lower, here
            if home <= limit:
                who[home], line[home], position[carried] = carried, carried_score, home
                depth[pool] = max(depth[pool], home)
            else:
                position[carried] = 0
        for i in range(begin, end):
            line[position[flat[i]]] = scores[flat[i]]
    if counting:
        _add_residents(out[2], position, experts, 1)


class Stack(NamedTuple):
    """Where a pass over the stacks stands; written in place."""

    memory: Memory
    held: npt.NDArray[np.int32]  # [pools, limit + 2] flat id at each position of the stack, from 1
    score: npt.NDArray[np.int64]  # [pools, limit + 2] its keep-score
    depth: npt.NDArray[np.int64]  # [pools] positions in use
    position: npt.NDArray[np.int32]  # [N] p >= 1: resident at capacities >= p; 0: nowhere
    began: npt.NDArray[np.int32]  # [N] the same when this pass of the model began
    now: npt.NDArray[np.int64]  # [N] scratch
    sums: npt.NDArray[np.int64]
    """[3, L, limit + 2], to be summed up to a capacity along the last axis: hits, collisions, and residents gained
    over the counted visits (resets apart)."""


def new_stack(layers: int, experts: int, by_layer: bool, limit: int) -> Stack:
    """Makes empty stacks, one per pool (`by_layer`: a pool per layer), that tell capacities 1..`limit` apart."""
    n, pools = layers * experts, layers if by_layer else 1
    return Stack(
        memory=memory(n),
        held=np.zeros((pools, limit + 2), np.int32),
        score=np.zeros((pools, limit + 2), np.int64),
        depth=np.zeros(pools, np.int64),
        position=np.zeros(n, np.int32),
        began=np.zeros(n, np.int32),
        now=np.zeros(n, np.int64),
        sums=np.zeros((3, layers, limit + 2), np.int64),
    )


def stack(
    demand: Demand,
    first_visit: int,
    given: npt.NDArray[np.int32],
    layers: int,
    experts: int,
    by_layer: bool,
    code: Code,
    order: npt.NDArray[np.int64],
    state: Stack,
) -> None:
    """Replays all capacities 1..limit (experts per pool) in one pass. See `curves.curves` for the idea.

    Args:
      demand: the visits that follow those that `state` has seen.
      first_visit: the number of its first one.
      given: [V, E] or [V, L * E] scores, for a code that reads them; else `NOT_GIVEN`.
      code: a policy whose score does not depend on who is resident.
      order: [L, L]: row l is each layer's part of the score while layer l is visited.
      state: where the pass stands; changed in place.
    """
    moving = code.marks or code.own in (HASH, RATE, GIVEN_ALL) or bool(order.any())
    _stack(demand, first_visit, given, layers, experts, by_layer, code, moving, order, state)


@compiled
def _lowest(line):
    lowest = NOTHING
    for e in range(line.size):
        lowest = min(lowest, line[e])
    return lowest


@compiled
def _find(line, score):
    for e in range(line.size):
        if line[e] == score:
            return e
    return -1


@compiled
def _unlink(f, before, after):
    after[before[f]] = after[f]
    before[after[f]] = before[f]
    after[f] = -1


@compiled
def _direct(demand, first_visit, given, pools, code, order, state):
    """Makes the replay of `direct`."""
    layers, experts, by_layer, units, budget, protected, hold = pools
    memory, cache, ring, still, out = state
    start, flat, mass, next_use, layer_of, pass_of, clock, starts_pass, reset, counted = demand
    own, marks, bypass, seed, decay = code
    resident, used, evicted_in, key, live, best, total, dirty = cache
    before, after, shielded = ring
    base = memory.base
    n, moving = resident.size, own in (HASH, RATE, GIVEN_ALL)
    rows = live.reshape((layers, experts))
    for v in range(layer_of.size):
        layer, pass_id = layer_of[v], pass_of[v]
        begin, end = start[v], start[v + 1]
        pool = layer if by_layer else 0
        if reset[v]:
            _forget(memory)
            for f in range(n):
                resident[f], evicted_in[f], live[f], after[f] = False, -1, NOTHING, -1
            for row in range(layers):
                dirty[row] = True
            for p in range(used.size):
                used[p], shielded[p] = 0, 0
                before[n + p], after[n + p] = n + p, n + p
        if marks and starts_pass[v]:  # nobody has been used in this pass yet
            for f in range(n):
                key[f] = base[f]
                live[f] = base[f] if resident[f] else NOTHING
            for row in range(layers):
                dirty[row] = True

        for i in range(begin, end):
            f = flat[i]
            hit = resident[f]
            if counted[v]:
                out[0, layer] += 1
                if hit:
                    out[1, layer] += 1
                else:
                    out[2, layer] += 1
                    out[3, layer] += evicted_in[f] == pass_id
            if not hit:
                resident[f] = True
                used[pool] += units[layer]
            _used(own, f, clock[v] + i - begin, mass[i], next_use[i], first_visit + v, pass_id, not hit, memory)
            if own == SEGMENT and hit:
                if after[f] >= 0:
                    _unlink(f, before, after)
                else:
                    shielded[pool] += units[layer]
                before[f], after[f] = before[n + pool], n + pool
                after[before[f]] = f
                before[n + pool] = f
        if own == DECAY:
            _fade(layer * experts, (layer + 1) * experts, decay, memory)
        if own == GIVEN:
            _give(layer * experts, given[v], memory)
        if own in (DECAY, GIVEN):
            for f in range(layer * experts, (layer + 1) * experts):
                key[f] = base[f]
                live[f] = base[f] if resident[f] else NOTHING
        if own == SEGMENT:
            while shielded[pool] > protected[pool]:
                f = after[n + pool]
                row = f // experts
                _unlink(f, before, after)
                shielded[pool] -= units[row]
                base[f] = (np.int64(clock[v] + end - begin) << SEGMENT_ID_BITS) | (SEGMENT_LOW - f)
                key[f] = base[f]
                live[f] = base[f]
                dirty[row] = True

        free = bypass or ((end - begin) * units[layer] > budget[pool] and not hold)
        for i in range(begin, end):
            f = flat[i]
            key[f] = base[f] + (CURRENT if marks else 0)
            live[f] = key[f] if free else NOTHING
        dirty[layer] = True

        if used[pool] > budget[pool]:
            first, last = (layer, layer + 1) if by_layer else (0, layers)
            if moving:
                scored = given[v if own == GIVEN_ALL else 0]
                _refresh(own, False, seed, first_visit + v, pass_id, first, last, experts, still, scored, memory, key)
                for f in range(first * experts, last * experts):
                    live[f] = key[f] if resident[f] else NOTHING
                if not free:
                    for i in range(begin, end):
                        live[flat[i]] = NOTHING
                for row in range(first, last):
                    dirty[row] = True
            parts = order[layer]
            for row in range(first, last):
                if dirty[row]:
                    best[row] = _lowest(rows[row])
                    dirty[row] = False
                total[row] = best[row] + parts[row]
            among = total[first:last]
            while used[pool] > budget[pool]:
                lowest = _lowest(among)
                if lowest >= NOTHING:
                    break
                row = first + _find(among, lowest)
                f = row * experts + _find(rows[row], best[row])
                resident[f], live[f], evicted_in[f] = False, NOTHING, pass_id
                used[pool] -= units[row]
                if counted[v]:
                    out[4, row] += 1
                if own == SEGMENT and after[f] >= 0:
                    _unlink(f, before, after)
                    shielded[pool] -= units[row]
                best[row] = _lowest(rows[row])
                total[row] = best[row] + parts[row]

        for i in range(begin, end):
            f = flat[i]
            live[f] = key[f] if resident[f] else NOTHING
        dirty[layer] = True


class Direct(NamedTuple):
    """Where the replay of one budget stands; written in place."""

    memory: Memory
    cache: tuple[npt.NDArray[Any], ...]
    ring: tuple[npt.NDArray[np.int64], ...]
    still: npt.NDArray[np.int64]  # [L] zeros
    sums: npt.NDArray[np.int64]  # [5, L]: demand, hits, misses, collisions, evictions


def new_direct(layers: int, experts: int, by_layer: bool) -> Direct:
    """Gives an empty cache (`by_layer`: a pool per layer)."""
    n, pools = layers * experts, layers if by_layer else 1
    cache = (
        np.zeros(n, np.bool_),  # resident
        np.zeros(pools, np.int64),  # units in use
        np.full(n, -1, np.int32),  # pass of the last eviction
        np.zeros(n, np.int64),  # score without the part of the layer
        np.full(n, NOTHING, np.int64),  # the same for those that may leave, else NOTHING
        np.full(layers, NOTHING, np.int64),  # the lowest of these in each layer
        np.full(layers, NOTHING, np.int64),  # with the part of the layer
        np.ones(layers, np.bool_),  # the lowest is to be searched again
    )
    # each pool's protected segment, oldest touch first: a ring of flat ids through n + pool (before, after, units)
    before, after = np.full(n + pools, -1, np.int64), np.full(n + pools, -1, np.int64)
    before[n:] = after[n:] = np.arange(n, n + pools)
    return Direct(
        memory(n),
        cache,
        (before, after, np.zeros(pools, np.int64)),
        np.zeros(layers, np.int64),
        np.zeros((5, layers), np.int64),
    )


class Pools(NamedTuple):
    """What one budget is cut into, and what experts take of it."""

    layers: int
    experts: int
    by_layer: bool  # a pool for each layer, instead of one for all
    units: npt.NDArray[np.int64]  # [L] what an expert takes
    budget: npt.NDArray[np.int64]  # [L] units; without `by_layer` the first entry is the pool
    protected: npt.NDArray[np.int64]  # [L] units of a pool's protected segment (`slru`)
    hold: bool  # an oversize demand stays until the next visit


def direct(
    demand: Demand,
    first_visit: int,
    given: npt.NDArray[np.int32],
    pools: Pools,
    code: Code,
    order: npt.NDArray[np.int64],
    state: Direct,
) -> None:
    """Replays one budget, with experts of any sizes and every policy.

    Arguments are as for `stack`, but the score may depend on who is resident.
    """
    _direct(demand, first_visit, given, pools, code, order, state)
