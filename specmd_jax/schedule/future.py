"""What the schedule can tell a predictor of the future: oracles have it, a control has it of a wrong pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specmd_jax.types import Schedule


def future_mass(
    schedule: Schedule, horizon: int, ahead: tuple[npt.NDArray[np.float32], bool] | None = None
) -> npt.NDArray[np.float32]:
    """Gives [V, H, E], gate mass of the next `horizon` layers after each layer's last visit, 0 past the end or a reset.

    `ahead`, for a stretch of a longer schedule: gate mass [L, E] of the first pass behind it, and whether that one
    begins with a reset.
    """
    mass, ends = layer_mass(schedule), np.flatnonzero(schedule.ends_layer)
    epoch = np.cumsum(schedule.reset)[ends]
    if ahead is not None:
        mass = np.concatenate([mass, ahead[0][:horizon]])
        epoch = np.concatenate([epoch, np.full(len(mass) - len(ends), epoch[-1] + ahead[1])])
    future = np.zeros((schedule.visits, horizon, schedule.experts), np.float32)
    for distance in range(1, horizon + 1):
        count = max(0, min(len(ends), len(mass) - distance))
        there = slice(distance, distance + count)
        same = epoch[there] == epoch[:count]
        future[ends[:count], distance - 1] = np.where(same[:, None], mass[there], 0)
    return future


def layer_mass(schedule: Schedule) -> npt.NDArray[np.float32]:
    """Gives [P * L, E], gate mass of each layer of each pass, over its visits."""
    group = np.concatenate([[0], np.cumsum(schedule.ends_layer)[:-1]])  # [V] which (pass, layer) a visit belongs to
    mass = np.zeros((int(schedule.ends_layer.sum()), schedule.experts), np.float32)
    np.add.at(mass, group, schedule.mass)
    return mass


def wrong_pass(schedule: Schedule, future: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Gives the same column with every layer's rows dealt to other passes (fixed key), phases kept apart."""
    rng = np.random.Generator(np.random.PCG64(20260203))
    wrong = future.copy()
    for layer in range(schedule.layers):
        for phase in np.unique(schedule.phase):
            rows = np.flatnonzero((schedule.layer == layer) & (schedule.phase == phase) & schedule.ends_layer)
            # one random cycle through all rows: nobody keeps its own
            order = rng.permutation(rows)
            wrong[order] = future[np.roll(order, 1)]
    return wrong
