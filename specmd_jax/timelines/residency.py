"""`residency`: which experts are in the cache, pass by pass, and what became of those that were asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.replay.totals import DROPPED, FETCHED, HOST, LATE, NOT_DEMANDED, PREFETCHED, REUSED, SUBSTITUTED
from specmd_jax.setting import Setting, make_setting
from specmd_jax.timelines.record import Stretch, replayed
from specmd_jax.trace import as_trace
from specmd_jax.trace.door import Source
from specmd_jax.trace.stream import TraceFile

PASSES = 256
"""How many passes are looked at unless told otherwise."""
STAYS = 40_000
"""Stays that are kept at most: those of as many first passes as have no more."""

STATES = ("absent", "kept", "copied early", "hit", "hit, was copied early", "miss", "not copied")
"""What an expert can be in a pass. Kept: there at the end, not asked for; so is what was copied early in this pass. The
others were asked for; not copied: dropped, replaced by another or run on the host.
"""
ABSENT, KEPT, EARLY, HIT, EARLY_HIT, MISS, NOT_COPIED = range(len(STATES))
_OF_OUTCOME = {
    NOT_DEMANDED: ABSENT,
    REUSED: HIT,
    PREFETCHED: EARLY_HIT,
    LATE: EARLY_HIT,
    FETCHED: MISS,
    DROPPED: NOT_COPIED,
    SUBSTITUTED: NOT_COPIED,
    HOST: NOT_COPIED,
}


class Stay(NamedTuple):
    """Passes, one after the other, in which an expert is in the same state."""

    layer: int
    expert: int
    first: int  # pass
    last: int
    state: int  # place in STATES, never ABSENT


class Residency(NamedTuple):
    """Some passes of a replay."""

    first_pass: int
    state: npt.NDArray[np.int8]  # [P, L, E] places in STATES
    passes: int  # of the whole replay

    def stays(self, most: int = STAYS) -> tuple[list[Stay], int]:
        """Gives the stays in order of layer, expert and pass, and how many of the passes they are of: as many first
        ones as have at most `most` stays, one at least.
        """
        begins = np.ones(self.state.shape, bool)
        begins[1:] = self.state[1:] != self.state[:-1]
        begins &= self.state != ABSENT
        running = np.cumsum(begins.sum(axis=(1, 2)))
        shown = max(1, int(np.searchsorted(running, most, side="right")))
        state = self.state[:shown]
        ends = np.ones(state.shape, bool)
        ends[:-1] = state[1:] != state[:-1]
        ends &= state != ABSENT

        def places(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
            return np.argwhere(flags.transpose(1, 2, 0))  # [stays, (layer, expert, pass)], in this order

        found = [
            Stay(layer, expert, self.first_pass + first, self.first_pass + last, int(state[first, layer, expert]))
            for (layer, expert, first), (_, _, last) in zip(
                places(begins[:shown]).tolist(), places(ends).tolist(), strict=True
            )
        ]
        return found, shown


def residency(
    trace: Source,
    setting: Setting | None = None,
    /,
    *,
    passes: int = PASSES,
    first_pass: int | None = None,
    **changes: Any,
) -> Residency:
    """Replays `trace` up to some passes, and gives who is in the cache in these.

    Args:
      trace, setting, changes: as for `run`; a trace in memory.
      passes: how many at most.
      first_pass: where they begin; None: at the first one that is counted (`warmup_tokens`, `phase`).

    Raises:
      SpecmdError: as for `run`; a trace that is streamed, or passes that are not there.
    """
    source = as_trace(trace)
    if isinstance(source, TraceFile):
        raise SpecmdError(f"{source.path}: residency takes a trace in memory, expected one of load_trace")
    return _of(replayed(source, make_setting(setting, **changes), passes, first_pass))


def _of(stretch: Stretch) -> Residency:
    """Gives the states of a stretch of visits: of each pass what its visits ask for, and what the last one leaves."""
    schedule = stretch.prepared.schedule
    visits = slice(stretch.begin, stretch.end)
    pass_id, layer = schedule.pass_id[visits], schedule.layer[visits]
    outcome, level = stretch.events.outcome, stretch.events.level
    assert level is not None
    ends = np.flatnonzero(np.append(pass_id[1:] != pass_id[:-1], True))
    there, begins = level[ends] > 0, stretch.begins > 0  # [P, L, E] and [L, E]; level 0: not there
    before = np.concatenate([(stretch.found > 0)[None], there[:-1]])
    before[np.logical_or.reduceat(schedule.reset[visits], np.append(0, ends[:-1] + 1))] = begins
    asked = np.zeros(there.shape, np.int8)
    translated = np.array([_OF_OUTCOME[code] for code in range(len(_OF_OUTCOME))], np.int8)[outcome]
    place = np.searchsorted(pass_id[ends], pass_id)
    np.maximum.at(asked, (place, layer), translated)  # a pass may visit a layer more than once: the dearest counts
    idle = np.where(there, np.where(before, KEPT, EARLY), ABSENT)
    state = np.where(asked != ABSENT, asked, idle).astype(np.int8)
    return Residency(int(pass_id[0]), state, int(schedule.pass_id[-1]) + 1)
