"""How one visit goes, piece by piece: CONTRACT.md sections 5 and 6 in plain numbers (float64).

The replay keeps what a visit comes to (`replay.timing`, `replay.storage`); this says when each read, copy and
computation begins and ends. A further track is a further field of `Load` and of `Course`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from specmd_jax.timelines.sharing import Piece, Task, copied_s, side_by_side

ROUNDING_S = 1e-12
"""What sums of float64 may be off by."""
THE_HOST = -1
"""Stands for an expert where the device waits for the host."""


class Host(NamedTuple):
    """What else decides how the host's work goes; by default it disturbs nothing."""

    handover_s: float = 0.0  # to the host and back, once a visit
    slow: float = 0.0  # by how much longer link and host take while both work
    left: float = 1.0  # the share of the link's rate that prefetch copies have beside the host


class Load(NamedTuple):
    """What a visit asks for, in seconds by expert; in the order in which things of equal time go."""

    copies: Mapping[int, float]  # demand copies, in their order on the link
    runs: Mapping[int, float]  # on the device
    hosted: Mapping[int, float]  # on the host
    dense_s: float
    late: int = -1  # whose earlier copy ends when the link is free
    host: Host = Host()
    adds: float = 0.0  # 0: what is there runs beside the copies; 1: when all is there; or in between
    reads: Mapping[int, float] = MappingProxyType({})  # from storage, in their order; each is then copied or hosted
    arriving: int = -1  # who is being read until storage is free


class Clock(NamedTuple):
    """When link and host are done with so much work, both disturbed by the other: seconds behind the gate."""

    host_s: float  # the host's work, undisturbed, ...
    demand_s: float  # ... and the link's, prefetch copies excepted
    host: Host

    def link_s(self, work_s: float) -> float:
        own_s, ahead_s = min(work_s, self.demand_s), max(work_s - self.demand_s, 0.0)
        found_s = own_s + self.host.slow * min(own_s, self.host_s) + ahead_s
        if ahead_s <= 0 or self.host.left >= 1:
            return found_s
        # prefetch copies have what the host leaves, until it is done
        waits_s = (1 - self.host.left) * max(self.host_s - self.demand_s, 0.0)
        return found_s + (min(ahead_s * (1 / self.host.left - 1), waits_s) if self.host.left > 0 else waits_s)

    def computed_s(self, work_s: float) -> float:
        return work_s + self.host.slow * min(work_s, self.demand_s)


class Wait(NamedTuple):
    """The device waits for an expert, or for `THE_HOST`."""

    expert: int
    start_s: float
    end_s: float


class Course(NamedTuple):
    """When it happens."""

    copies: dict[int, Piece]
    runs: dict[int, Piece]
    hosted: dict[int, Piece]
    handover: Piece  # behind the host's work
    waits: list[Wait]  # together they are the stall
    dense: Piece  # its end is that of the visit
    late_s: float  # the stall by late hits, ...
    miss_s: float  # ... by the misses' own copies, ...
    busy_s: float  # ... and by finding the link busy
    found_s: float  # the link is free of what began before, ...
    link_s: float  # ... and of the demand copies
    gate_s: float
    clock: Clock
    reads: dict[int, Piece]
    storage_s: float  # storage is free behind them
    waits_s: float  # the stall by reads

    @property
    def stall_s(self) -> float:
        return self.late_s + self.miss_s + self.busy_s + self.waits_s

    def ahead(self, seconds: Iterable[float]) -> list[Piece]:
        """Gives prefetch copies of so many seconds each, one after the other behind the demand copies."""
        ends = itertools.accumulate(seconds, initial=self.clock.demand_s)
        return list(itertools.pairwise([self.gate_s + self.clock.link_s(work_s) for work_s in ends]))

    def read_only(self, seconds: Iterable[float]) -> list[Piece]:
        """Gives reads ahead of so many seconds each that go no further, one after the other behind the demand's."""
        ends = itertools.accumulate(seconds, initial=max(self.storage_s, self.gate_s))
        return list(itertools.pairwise(ends))

    def read_ahead(self, seconds: Iterable[tuple[float | None, float]]) -> list[tuple[Piece | None, Piece]]:
        """Gives prefetch copies behind storage: the read of each, if there is one, and the copy.

        Args:
          seconds: what the read takes (None: it is in host memory), and the copy.
        """
        found: list[tuple[Piece | None, Piece]] = []
        host = list(self.hosted.values())
        now_s, storage_s = max(self.link_s, self.gate_s), self.storage_s
        for read_s, copy_s in seconds:
            read = None
            if read_s is not None:
                begin_s = max(now_s, storage_s)
                read = begin_s, begin_s + read_s
                now_s = storage_s = read[1]
            end_s = copied_s(now_s, copy_s, host, self.clock.host.left)
            found.append((read, (now_s, end_s)))
            now_s = end_s
        return found


