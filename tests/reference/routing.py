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
    """``z' = z + strength * delta * cached`` selects, the original logits weigh. One-token decode passes only.

    delta is the layer's mean of ``max(z) - min(z)`` over the tokens that this rule routed, this one included (a
    float32 running sum over a count). Cached is resident at any level when the visit begins, in flight or not. As many
    experts as before are selected (ties: lower id); gates are the softmax of the original logits over the selected,
    and the gate order is by falling original logit.
    """

    def __init__(self, strength: float = 0.3):
        self.strength = np.float32(strength)
        self.spread: dict[int, tuple[np.float32, int]] = {}  # layer -> summed max - min, tokens

    def route(self, visit: Visit, cache: Cache) -> Visit:
        if not visit.one_decode_token or not visit.demand:
            return visit
        if visit.logits is None:
            raise ValueError("cache_aware needs `logits` in the schedule")
        z = visit.logits.astype(np.float32)
        total, tokens = self.spread.get(visit.layer, (np.float32(0), 0))
        total, tokens = np.float32(total + (z.max() - z.min())), tokens + 1
        self.spread[visit.layer] = total, tokens
        delta = total / np.float32(tokens)
        cached = np.array([cache.level(visit.flat(e)) > 0 for e in range(visit.experts)], np.float32)
        moved = z + self.strength * delta * cached
        chosen = sorted(range(visit.experts), key=lambda e: (-moved[e], e))[: len(visit.demand)]
        chosen.sort(key=lambda e: (-z[e], e))
        gates = softmax(z[chosen])
        return replace(
            visit,
            demand=chosen,
            count=dict.fromkeys(chosen, 1),
            mass={e: np.float32(g) for e, g in zip(chosen, gates, strict=True)},
            next_use={e: visit.next_use.get(e, NEVER) for e in chosen},
        )


ROUTING: dict[str, Callable[..., Standard | CacheAware]] = {"standard": Standard, "cache_aware": CacheAware}
