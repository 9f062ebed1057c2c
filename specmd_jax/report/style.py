"""How a policy is drawn: one colour per family, one line style and marker per member.

Colours are Okabe and Ito's, told apart with any colour vision; members of a family also differ in dashes and markers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

EMPHASISED = ("lru", "least_stale", "lfu", "belady")

_RECENCY, _FREQUENCY, _STALENESS = "#D55E00", "#009E73", "#0072B2"
_SCORE, _LEARNED, _BOUND, _OTHER = "#CC79A7", "#E69F00", "#000000", "#777777"

_FAMILIES: dict[str, str] = {
    "lru": _RECENCY,
    "fifo": _RECENCY,
    "slru": _RECENCY,
    "lfu": _FREQUENCY,
    "lfu_resident": _FREQUENCY,
    "lfu_decay": _FREQUENCY,
    "lfru": _FREQUENCY,
    "lhu": _SCORE,
    "score": _SCORE,
    "least_stale": _STALENESS,
    "least_stale_left_first": _STALENESS,
    "least_stale_literal": _STALENESS,
    "least_stale_recency": _STALENESS,
    "fld": "#56B4E9",
    "fld_absolute": "#56B4E9",
    "random": _OTHER,
    "learned": _LEARNED,
    "weighted": _LEARNED,
    "online": _LEARNED,
    "belady": _BOUND,
    "belady_bypass": _BOUND,
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 1, 2, 1, 2)))
_MARKERS = ("", "o", "s", "^", "D")


class Look(NamedTuple):
    """Keyword arguments of a line. Emphasised policies are thick, plain and on top."""

    color: str
    linestyle: Any
    marker: str
    linewidth: float
    zorder: float


def looks(policies: Iterable[str]) -> dict[str, Look]:
    """Gives a look for each policy, the same whatever other known policies are drawn.

    A name that is not in the table is drawn like its longest known prefix (``lfu_decay(0.8)``: like ``lfu_decay``),
    with the family's next free dashes, or in grey if it has none.
    """
    members: dict[str, int] = {}
    known: dict[str, Look] = {}
    for name, color in _FAMILIES.items():
        known[name] = _look(name, color, _count(members, color))
    found: dict[str, Look] = {}
    for name in policies:
        if name not in known:
            prefix = max((base for base in _FAMILIES if name.startswith(base)), key=len, default=None)
            color = _FAMILIES[prefix] if prefix else _OTHER
            known[name] = _look(name, color, _count(members, color))
        found[name] = known[name]
    return found


def _count(members: dict[str, int], color: str) -> int:
    members[color] = members.get(color, -1) + 1
    return members[color]


def _look(name: str, color: str, member: int) -> Look:
    if name in EMPHASISED:
        return Look(color, "-", "", 2.4, 4.0 if name == "belady" else 5.0)
    marker = "" if color == _BOUND else _MARKERS[member % len(_MARKERS)]
    return Look(color, _DASHES[member % len(_DASHES)], marker, 1.1, 3.0)
