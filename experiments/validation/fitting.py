"""Two constants of an engine by least squares: a layer's fixed time, and the share of its link (or host) it reaches.

The engine adds (``overlaps=0``): a token takes what the device computes, ``layer_s`` for each layer, and its misses at
the machine's rate over the share. Errors are relative; neither constant is negative.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.validation.prediction import Work, token_seconds
from specmd_jax.specs.hardware import Hardware

LEAST_CELLS = 3  # of an engine that is fitted; at least two must be left when those of one kind are held out
_FREE = 1e30  # bytes a second: misses cost nothing


class Terms(NamedTuple):
    """A token of one cell, seconds: base_s + layers * layer_s + miss_s / share."""

    base_s: float
    layers: int
    miss_s: float
    measured_s: float


class Profile(NamedTuple):
    """Constants of an engine."""

    layer_s: float
    share: float  # of the rate of the link, or of the host where it computes the misses; inf: misses cost nothing


def terms_of(work: Work, machine: Hardware, tokens_per_s: float) -> Terms:
    """Splits the time of a token whose misses are all copied, or all computed by the host."""
    adding = machine.replace(overlaps=0.0, layer_s=0.0)
    free = adding.replace(
        link_bytes_per_s=_FREE, link_latency_s=0.0, host_bytes_per_s=_FREE, host_moe_bytes_per_s=_FREE
    )
    base = token_seconds(work, free)
    return Terms(base, work.layers, token_seconds(work, adding) - base, 1 / tokens_per_s)


def fitted(cells: Sequence[Terms]) -> Profile:
    """Gives the constants with the least squares of relative errors; one that would be negative is 0, and the other is
    fitted alone: of two unknowns that is the non-negative optimum.
    """
    scale = np.array([cell.measured_s for cell in cells])
    matrix = np.array([[cell.layers, cell.miss_s] for cell in cells]) / scale[:, None]
    wanted = 1 - np.array([cell.base_s for cell in cells]) / scale
    best, least = np.zeros(2), float(wanted @ wanted)
    for columns in ([0, 1], [0], [1]):
        found = np.zeros(2)
        found[columns] = np.linalg.lstsq(matrix[:, columns], wanted, rcond=None)[0]
        left = float(np.sum((matrix @ found - wanted) ** 2))
        if (found >= 0).all() and left < least:
            best, least = found, left
    return Profile(float(best[0]), 1 / float(best[1]) if best[1] else math.inf)


def seconds(cell: Terms, profile: Profile) -> float:
    """Gives the seconds of a token by an engine's constants."""
    return cell.base_s + cell.layers * profile.layer_s + cell.miss_s / profile.share


def held_out(cells: Sequence[Terms], kinds: Sequence[Hashable]) -> list[float]:
    """Gives the seconds of each cell by constants that were fitted on the cells of another kind (model and capacity):
    the same on another machine would tell nearly all.
    """
    found = []
    for cell, kind in zip(cells, kinds, strict=True):
        found.append(seconds(cell, fitted([c for c, other in zip(cells, kinds, strict=True) if other != kind])))
    return found
