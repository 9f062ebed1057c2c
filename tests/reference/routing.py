"""Routing that looks at the cache before it selects experts (CONTRACT.md section 2, step 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from specmd_jax.types import NEVER

from .cache import Cache
from .miss import softmax
from .schedule import Visit


class Standard:
    def route(self, visit: Visit, cache: Cache) -> Visit:
        del cache
        return visit


class CacheAware:
    """``z' = z + strength * delta * cached`` selects, the original logits weigh, token by token.

    delta is the layer's mean of ``max(z) - min(z)`` over the tokens that this rule routed, all of this pass included (a
    float32 running sum over a count). Cached is resident at any level when the visit begins, in flight or not. Each
    token keeps its number of experts (ties: lower id); gates are the softmax of the original logits over the selected,
    and the gate order is by falling original logit (ties: lower id).
    """

    def __init__(self, strength: float = 0.3):
        self.strength = np.float32(strength)
        self.spread: dict[int, tuple[np.float32, int]] = {}  # layer -> summed max - min, tokens

    def route(self, visit: Visit, cache: Cache) -> Visit:
        if not visit.demand:
            return visit
        if visit.every_logits is None:
            raise ValueError("cache_aware needs `logits` in the schedule")
        total, tokens = self.spread.get(visit.layer, (np.float32(0), 0))
        for z in visit.every_logits:
            total, tokens = np.float32(total + (z.max() - z.min())), tokens + 1
        self.spread[visit.layer] = total, tokens
        delta = total / np.float32(tokens)
        cached = np.array([cache.level(visit.flat(e)) > 0 for e in range(visit.experts)], np.float32)
        per_token = sum(visit.count.values()) // len(visit.every_logits)
        count, mass, last = dict[int, int](), dict[int, np.float32](), dict[int, tuple[int, int]]()
        for token, z in enumerate(visit.every_logits):
            moved = z + self.strength * delta * cached
            chosen = sorted(range(visit.experts), key=lambda e: (-moved[e], e))[:per_token]
            chosen.sort(key=lambda e: (-z[e], e))
            for place, (e, gate) in enumerate(zip(chosen, softmax(z[chosen]), strict=True)):
                count[e] = count.get(e, 0) + 1
                mass[e] = np.float32(mass.get(e, np.float32(0)) + gate)
                last[e] = token, place
        demand = sorted(last, key=lambda e: last[e])
        next_use = {e: visit.next_use.get(e, NEVER) for e in demand}
        return replace(visit, demand=demand, count=count, mass=mass, next_use=next_use)


ROUTING: dict[str, Callable[..., Standard | CacheAware]] = {"standard": Standard, "cache_aware": CacheAware}
