"""How one visit goes, piece by piece: CONTRACT.md section 5 in plain numbers (float64).

The replay keeps what a visit comes to (`replay.timing`); this says when each copy and each computation begins and ends.
A further track, such as a second link, is a further field of `Load` and of `Course`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Piece = tuple[float, float]
"""Begin and end, in seconds."""
FOR_HOST = -2
"""Among experts that the device waits for: what the host computes."""


class Beside(NamedTuple):
    """How the host's work and the link slow each other down, as they share the host's memory."""

    slow: float = 0.0  # by how much longer both take while both work
    left: float = 1.0  # the share of the link's rate that prefetch copies have beside the host
    after_s: float = 0.0  # the way to the host and back


class Load(NamedTuple):
    """What a visit asks for, in seconds by expert; in the order in which things of equal time go."""

    copies: Mapping[int, float]  # demand copies, in their order on the link
    runs: Mapping[int, float]  # on the device
    hosted: Mapping[int, float]  # on the host
    dense_s: float
    late: int = -1  # whose earlier copy ends when the link is free
    adds: float = 0.0  # 0: the device begins at once; 1: when everything else is there; or in between
    beside: Beside = Beside()


class Course(NamedTuple):
    """When it happens."""

    copies: dict[int, Piece]
    runs: dict[int, Piece]
    hosted: dict[int, Piece]
    back: Piece | None  # what the host computed comes back
    waits: dict[int, Piece]  # the device waits for this expert, or for the host (`FOR_HOST`); together the stall
    dense: Piece  # its end is the next gate, but for drafting
    late_s: float  # the stall by late hits, ...
    miss_s: float  # ... by the misses' own copies, ...
    busy_s: float  # ... and by finding the link busy
    link: Link  # behind the demand copies

    @property
    def stall_s(self) -> float:
        return self.late_s + self.miss_s + self.busy_s


class Link(NamedTuple):
    """The link of a visit: seconds of its own work since the gate, and when they are done."""

    gate_s: float
    host_s: float  # of the host's work, undisturbed
    beside: Beside
    work_s: float  # with the demand copies

    def done_s(self, work_s: float) -> float:
        """When the link has done so much work, of which what is beyond `work_s` are prefetch copies."""
        demand_s = min(work_s, self.work_s)
        ahead_s, host_s = max(work_s - self.work_s, 0.0), max(self.host_s - self.work_s, 0.0)
        lost, left = 1.0 - self.beside.left, self.beside.left
        waits_s = min(ahead_s * lost / left, lost * host_s) if left > 0 else (lost * host_s if ahead_s > 0 else 0.0)
        return self.gate_s + demand_s + self.beside.slow * min(demand_s, self.host_s) + ahead_s + waits_s


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


def course(load: Load, gate_s: float, link_s: float) -> Course:
    """Gives one visit from its gate to the next.

    Args:
      gate_s: when the visit's gate is known.
      link_s: when the link is free of what began before, if the host does not slow it down.
    """
    busy_s, host_s, beside = max(link_s - gate_s, 0.0), sum(load.hosted.values()), load.beside
    work_s = busy_s + sum(load.copies.values())
    link = Link(gate_s, host_s, beside, work_s)

    def arrivals(from_s: float) -> dict[int, float]:
        return {expert: link.done_s(end_s) for expert, (_, end_s) in one_by_one(load.copies, from_s).items()}

    def host_at(own_s: float, link_work_s: float) -> float:
        """When the host has done so much work beside so much of the link's."""
        return gate_s + own_s + beside.slow * min(own_s, link_work_s)

    def done(ready_s: Mapping[int, float], link_work_s: float) -> tuple[dict[int, Piece], float]:
        """The runs, and when all experts are done."""
        back_s = host_at(host_s, link_work_s) + beside.after_s if load.hosted else gate_s
        soon = as_ready(load.runs, ready_s, gate_s)
        soonest_s = max(_end_s(soon.values(), gate_s), back_s)
        if not load.adds:
            return soon, soonest_s
        all_there_s = max([gate_s, back_s, *ready_s.values()])
        late = one_by_one({expert: load.runs[expert] for expert in soon}, all_there_s)
        last_s = all_there_s + sum(load.runs.values())
        runs = {
            e: (_between(soon[e][0], late[e][0], load.adds), _between(soon[e][1], late[e][1], load.adds)) for e in soon
        }
        return runs, _between(soonest_s, last_s, load.adds)

    late = {load.late: link.done_s(busy_s)} if load.late >= 0 else {}
    late_work_s = busy_s if late else 0.0
    actual = arrivals(busy_s)
    runs, end_s = done(late | actual, work_s)
    ends = [
        done({}, 0.0)[1],
        done(late, late_work_s)[1],
        done(late | arrivals(0.0), max(late_work_s, sum(load.copies.values())))[1],
        end_s,
    ]
    ends = list(itertools.accumulate(ends, max))  # what arrives no later than the residents need is no stall
    late_s, miss_s, link_busy_s = (after - before for before, after in itertools.pairwise(ends))
    own = one_by_one(load.hosted, 0.0)
    hosted = {expert: (host_at(begin, work_s), host_at(end, work_s)) for expert, (begin, end) in own.items()}
    host_end_s = host_at(host_s, work_s)
    copies = one_by_one(load.copies, busy_s)
    return Course(
        copies={expert: (link.done_s(begin), link.done_s(end)) for expert, (begin, end) in copies.items()},
        runs=runs,
        hosted=hosted,
        back=(host_end_s, host_end_s + beside.after_s) if load.hosted and beside.after_s else None,
        waits=_waits(runs, gate_s, ends[3], ends[3] - ends[0]),
        dense=(ends[3], ends[3] + load.dense_s),
        late_s=late_s,
        miss_s=miss_s,
        busy_s=link_busy_s,
        link=link,
    )


def _between(soon: float, late: float, share: float) -> float:
    return soon + share * (late - soon)


def _waits(runs: Mapping[int, Piece], gate_s: float, done_s: float, stall_s: float) -> dict[int, Piece]:
    """Gives the pauses of the device that add up to the stall: the last ones. Earlier ones are no stall where the host
    works for longer than the device does.
    """
    pauses, now_s = {}, gate_s
    for expert, (begin_s, end_s) in runs.items():
        if begin_s > now_s:
            pauses[expert] = now_s, begin_s
        now_s = end_s
    if done_s > now_s:
        pauses[FOR_HOST] = now_s, done_s
    found = {}
    for expert, (begin_s, end_s) in reversed(pauses.items()):
        if stall_s <= 0:
            break
        found[expert] = max(begin_s, end_s - stall_s), end_s
        stall_s -= end_s - begin_s
    return dict(reversed(found.items()))


def _end_s(pieces: Iterable[Piece], at_least_s: float) -> float:
    return max((end_s for _, end_s in pieces), default=at_least_s)
