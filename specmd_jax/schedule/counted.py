"""How much of a schedule enters the metrics."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specmd_jax.types import DECODE, PREFILL, Schedule


class Counted(NamedTuple):
    """How much of a schedule is counted."""

    tokens: int
    prompts: int  # requests with prefill passes
    decodes: int  # decode passes
    decoded: int  # their tokens


def counted_of(schedule: Schedule) -> Counted:
    """Gives what of a schedule enters the metrics."""
    passes = schedule.counted & schedule.starts_pass
    prefills = passes & (schedule.phase == PREFILL)
    decodes = passes & (schedule.phase == DECODE)
    return Counted(
        tokens=int(schedule.tokens[passes].sum(dtype=np.int64)),
        prompts=len(np.unique(schedule.request[prefills])),
        decodes=int(decodes.sum()),
        decoded=int(schedule.tokens[decodes].sum(dtype=np.int64)),
    )
