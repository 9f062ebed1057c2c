"""An expert as whole pages of words: its arrays one behind the other, whatever their types.

Experts of several precisions then share one device array of pages, [pages, words], and whatever the bits of those that
are there, no memory is set aside for others. Each array begins at a word (uint32, the first byte lowest). The last page
of an expert is filled up with zeros; `lay_out` picks a size of page that wastes little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax import lax

from specmd_jax.moe.model.experts import Expert

WORD = 4
LINE = 32
"""Words of a memory line of 128 bytes: a page is whole lines."""

COUNTS = range(8, 33)
"""How many pages the smallest form of an expert may have."""


class Part(NamedTuple):
    """One array of an expert, in its pages."""

    first: int  # word at which it begins
    words: int
    shape: tuple[int, ...]
    dtype: Any


class Level(NamedTuple):
    """An expert at one precision (hashable)."""

    pages: int
    parts: tuple[Part, ...]
    tree: Any  # of the leaves that the parts are

    @property
    def words(self) -> int:
        """Words that are used, without what fills the last page up."""
        return self.parts[-1].first + self.parts[-1].words


class Layout(NamedTuple):
    """The pages of experts at Q precisions (hashable)."""

    page_words: int
    levels: tuple[Level, ...]  # [Q] by rising size

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return WORD * self.page_words

    @property
    def most_pages(self) -> int:
        """Pages of an expert at the highest precision."""
        return self.levels[-1].pages

    def expert_bytes(self, level: Level) -> int:
        """Gives what an expert takes in pages, the end of the last one included."""
        return level.pages * self.page_bytes


def lay_out(specs: Sequence[Expert]) -> Layout:
    """Chooses the pages for experts of some forms (arrays or shapes), by rising size.

    Of all page sizes that give the smallest form one of `COUNTS` pages, it is the one that wastes the smallest share of
    any form; of equal ones the largest. An expert wastes less than a page, and pages of a 32nd of the smallest form are
    among them: at most 1/32 of an expert is lost, and a line.
    """
    parts = [_parts(spec) for spec in specs]
    words = [own[-1].first + own[-1].words for own in parts]
    sizes = {math.ceil(words[0] / count / LINE) * LINE for count in COUNTS}

    def wasted(page: int) -> float:
        return max(math.ceil(size / page) * page / size for size in words)

    page = min(sizes, key=lambda page: (wasted(page), -page))
    levels = tuple(
        Level(math.ceil(size / page), own, jax.tree.structure(spec))
        for size, own, spec in zip(words, parts, specs, strict=True)
    )
    return Layout(page, levels)


def _parts(spec: Expert) -> tuple[Part, ...]:
    parts, first = [], 0
    for leaf in jax.tree.leaves(spec):
        words = math.ceil(math.prod(leaf.shape) * leaf.dtype.itemsize / WORD)
        parts.append(Part(first, words, tuple(leaf.shape), np.dtype(leaf.dtype)))
        first += words
    return tuple(parts)


def pack(level: Level, expert: Expert, pages: npt.NDArray[np.uint32]) -> None:
    """Writes experts to their pages, on the host.

    Args:
        expert: leaves [n, ...] (numpy) of the level's shapes and types.
        pages: [n, pages of the level, words of a page], zeros where nothing is written.
    """
    to = pages.reshape(pages.shape[0], -1).view(np.uint8)
    for part, leaf in zip(level.parts, jax.tree.leaves(expert), strict=True):
        flat = np.ascontiguousarray(leaf).reshape(pages.shape[0], -1).view(np.uint8)
        to[:, WORD * part.first : WORD * part.first + flat.shape[1]] = flat


def unpack(level: Level, pages: jax.Array) -> Expert:
    """Gives the expert whose pages [pages of the level, words of a page] they are; to be traced."""
    words = pages.reshape(-1)

    def leaf(part: Part) -> jax.Array:
        own = lax.slice(words, (part.first,), (part.first + part.words,))
        values = lax.bitcast_convert_type(own, part.dtype).reshape(-1)
        return values[: math.prod(part.shape)].reshape(part.shape)

    return jax.tree.unflatten(level.tree, [leaf(part) for part in level.parts])
