"""What an engine is asked to replay, as far as it decides who can."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from specmd_jax.policies.choice import Choice, Mix
from specmd_jax.replay.state import Setup


class Asked(NamedTuple):
    """The static side of a launch."""

    setup: Setup
    mix: Mix  # a number that varies within the launch is a row of values
    levels: int  # stored precisions
    streamed: bool = False  # the trace is read a stretch at a time

    @property
    def varied(self) -> tuple[Choice, ...]:
        """The choices whose numbers vary within the launch."""
        return tuple(choice for choice in self.mix if any(map(np.ndim, jax.tree.leaves(choice))))


def points(mix: Mix) -> int | None:
    """Says how many values the varying numbers of a mix have; None: no number varies."""
    return next((len(leaf) for leaf in jax.tree.leaves(mix) if np.ndim(leaf)), None)