def one_by_one(seconds: Mapping[int, float], from_s: float) -> dict[int, Piece]:
    """Gives what goes one after the other, without a pause."""
    pieces, now_s = {}, from_s
    for expert, took_s in seconds.items():
        pieces[expert] = now_s, now_s + took_s
        now_s += took_s
    return pieces


def as_ready(seconds: Mapping[int, float], ready_s: Mapping[int, float], from_s: float) -> dict[int, Piece]:
    """Gives what goes one after the other in the order of getting ready; who is not named is ready at once."""
    pieces, now_s = {}, from_s
    for expert in sorted(seconds, key=lambda e: ready_s.get(e, from_s)):  # stable: ties as they are listed
        begin_s = max(now_s, ready_s.get(expert, from_s))
        now_s = begin_s + seconds[expert]
        pieces[expert] = begin_s, now_s
    return pieces


def course(load: Load, gate_s: float, link_s: float, storage_s: float | None = None) -> Course:
    """Gives one visit from its gate to its end.

    Args:
      gate_s: when the visit's gate is known.
      link_s: when the link is free of what began before, if the host does not slow it down.
      storage_s: when storage is free of what began before; None: everything is in host memory. If link and storage are
        both busy, storage reads what is then copied.
    """
    busy_s = max(link_s - gate_s, 0.0)
    on_link, at_once = one_by_one(load.copies, busy_s), one_by_one(load.copies, 0.0)
    late = {load.late: busy_s} if load.late >= 0 else {}
    after_late_s = busy_s if late else 0.0
    none = dict.fromkeys(load.copies, 0.0)
    in_memory = _undisturbed(load, _end_s(on_link.values(), busy_s), late | _ends(on_link))
    done = [
        _undisturbed(load, 0.0, none).done_s,
        _undisturbed(load, after_late_s, none | late).done_s,
        _undisturbed(load, _end_s(at_once.values(), after_late_s), late | _ends(at_once)).done_s,
        in_memory.done_s,
    ]
    done = list(itertools.accumulate(done, max))  # what rounding may undo
    late_s, miss_s, wait_s = (after - before for before, after in itertools.pairwise(done))
    clock = Clock(sum(load.hosted.values()), _end_s(on_link.values(), busy_s), load.host)
    if storage_s is None:
        actual, done_s, reads = in_memory, done[-1], {}
        found_s = clock.link_s(busy_s)
        copies = {e: (clock.link_s(begin_s), clock.link_s(end_s)) for e, (begin_s, end_s) in on_link.items()}
        hosted = {
            e: (clock.computed_s(begin_s), clock.computed_s(end_s))
            for e, (begin_s, end_s) in one_by_one(load.hosted, 0.0).items()
        }
    else:
        storage_s = max(storage_s - gate_s, 0.0)
        reads = one_by_one(load.reads, storage_s)
        ready_s = _ends(reads) | ({load.arriving: storage_s} if load.arriving >= 0 else {})
        found_s, copies, hosted = _behind_reads(load, busy_s, storage_s, ready_s)
        arrivals = ({load.late: found_s} if late else {}) | _ends(copies)
        actual = _Walk(load, arrivals, _end_s(hosted.values(), 0.0))
        done_s = max(actual.done_s, done[0])
    runs, copies, hosted, reads = (_from(gate_s, pieces) for pieces in (actual.runs, copies, hosted, reads))
    host_end_s, ended_s = _end_s(hosted.values(), gate_s), _end_s(runs.values(), gate_s + done_s)
    found_s = gate_s + found_s if busy_s > 0 else link_s
    return Course(
        copies=copies,
        runs=runs,
        hosted=hosted,
        handover=(host_end_s, host_end_s + (load.host.handover_s if hosted else 0.0)),
        waits=_waits(runs, gate_s, ended_s, done_s - done[0], actual.last if load.adds else None),
        dense=(ended_s, ended_s + load.dense_s),
        late_s=late_s,
        miss_s=miss_s,
        busy_s=wait_s,
        found_s=found_s,
        link_s=_end_s(copies.values(), found_s),
        gate_s=gate_s,
        clock=clock,
        reads=reads,
        storage_s=_end_s(reads.values(), gate_s + (storage_s or 0.0)),
        waits_s=done_s - done[-1],
    )


