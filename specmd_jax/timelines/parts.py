"""What a timeline is made of: spans on tracks, marks, arrows and counts. All times are seconds from its beginning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PASSES_SHOWN = 64
"""How many passes a timeline shows unless told otherwise."""

# Tracks. A timeline may have others; those it has are shown in its own order.
PASSES, VISITS, LINK, DEVICE, HOST, STALL, CACHE = "passes", "visits", "link", "device", "host", "stall", "cache"
STORAGE, IN_HOST = "storage", "host memory"


@dataclass(frozen=True)
class Span:
    """Something that takes time on a track. Spans of one track do not overlap."""

    track: str
    # of a copy or a read "miss" or "prefetch", of a stall what is waited for ("late", "miss" or "host"), or what it is
    kind: str
    name: str
    start_s: float
    end_s: float
    visit: int = -1  # in the whole schedule; -1: of none
    layer: int = -1
    expert: int = -1
    args: Mapping[str, Any] = field(default_factory=dict)  # what a reader sees on a click

    @property
    def took_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Mark:
    """Something that happens at a moment: a "collision", an "eviction" or a "reset"."""

    track: str
    kind: str
    name: str
    at_s: float
    visit: int
    layer: int = -1
    expert: int = -1


@dataclass(frozen=True)
class Arrow:
    """Leads from a prefetch copy to the first use of what it brought, and from a read into host memory to the copy, or
    the run on the host, that first asks for it; both are places in `Timeline.spans`.
    """

    start: int
    end: int


@dataclass(frozen=True)
class Count:
    """A number that holds from a moment on; the name has its unit."""

    name: str
    at_s: float
    value: float


@dataclass(frozen=True)
class Timeline:
    """One replay, or one run, or a part of it."""

    name: str
    evidence: str  # "simulated", "measured" or "estimated"
    tracks: tuple[str, ...]
    spans: tuple[Span, ...]
    marks: tuple[Mark, ...] = ()
    arrows: tuple[Arrow, ...] = ()
    counts: tuple[Count, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)  # the setting, and which passes these are

    def on(self, track: str, kind: str | None = None) -> list[Span]:
        """Gives the spans of a track, of one kind if it is named, in the order in which they begin."""
        found = [span for span in self.spans if span.track == track and kind in (None, span.kind)]
        return sorted(found, key=lambda span: (span.start_s, span.end_s))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Gives the spans as plain values, for a table."""
        for span in self.spans:
            row = {name: value for name, value in vars(span).items() if name != "args"}
            yield row | {"took_s": span.took_s, **span.args}

    @property
    def took_s(self) -> float:
        """Seconds from the beginning to the last gate."""
        return max((span.end_s for span in self.spans if span.track == VISITS), default=0.0)

    @property
    def stall_s(self) -> float:
        """Seconds for which visits wait beyond their own work."""
        return sum(span.took_s for span in self.spans if span.track == STALL)
