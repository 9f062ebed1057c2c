"""`LOCALITY`: knobs with which `synthesize` routes about as locally as a published model does.

Four knobs are fitted so that the hits of LRU, and of an optimal cache, at 1/8 to 1/2 of a layer's experts come out as
they were read from recorded routing. `lru` has such reads, per layer, tokens one after another, to be held to; the rest
of what a model's routing is like (which expert follows which, bursts, layers that differ) is not in the knobs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from specmd_jax.types import Trace


class Knobs(NamedTuple):
    """Arguments of `synthesize`."""

    skew: float
    stickiness: float
    drift: float
    topics: int


class Locality(NamedTuple):
    """One model's row."""

    knobs: Knobs
    experts: int  # E
    top_k: int  # K
    lru: dict[int, float]  # experts of a layer that are cached -> share of hits
    source: str


_READS = "github.com/harshithkantamneni/moe-speed-of-light, prereg/{}, routing on dataset text"
_SHORT, _MORE = _READS.format("provenance/provenance.md"), _READS.format("provenance_ext/provenance.md")
_UNSEEN = "public reads of LRU hits that were gathered second-hand; the first source was not at hand"

LOCALITY: dict[str, Locality] = {
    "OLMoE-1B-7B": Locality(Knobs(1.04, 0.20, 0.0004, 3), 64, 8, {8: 0.47, 16: 0.65, 24: 0.76}, _UNSEEN),
    "Mixtral-8x7B": Locality(Knobs(0.64, 0.20, 0.0003, 8), 8, 2, {2: 0.37, 3: 0.50, 4: 0.62}, _UNSEEN),
    "Qwen1.5-MoE-A2.7B": Locality(Knobs(0.39, 0.31, 0.0084, 10), 60, 4, {15: 0.376, 30: 0.653}, _MORE),
    "Phi-3.5-MoE": Locality(Knobs(1.16, 0.26, 0.0011, 11), 16, 2, {4: 0.603, 8: 0.860}, _MORE),
    "Qwen3-30B-A3B": Locality(Knobs(1.19, 0.21, 0.0022, 10), 128, 8, {32: 0.805, 64: 0.946}, _SHORT),
    "gpt-oss-20b": Locality(Knobs(1.17, 0.08, 0.0014, 3), 32, 4, {8: 0.642, 16: 0.894}, _SHORT),
    "gpt-oss-120b": Locality(Knobs(0.95, 0.07, 0.0027, 9), 128, 4, {32: 0.813, 64: 0.929}, _SHORT),
    "DeepSeek-V2-Lite": Locality(Knobs(0.61, 0.20, 0.0043, 9), 64, 6, {16: 0.466, 32: 0.736}, _MORE),
}
"""By the model's name in `specmd_jax.specs.models.MODELS`."""


def locality_of(model: str, experts: int, top_k: int) -> tuple[Knobs, str | None]:
    """Gives a model's knobs; for one that is not in `LOCALITY` those of the model whose E and K are nearest, and its
    name: they are an assumption then. Distances are ratios of E and of K; ties: the earlier row.
    """
    if model in LOCALITY:
        return LOCALITY[model].knobs, None

    def distance(name: str) -> float:
        row = LOCALITY[name]
        return abs(math.log(row.experts / experts)) + abs(math.log(row.top_k / top_k))

    like = min(LOCALITY, key=distance)
    return LOCALITY[like].knobs, like


def lru_hits(trace: Trace, slots: int, skip: int = 0) -> float:
    """Gives the share of hits of LRU with `slots` experts of each layer, tokens one after another.

    Experts that share a token do not push each other out. `skip` tokens at the beginning are not counted; they fill
    the caches.
    """
    hits = asked = 0
    for layer in range(trace.layers):
        held: dict[int, None] = {}
        for place, row in enumerate(trace.expert_ids[:, layer].tolist()):
            wanted = [expert for expert in row if expert >= 0]
            if place >= skip:
                asked += len(wanted)
                hits += sum(expert in held for expert in wanted)
            for expert in reversed(wanted):
                held.pop(expert, None)
                held[expert] = None
            while len(held) > slots:
                del held[next(iter(held))]
    return hits / max(asked, 1)
