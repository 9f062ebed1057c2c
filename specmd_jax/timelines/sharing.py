"""Link and host on one memory, moment by moment, where they may have to wait for reads: CONTRACT.md section 6 in plain
numbers (float64). `replay.sharing` has the same for the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Piece = tuple[float, float]
"""Begin and end, in seconds."""


class Task(NamedTuple):
    """Something to do, in seconds."""

    ready_s: float  # not before that
    work_s: float  # undisturbed


def side_by_side(link: Sequence[Task], host: Sequence[Task], slow: float) -> tuple[list[Piece], list[Piece]]:
    """Lets link and host work, each in the order of its tasks. Both at work take (1 + `slow`) times as long."""
    todo, left_s, now_s = (list(link), list(host)), [0.0, 0.0], 0.0
    begun: list[float | None] = [None, None]
    found: tuple[list[Piece], list[Piece]] = ([], [])
    while any(todo):
        working = [side for side in (0, 1) if todo[side] and todo[side][0].ready_s <= now_s]
        stretch = 1.0 + slow if len(working) == 2 else 1.0
        for side in working:
            if begun[side] is None:
                begun[side], left_s[side] = now_s, todo[side][0].work_s
        ends = {side: now_s + left_s[side] * stretch for side in working}
        waiting = [tasks[0].ready_s for tasks in todo if tasks and tasks[0].ready_s > now_s]
        then_s = min([*ends.values(), *waiting])
        for side, end_s in ends.items():
            left_s[side] = max(left_s[side] - (then_s - now_s) / stretch, 0.0)
            if end_s <= then_s:
                begin_s = begun[side]
                found[side].append((now_s if begin_s is None else begin_s, then_s))
                begun[side] = None
                todo[side].pop(0)
        now_s = then_s
    return found


def copied_s(begin_s: float, copy_s: float, host: Sequence[Piece], left: float) -> float:
    """When a prefetch copy that begins then has been copied, with the share `left` of its rate while the host works."""
    now_s = begin_s
    for host_begin_s, host_end_s in host:
        alone_s = min(max(host_begin_s - now_s, 0.0), copy_s)
        now_s, copy_s = now_s + alone_s, copy_s - alone_s
        if copy_s <= 0:
            break
        if now_s < host_end_s:
            beside_s = (host_end_s - now_s) * left
            if copy_s <= beside_s:
                return now_s + copy_s / left
            now_s, copy_s = host_end_s, copy_s - beside_s
    return now_s + copy_s
