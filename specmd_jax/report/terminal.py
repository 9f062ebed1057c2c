"""Tables that a person reads in a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

WIDTH = 120
_GAP = "  "
# a number, its unit and its interval
_FIGURE = re.compile(r"|-|nan|[-+]?(inf|[\d,]*\.?\d+(e[-+]\d+)?)( %)?( \([^()]*\))?")


def widths_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Gives the width that each column needs."""
    return [max(map(len, column)) for column in zip(head, *rows, strict=True)]


def width_of(widths: Sequence[int]) -> int:
    """Gives the width of a table whose columns are so wide."""
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def aligned(
    head: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int] | None = None, *, rule: bool = True
) -> list[str]:
    """Gives a table's lines: its head, a rule (if wanted) and the rows. Columns of figures stand to the right.

    `widths` are those of the columns, where several tables share them; columns beyond them are left out.
    """
    shown = widths_of(head, rows) if widths is None else widths
    right = [all(map(_FIGURE.fullmatch, column)) for column in zip(*rows, strict=True)] or [False] * len(head)

    def line(cells: Sequence[str]) -> str:
        placed = zip(cells, shown, right, strict=False)
        return _GAP.join(cell.rjust(wide) if to_right else cell.ljust(wide) for cell, wide, to_right in placed).rstrip()

    return [line(head), *(["-" * min(WIDTH, width_of(shown))] if rule else []), *map(line, rows)]
