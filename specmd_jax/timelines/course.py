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


class Load(NamedTuple):
    """What a visit asks for, in seconds by expert; in the order in which things of equal time go."""

    copies: Mapping[int, float]  # demand copies, in their order on the link
    runs: Mapping[int, float]  # on the device
    hosted: Mapping[int, float]  # on the host
    dense_s: float
    late: int = -1  # whose earlier copy ends when the link is free


class Course(NamedTuple):
    """When it happens."""

    copies: dict[int, Piece]
    runs: dict[int, Piece]
    hosted: dict[int, Piece]
    waits: dict[int, Piece]  # the device waits for this expert; together they are the stall
    dense: Piece  # its end is the next gate
    late_s: float  # the stall by late hits, ...
    miss_s: float  # ... by the misses' own copies, ...
    busy_s: float  # ... and by finding the link busy
    link_s: float  # the link is free again

    @property
    def stall_s(self) -> float:
        return self.late_s + self.miss_s + self.busy_s


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
      link_s: when the link is free of what began before.
    """
    free_s = max(gate_s, link_s)
    copies, hosted = one_by_one(load.copies, free_s), one_by_one(load.hosted, gate_s)
    late = {load.late: free_s} if load.late >= 0 else {}

    def done_s(ready_s: Mapping[int, float]) -> float:
        return _end_s([*as_ready(load.runs, ready_s, gate_s).values(), *hosted.values()], gate_s)

    runs = as_ready(load.runs, late | _ends(copies), gate_s)
    done = [
        done_s({}),
        done_s(late),
        done_s(late | _ends(one_by_one(load.copies, gate_s))),
        _end_s([*runs.values(), *hosted.values()], gate_s),
    ]
    late_s, miss_s, busy_s = (after - before for before, after in itertools.pairwise(done))
    return Course(
        copies=copies,
        runs=runs,
        hosted=hosted,
        waits=_waits(runs, gate_s, done[3] - done[0]),
        dense=(done[3], done[3] + load.dense_s),
        late_s=late_s,
        miss_s=miss_s,
        busy_s=busy_s,
        link_s=_end_s(copies.values(), link_s),
    )


def _waits(runs: Mapping[int, Piece], gate_s: float, stall_s: float) -> dict[int, Piece]:
    """Gives the pauses between runs that add up to the stall: the last ones. Earlier ones are no stall where the host
    works for longer than the device does.
    """
    pauses, now_s = {}, gate_s
    for expert, (begin_s, end_s) in runs.items():
        if begin_s > now_s:
            pauses[expert] = now_s, begin_s
        now_s = end_s
    found = {}
    for expert, (begin_s, end_s) in reversed(pauses.items()):
        if stall_s <= 0:
            break
        found[expert] = max(begin_s, end_s - stall_s), end_s
        stall_s -= end_s - begin_s
    return dict(reversed(found.items()))


def _ends(pieces: Mapping[int, Piece]) -> dict[int, float]:
    return {expert: end_s for expert, (_, end_s) in pieces.items()}


def _end_s(pieces: Iterable[Piece], at_least_s: float) -> float:
    return max((end_s for _, end_s in pieces), default=at_least_s)
