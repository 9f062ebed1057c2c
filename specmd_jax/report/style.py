"""How a policy is drawn: a hue and a dash that no other policy has, the same in every figure and on every page.

The hues are told apart with any colour vision (`tests/test_pages.py` measures it), on white and on a dark ground.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

EMPHASISED = ("lru", "least_stale", "lfu", "belady")


class Hue(NamedTuple):
    """A colour on a light and on a dark ground."""

    light: str
    dark: str


RED, GREEN, TEAL, BLUE = (
    Hue("#8B1F20", "#E0491A"),
    Hue("#7C9C57", "#61A87F"),
    Hue("#038075", "#6FD6D6"),
    Hue("#2E38BA", "#4D66EC"),
)
PLUM, GOLD, LILAC, INK = (
    Hue("#683B6D", "#9C6088"),
    Hue("#806D07", "#F0D354"),
    Hue("#C470E5", "#C482FC"),
    Hue("#111111", "#FFFFFF"),
)
GREY = Hue("#767676", "#9A9A9A")
HUES = (BLUE, RED, TEAL, LILAC, GREEN, GOLD, PLUM, INK)

DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2.5), (1.8, 2), (8, 2.5, 1.8, 2.5), (12, 3), (4, 2, 1, 2, 1, 2))
"""Lengths of strokes and gaps; none: a solid line."""
_MARKERS = ("", "o", "s", "^", "D", "v")

_PLACES: dict[str, tuple[Hue, int]] = {
    "lru": (RED, 0),
    "fifo": (RED, 1),
    "slru": (RED, 2),
    "lfu": (GREEN, 0),
    "lfu_resident": (GREEN, 1),
    "lfru": (GREEN, 2),
    "lfu_decay": (TEAL, 0),
    "random": (TEAL, 1),
    "least_stale": (BLUE, 0),
    "least_stale_left_first": (BLUE, 1),
    "least_stale_literal": (BLUE, 2),
    "least_stale_recency": (BLUE, 3),
    "score": (PLUM, 0),
    "lhu": (PLUM, 1),
    "fld": (PLUM, 2),
    "fld_absolute": (PLUM, 3),
    "weighted": (GOLD, 0),
    "online": (LILAC, 0),
    "learned": (LILAC, 1),
    "adaptive": (LILAC, 2),
    "belady": (INK, 0),
    "belady_bypass": (INK, 1),
}


class Look(NamedTuple):
    """How a line is drawn. Emphasised policies are thick, plain and on top."""

    hue: Hue
    dash: tuple[float, ...]
    marker: str
    linewidth: float
    zorder: float

    @property
    def color(self) -> str:
        """Gives the colour on white, where Matplotlib draws."""
        return self.hue.light

    @property
    def linestyle(self) -> Any:
        """Gives the dash as Matplotlib takes it."""
        return (0, self.dash) if self.dash else "-"


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Gives a look for each policy, the same whatever other known policies are drawn.

    A name that is not in the table has the hue of its longest known prefix (``lru + transition``: lru's) with the next
    free dash; if it has none, the next hue and dash that nothing here has.
    """
    found: dict[str, Look] = {}
    taken = set(_PLACES.values())
    for name in names:
        place = _PLACES.get(name) or _free(name, taken)
        taken.add(place)
        found[name] = _look(name, *place)
    return found


def _free(name: str, taken: set[tuple[Hue, int]]) -> tuple[Hue, int]:
    prefix = max((base for base in _PLACES if name.startswith(base)), key=len, default=None)
    hues = HUES if prefix is None else (_PLACES[prefix][0],)
    places = [(hue, dash) for dash in range(len(DASHES)) for hue in hues]
    return next((place for place in places if place not in taken), places[-1])


def categories(names: Iterable[str]) -> dict[str, Look]:
    """Gives a look for each of some names that are no policies, in their order."""
    return {
        name: _look(name, HUES[at % len(HUES)], at // len(HUES) % len(DASHES))
        for at, name in enumerate(dict.fromkeys(names))
    }


def _look(name: str, hue: Hue, dash: int) -> Look:
    if name in EMPHASISED:
        return Look(hue, DASHES[dash], "", 2.4, 4.0 if name == "belady" else 5.0)
    return Look(hue, DASHES[dash], _MARKERS[dash], 1.1, 3.0)
