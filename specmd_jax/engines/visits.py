"""The columns that the scan reads, one row per visit, in shapes that similar schedules share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.loops import next_power_of_two
from specmd_jax.policies.base import FUTURES, Policies
from specmd_jax.replay.state import Visit
from specmd_jax.schedule.future import future_mass, wrong_pass
from specmd_jax.types import DECODE, NEVER, Schedule

Ahead = tuple[npt.NDArray[np.float32], bool]
"""Gate mass [L, E] of the first pass behind a stretch of a longer schedule, and whether it begins with a reset."""


def columns(schedule: Schedule, policies: Policies, horizon: int, most: int, ahead: Ahead | None = None) -> Visit:
    """Gives every column (numpy) that these policies read, for visits that demand at most `most` experts; where routing
    changes what they demand, for all of them.
    """
    if policies.routing is not None:
        most = schedule.experts
    needs = policies.prefetch.needs if policies.prefetch is not None else None
    future = None
    if needs in FUTURES:
        future = future_mass(schedule, horizon, ahead)
        if needs == "shuffled":
            future = wrong_pass(schedule, future)
    found: dict[str, Any] = dict(
        index=np.arange(schedule.first_visit, schedule.first_visit + schedule.visits, dtype=np.int32),
        layer=schedule.layer,
        pass_id=schedule.pass_id,
        tokens=schedule.tokens,
        decode=schedule.phase == DECODE,
        starts_pass=schedule.starts_pass,
        ends_layer=schedule.ends_layer,
        reset=schedule.reset,
        counted=schedule.counted,
        count=schedule.count,
        mass=schedule.mass,
        rank=schedule.rank,
        next_use=schedule.next_use,
        by_mass=widened(schedule.by_mass, min(schedule.experts, next_power_of_two(most))),
        ahead=schedule.ahead if needs == "ahead" else None,
        future=future,
        logits=schedule.logits if policies.needs_logits else None,
        drafting_s=schedule.drafting_s,
        turns=schedule.turns,
    )
    return Visit(**found)


def padded(visits: Visit, rows: int) -> Visit:
    """Adds visits that demand nothing, end nothing and count for nothing."""
    fill = {"rank": -1, "by_mass": -1, "next_use": NEVER, "logits": np.nan}

    def pad(name: str, column: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        if column is None:
            return None
        return np.concatenate([column, np.full((rows, *column.shape[1:]), fill.get(name, 0), column.dtype)])

    return Visit(**{name: pad(name, column) for name, column in visits._asdict().items()})  # pyright: ignore[reportArgumentType]


def widened(by_mass: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.int32]:
    """Pads the list of demanded experts, so that schedules of similar demand share a compile."""
    return np.pad(by_mass, ((0, 0), (0, width - by_mass.shape[1])), constant_values=-1)
