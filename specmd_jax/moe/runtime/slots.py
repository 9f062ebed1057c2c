"""The experts on the device, each as arrays of its own: a copy is one transfer into its final place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from specmd_jax.moe.model.experts import Expert
from specmd_jax.moe.runtime.store import DEVICE, PinnedStore, sharding

_AT_ONCE = 8


@functools.cache
def fetch(device: Any) -> Any:
    """Gives the program that copies experts, a list of any length, to ``device``."""
    return jax.jit(lambda rows: jax.tree.map(lambda leaf: jax.device_put(leaf, device), rows))


def warm(store: PinnedStore, count: int) -> None:
    """Compiles the programs that copy up to ``count`` experts: else the first visit that misses as many would."""
    program = fetch(sharding(DEVICE))
    for level in store.levels:
        for n in range(1, min(count, len(level[0])) + 1):
            jax.block_until_ready(program(list(level[0][:n])))  # let go at once: no more than ``count`` at a time


class Slots:
    """The experts on the device, by flat id, each at one of the store's precisions (levels, from 1)."""

    def __init__(self, store: PinnedStore):
        self._store, self._device = store, sharding(DEVICE)
        self._fetch = fetch(self._device)
        self._held: dict[int, Expert] = {}
        self._level = np.zeros(store.layers * store.cfg.experts, np.int8)  # of the keys of `_held`; 0 elsewhere
        self._bytes = 0
        self.most, self.most_bytes = 0, 0

    def __contains__(self, flat: int) -> bool:
        return flat in self._held

    def __getitem__(self, flat: int) -> Expert:
        return self._held[flat]

    def __len__(self) -> int:
        return len(self._held)

    def copy(self, flats: Sequence[int], levels: Sequence[int] | None = None, idle: bool = False) -> None:
        """Starts the copies, in this order; returns at once. A copy replaces what is held of the same expert.

        Args:
            levels: at which level each; None: the highest.
            idle: the device has nothing to do before they have come. One program then starts all of a level, the
                highest first, which takes the host less time; it would hold up programs that follow it.
        """
        if not flats:
            return
        experts, every = self._store.cfg.experts, self._store.levels
        levels = [len(every)] * len(flats) if levels is None else levels
        rows = [every[q - 1][flat // experts][flat % experts] for flat, q in zip(flats, levels, strict=True)]
        for flat in flats:
            if flat in self._held:
                self.drop(flat)
        for one in sorted(set(levels), reverse=True) if idle else ():
            of_it = [n for n, level in enumerate(levels) if level == one]
            copied = self._fetch([rows[n] for n in of_it])
            self._held.update(zip((flats[n] for n in of_it), copied, strict=True))
        for start in range(0, 0 if idle else len(rows), _AT_ONCE):  # the first are on their way while the host goes on
            some = slice(start, start + _AT_ONCE)
            self._held.update(zip(flats[some], jax.device_put(rows[some], self._device), strict=True))
        self._level[flats] = levels
        self._bytes += sum(self._store.level_bytes[q - 1] for q in levels)
        self.most, self.most_bytes = max(self.most, len(self._held)), max(self.most_bytes, self._bytes)

    def keep(self, level: npt.NDArray[np.int8], but: Sequence[int] = ()) -> None:
        """Drops what `level` [L, E] does not hold, ``but`` some. Programs under way keep what they use."""
        for flat in np.flatnonzero((self._level > 0) & (level.reshape(-1) == 0)).tolist():
            if flat not in but:
                self.drop(flat)

    def drop(self, flat: int) -> None:
        del self._held[flat]
        self._bytes -= self._store.level_bytes[self._level[flat] - 1]
        self._level[flat] = 0
