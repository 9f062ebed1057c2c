"""What enters and leaves host memory in front of storage, from the events of a replay (CONTRACT.md section 6)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specmd_jax.replay.state import Tier
from specmd_jax.replay.totals import FETCHED, Events


class HostMemory:
    """Host memory between two visits."""

    def __init__(self, level: npt.NDArray[np.int8], tier: Tier, top: int) -> None:
        """Begins with `level` [L, E]; `top` is the highest level of the device."""
        self.level, self.tier, self.top = level > 0, tier, top

    def visit(
        self, layer: int, targets: npt.NDArray[np.int64], events: Events, device: npt.NDArray[np.int8]
    ) -> npt.NDArray[np.bool_]:
        """Follows a visit, and says who leaves to make room, [L, E].

        Args:
          targets: [H] the layers that its prefetch goes to.
          events: its own, in full.
          device: [L, E] levels on the device behind its copies, before anything leaves there.
        """
        tier, there = events.tier, self.level.copy()
        assert tier is not None and tier.level is not None and events.row is not None and events.taken is not None
        there[layer] |= tier.read
        if self.tier.to_host or not self.tier.exclusive:
            there[targets] |= np.asarray(tier.ahead) > 0
        if self.tier.exclusive:
            moved = events.taken & (events.outcome == FETCHED) & (events.row == self.top)
            there[layer] &= ~moved
            if events.prefetched is not None:
                there[targets] &= np.asarray(events.prefetched) == 0
            there |= (device == self.top) & (events.level == 0)
        self.level = np.asarray(tier.level) > 0
        return there & ~self.level
