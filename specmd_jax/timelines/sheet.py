"""What a drawing is drawn on: spans, marks, arrows and counts of one replay, with the names that its pieces have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from specmd_jax.timelines.parts import (
    CACHE,
    DEVICE,
    HOST,
    IN_HOST,
    LINK,
    PASSES,
    STALL,
    STORAGE,
    VISITS,
    Arrow,
    Count,
    Mark,
    Span,
    Timeline,
)  # fmt: skip
from specmd_jax.timelines.sharing import Piece

TRACKS = (PASSES, VISITS, STALL, DEVICE, HOST, LINK, STORAGE, CACHE, IN_HOST)
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Sheet:
    """A timeline under way. An expert is named by its flat id, a span by its place among the spans."""

    def __init__(self, experts: int, level_bytes: npt.NDArray[np.int64], bits: tuple[float, ...]) -> None:
        """Begins empty; `level_bytes` [Q, L] is what an expert takes at each of the stored precisions `bits`."""
        self.experts, self.level_bytes, self.bits = experts, level_bytes, bits
        self.spans: list[Span] = []
        self.marks: list[Mark] = []
        self.arrows: list[Arrow] = []
        self.counts: list[Count] = []
        self.unused: dict[int, int] = {}  # what came by prefetch and its copy (-1: it is not shown)
        self.unasked: dict[int, int] = {}  # the same of what was read into host memory, and its read
        self.copying: int | None = None  # the last copy

    def span(
        self, track: str, kind: str, name: str, piece: Piece, visit: int, layer: int = -1, expert: int = -1,
        args: Mapping[str, Any] = NOTHING,
    ) -> int:  # fmt: skip
        """Adds a span, and gives its place."""
        self.spans.append(Span(track, kind, name, *piece, visit, layer, expert, args))
        return len(self.spans) - 1

    def mark(
        self, track: str, kind: str, name: str, at_s: float, visit: int, layer: int = -1, expert: int = -1
    ) -> None:
        """Adds a mark."""
        self.marks.append(Mark(track, kind, name, at_s, visit, layer, expert))

    def count(self, name: str, at_s: float, value: float) -> None:
        """Adds a count."""
        self.counts.append(Count(name, at_s, value))

    def read(self, kind: str, visit: int, flat: int, piece: Piece, more: Mapping[str, Any] = NOTHING) -> int:
        """Adds a read from storage, and gives its place."""
        layer, expert = divmod(flat, self.experts)
        args = {"bytes": int(self.level_bytes[-1, layer]), **more}
        return self.span(STORAGE, kind, f"L{layer} E{expert} read ({kind})", piece, visit, layer, expert, args)

    def copy(
        self, kind: str, visit: int, flat: int, piece: Piece, level: int = 0, more: Mapping[str, Any] = NOTHING
    ) -> int:
        """Adds a copy, at the highest precision unless a level is given, and gives its place."""
        layer, expert = divmod(flat, self.experts)
        level = level or len(self.level_bytes)
        args = {"bytes": int(self.level_bytes[level - 1, layer]), "bits": self.bits[level - 1], **more}
        place = self.span(LINK, kind, f"L{layer} E{expert} copy ({kind})", piece, visit, layer, expert, args)
        self.copying = place
        if kind == "prefetch":
            self.unused[flat] = place
        return place

    def prolong(self, end_s: float) -> None:
        """Lets the last copy end then."""
        if self.copying is not None:
            self.spans[self.copying] = replace(self.spans[self.copying], end_s=end_s)

    def use(self, flat: int, place: int) -> None:
        """Draws the arrow from a prefetch copy to the first use of what it brought."""
        self._arrow(self.unused.pop(flat, -1), place)

    def ask(self, flat: int, place: int) -> None:
        """Draws the arrow from a read into host memory to what first asks for its expert, if it was read so."""
        self._arrow(self.unasked.pop(flat, -1), place)

    def _arrow(self, start: int, end: int) -> None:
        if start >= 0:
            self.arrows.append(Arrow(start, end))

    def timeline(self, name: str, about: Mapping[str, Any]) -> Timeline:
        """Gives what has been drawn."""
        used = {span.track for span in self.spans} | {mark.track for mark in self.marks}
        return Timeline(
            name=name,
            evidence="simulated",
            tracks=tuple(track for track in TRACKS if track in used),
            spans=tuple(self.spans),
            marks=tuple(self.marks),
            arrows=tuple(self.arrows),
            counts=tuple(self.counts),
            about=about,
        )
