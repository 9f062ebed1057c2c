"""Link and host at work on one memory where both may wait for reads (CONTRACT.md section 6), moment by moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Piece = tuple[float, float]
"""When it may begin, and the work it is, undisturbed."""


class SideBySide:
    """Link and host go through their pieces one after the other, in seconds from the gate.

    Prefetch copies come behind the link's pieces and have a share of its rate beside the host.
    """

    def __init__(self, link: Sequence[Piece], host: Sequence[Piece], speed: float, share: float) -> None:
        self.share = share
        self.copying_s = 0.0  # what the link copies from this visit on, as the replay finds out
        ends: tuple[list[float], list[float]] = ([], [])
        self.worked: tuple[list[Piece], list[Piece]] = ([], [])  # begin and end of each
        now, queues = 0.0, (list(link), list(host))
        while any(queues):
            working = [side for side in (0, 1) if queues[side] and queues[side][0][0] <= now]
            rate = speed if len(working) == 2 else 1.0
            moments = [now + queues[side][0][1] / rate for side in working]
            moments += [queue[0][0] for queue in queues if queue and queue[0][0] > now]
            then = min(moments)
            for side in working:
                if len(self.worked[side]) == len(ends[side]):
                    self.worked[side].append((now, now))
                ready, left = queues[side][0]
                if now + left / rate <= then:
                    queues[side].pop(0)
                    self.worked[side][-1] = (self.worked[side][-1][0], then)
                    ends[side].append(then)
                else:
                    queues[side][0] = (ready, left - (then - now) * rate)
            now = then
        self.link_ends, self.host_ends = ends

    def busy_s(self, side: int) -> float:
        return sum(end - begin for begin, end in self.worked[side])

    def copied_s(self, begin_s: float, copy_s: float) -> float:
        """The end of a prefetch copy that begins then."""
        now = begin_s
        for begin, end in self.worked[1]:
            free = max(0.0, min(begin - now, copy_s))
            now, copy_s = now + free, copy_s - free
            if copy_s <= 0 or now < begin or now >= end:
                continue
            beside = min((end - now) * self.share, copy_s)
            now = end if beside < copy_s or not self.share else now + beside / self.share
            copy_s -= beside
        return now + copy_s


class Waits(NamedTuple):
    """What a visit waits for, in seconds from its gate."""

    ready_s: dict[int, float]  # expert -> when it is in host memory; who is not named is there
    link_s: float = 0.0  # until the link is free of what began before, ...
    storage_s: float = 0.0  # ... which storage reads until then
