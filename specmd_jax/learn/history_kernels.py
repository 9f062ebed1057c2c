"""The compiled loops over a trace that write what a predictor sees at every visit, as `policies.use_history` says it.

Every loop of layers takes a range of them. Ranges write nothing in common, so that threads may share them out in any
way, with the same bits. Letters: N tokens of a window, L layers, E experts, F features, U and G fading sums of use and
of gate mass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specmd_jax.loops import compiled

F32 = np.float32
TINY = np.finfo(np.float32).tiny
WHOLE, MOST, SIXTEEN, ZERO, ONE = F32(256), F32(255), F32(16), F32(0), F32(1)


@compiled
def draw(
    first: Any, last: Any, demand: Any, mass: Any, starts: Any, decays: Any, parts: Any, slow: Any, never: Any,
    octaves: Any, use: Any, counts: Any, new: Any, share: Any, bits: Any, seen: Any, wave: Any, topic: Any,
) -> None:  # fmt: skip
    """Writes `seen` [N, L, F, E], `wave` and `topic` [N, L, E] of the layers ``first`` up to ``last``.

    Args:
      first: layer.
      last: the one behind the last layer.
      demand: bool [N, L, E].
      mass: float32 [N, L, E].
      starts: bool [N], first token of a request: the history is empty before it.
      decays: float32 [U + G], those of the fading sums of use and of gate mass.
      parts: float32 [U + G], what makes shares of the sums.
      slow: place of the topic's decay among them.
      never: age of what was never used.
      octaves: uint8 [257], 32 log2 of counts; the last is that of all larger ones.
      use: float32 [U + G, E], overwritten.
      counts: int32 [3, E], overwritten: age, gap, visits so far.
      new: float32 [2, E], overwritten: use and gate mass at the visit.
      share: float32 [E], overwritten.
      bits: `share` read as int32.
      seen: uint8.
      wave: uint8.
      topic: uint8.
    """
    tokens, _, experts = demand.shape
    sums = len(decays)
    shares = seen.shape[2] - 4 - sums  # of use, which come linearly and in octaves
    for layer in range(first, last):
        for n in range(tokens):
            if starts[n]:
                use[:] = ZERO
                counts[:2] = never
                counts[2] = 0
            row = seen[n, layer]
            for e in range(experts):
                used = demand[n, layer, e]
                gate = mass[n, layer, e] if used else ZERO
                new[0, e] = ONE if used else ZERO
                new[1, e] = gate
                counts[1, e] = counts[0, e] if used else counts[1, e]
                counts[0, e] = 0 if used else min(counts[0, e] + 1, never)
                counts[2, e] += 1
                row[sums + shares, e] = np.uint8(min(gate * WHOLE, MOST))
                wave[n, layer, e] = np.uint8(SIXTEEN + min(gate * SIXTEEN, SIXTEEN)) if gate > ZERO else np.uint8(0)
            for c in range(3):
                for e in range(experts):
                    row[sums + shares + 1 + c, e] = octaves[min(counts[c, e] + 1, 256)]
            for d in range(sums):
                decay, part = decays[d], parts[d]
                lately = new[0] if d < shares else new[1]
                for e in range(experts):
                    value = (use[d, e] + lately[e]) * decay
                    use[d, e] = value if value >= TINY else ZERO
                    share[e] = use[d, e] * part * WHOLE
                place = d if d < shares else shares + d
                for e in range(experts):
                    row[place, e] = np.uint8(min(share[e], MOST))
                if d < shares:
                    for e in range(experts):
                        row[shares + d, e] = np.uint8(min(max((bits[e] >> 18) - (127 << 5), 0), 255))
            for e in range(experts):
                topic[n, layer, e] = row[slow, e]


@compiled
def until_next(demand: Any, starts: Any, soon: Any) -> None:
    """Writes `soon` uint16 [N, L, E]: visits of the layer until the expert's next use in the request, 0 for none."""
    tokens, layers, experts = demand.shape
    for n in range(tokens - 1, -1, -1):
        ends = n == tokens - 1 or starts[n + 1]
        for layer in range(layers):
            for e in range(experts):
                if ends:
                    soon[n, layer, e] = 0
                elif demand[n + 1, layer, e]:
                    soon[n, layer, e] = 1
                else:
                    later = soon[n + 1, layer, e]
                    soon[n, layer, e] = min(later + 1, 65535) if later > 0 else 0
