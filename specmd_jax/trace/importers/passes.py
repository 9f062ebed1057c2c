"""What formats without token numbers share: rows of each layer, pass by pass, become tokens.

A pass begins where the layer's number falls. Its tokens are as many rows as most of its layers have. A layer with fewer
has those of the last tokens (llama.cpp runs the last layer only for the last prompt token) and -1 before; a layer with
more is no layer of the model (a head that predicts several tokens): left out and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.trace.importers.joining import Part

Rows = npt.NDArray[np.int64]  # [tokens, K]
Pass = dict[int, Rows]  # layer -> rows


def passes_of(visits: Iterable[tuple[int, Rows]]) -> list[Pass]:
    """Puts (layer, rows) in the order of a file together as passes."""
    passes: list[Pass] = []
    last = -1
    for layer, rows in visits:
        if layer <= last or not passes:
            passes.append({})
        passes[-1][layer] = rows
        last = layer
    return passes


def tokens_of(one: Pass) -> int:
    """Gives the tokens of a pass: the rows of most of its layers (of the widest, if there is a draw)."""
    counts = Counter(len(rows) for rows in one.values())
    return max(counts, key=lambda rows: (counts[rows], rows))


class Layers(NamedTuple):
    """Which layers a file has, and which it has that are none."""

    kept: list[int]
    left_out: list[int]

    @property
    def notes(self) -> tuple[str, ...]:
        named = ", ".join(map(str, self.left_out))
        return (f"layer {named} has more rows than tokens: no layer of the model, left out",) * bool(self.left_out)

    @property
    def meta(self) -> dict[str, Any]:
        plain = self.kept == list(range(len(self.kept)))
        return {} if plain else {"layer_numbers": self.kept}


def layers_of(passes: Iterable[Pass]) -> Layers:
    """Tells layers from what has more rows than tokens."""
    found, wide = set[int](), set[int]()
    for one in passes:
        tokens = tokens_of(one)
        found.update(one)
        wide.update(layer for layer, rows in one.items() if len(rows) > tokens)
    return Layers(sorted(found - wide), sorted(wide))


def part_of(passes: Sequence[Pass], prompt_passes: int, layers: Layers, top_k: int, row: dict[str, Any]) -> Part:
    """Makes a request of passes, the first of which are prompt."""
    blocks, prompt = [], 0
    for index, one in enumerate(passes):
        tokens = tokens_of(one)
        block = np.full((tokens, len(layers.kept), top_k), -1, np.int64)
        for column, layer in enumerate(layers.kept):
            if layer in one and len(one[layer]):
                block[tokens - len(one[layer]) :, column] = one[layer]
        blocks.append(block)
        prompt += tokens if index < prompt_passes else 0
    return Part(np.concatenate(blocks), prompt, {"prompt_tokens": prompt} | row)