def _behind_reads(
    load: Load, busy_s: float, storage_s: float, ready_s: Mapping[int, float]
) -> tuple[float, dict[int, Piece], dict[int, Piece]]:
    """Lets the link and the host wait for reads, in seconds from the gate.

    Args:
      busy_s, storage_s: until link and storage are free of what began before.
      ready_s: when each that is read is in host memory.

    Returns:
      When the link is free of what began before, the copies, and what runs on the host.
    """
    begins_s = min(storage_s, busy_s)
    flight = [Task(begins_s, busy_s - begins_s)] if busy_s > 0 else []
    on_host = sorted(load.hosted, key=lambda e: ready_s.get(e, 0.0))  # stable: ties as they are listed
    link, host = side_by_side(
        [*flight, *(Task(ready_s.get(e, 0.0), took_s) for e, took_s in load.copies.items())],
        [Task(ready_s.get(e, 0.0), load.hosted[e]) for e in on_host],
        load.host.slow,
    )
    found_s = link[0][1] if flight else 0.0
    copies = dict(zip(load.copies, link[len(flight) :], strict=True))
    return found_s, copies, dict(zip(on_host, host, strict=True))


class _Walk:
    """The experts of a visit if these arrive then, and the host ends its work then, in seconds from the gate."""

    def __init__(self, load: Load, arrival_s: Mapping[int, float], host_s: float) -> None:
        ended_s = host_s + load.host.handover_s if load.hosted else 0.0
        there_s = max([ended_s, *arrival_s.values()])
        self.last = next((expert for expert, at_s in arrival_s.items() if at_s == there_s), THE_HOST)
        beside = as_ready(load.runs, arrival_s, 0.0)
        order = {expert: load.runs[expert] for expert in beside}
        after, share = one_by_one(order, there_s), load.adds
        self.runs, now_s = {}, 0.0
        for expert, took_s in order.items():
            begin_s = max(now_s, _between(beside[expert][0], after[expert][0], share))
            now_s = begin_s + took_s
            self.runs[expert] = begin_s, now_s
        done_s = max(_end_s(beside.values(), 0.0), ended_s)
        self.done_s = _between(done_s, there_s + sum(order.values()), share)


def _undisturbed(load: Load, link_s: float, arrivals: Mapping[int, float]) -> _Walk:
    """Gives the walk without reads, if the link has so many seconds of work, and these arrive when so much is done."""
    host_s = sum(load.hosted.values())
    clock = Clock(host_s, link_s, load.host)
    arrival_s = {expert: clock.link_s(work_s) for expert, work_s in arrivals.items()}
    return _Walk(load, arrival_s, clock.computed_s(host_s))


def _waits(runs: Mapping[int, Piece], gate_s: float, done_s: float, stall_s: float, last: int | None) -> list[Wait]:
    """Gives the pauses of the device that add up to the stall: the last ones. Earlier ones are no stall where the host
    works for longer than the device does.

    Args:
      last: what the first run waits for: what arrives last; None: for its own expert.
    """
    pauses, now_s = [], gate_s
    for number, (expert, (begin_s, end_s)) in enumerate(runs.items()):
        pauses.append(Wait(expert if last is None or number else last, now_s, begin_s))
        now_s = end_s
    found: list[Wait] = []
    for wait in reversed([*pauses, Wait(THE_HOST, now_s, done_s)]):
        if stall_s <= ROUNDING_S:
            break
        took_s = wait.end_s - wait.start_s
        if took_s > ROUNDING_S:
            found.append(wait if took_s <= stall_s else wait._replace(start_s=wait.end_s - stall_s))
            stall_s -= took_s
    return found[::-1]


def _between(one: float, other: float, share: float) -> float:
    return one + share * (other - one) if share < 1 else other


def _from(gate_s: float, pieces: Mapping[int, Piece]) -> dict[int, Piece]:
    return {expert: (gate_s + begin_s, gate_s + end_s) for expert, (begin_s, end_s) in pieces.items()}


def _ends(pieces: Mapping[int, Piece]) -> dict[int, float]:
    return {expert: end_s for expert, (_, end_s) in pieces.items()}


def _end_s(pieces: Iterable[Piece], at_least_s: float) -> float:
    return max([at_least_s, *(end_s for _, end_s in pieces)])
