"""How much of a schedule enters the metrics."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specmd_jax.types import DECODE, PREFILL, Schedule


class Counted(NamedTuple):
    """How much of a schedule is counted."""

    tokens: int  # without those whose draft was rejected
    prompts: int  # requests with prefill passes
    decodes: int  # decode passes
    decoded: int  # their tokens
    turns: int  # requests that take part in them, summed over them
    verified: int  # all rows of decode passes, rejected drafts too

    @property
    def acceptance_length(self) -> float:
        """Tokens that a decode pass keeps of a request, on average; 1 without any decode pass."""
        return self.decoded / self.turns if self.turns else 1.0


def counted_of(schedule: Schedule) -> Counted:
    """Gives what of a schedule enters the metrics."""
    passes = schedule.counted & schedule.starts_pass
    prefills = passes & (schedule.phase == PREFILL)
    decodes = passes & (schedule.phase == DECODE)
    kept = schedule.tokens if schedule.kept is None else schedule.kept
    return Counted(
        tokens=int(kept[passes].sum(dtype=np.int64)),
        prompts=len(np.unique(schedule.request[prefills])),
        decodes=int(decodes.sum()),
        decoded=int(kept[decodes].sum(dtype=np.int64)),
        turns=int(schedule.served[decodes].sum(dtype=np.int64)),
        verified=int(schedule.tokens[decodes].sum(dtype=np.int64)),
    )
