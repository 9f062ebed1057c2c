"""Blocks of a page that a command writes: all lines between ``<!-- made: NAME -->`` and ``<!-- /made -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from specmd_jax.errors import SpecmdError

_BLOCK = re.compile(r"(<!-- made: ([\w-]+) -->\n)(.*?)(<!-- /made -->)", re.DOTALL)


def blocks_of(text: str) -> dict[str, str]:
    """Gives the blocks of a page by name, each with its closing newline."""
    return {name: body for _, name, body, _ in _BLOCK.findall(text)}


def with_blocks(text: str, bodies: Mapping[str, str], place: str) -> str:
    """Gives the page with these blocks in place of its own; blocks that are not named stay.

    Raises SpecmdError if the page, called `place`, lacks one of them.
    """
    for name in bodies:
        if name not in blocks_of(text):
            raise SpecmdError(f"{place}: there is no block {name!r}, expected <!-- made: {name} --> and <!-- /made -->")
    return _BLOCK.sub(lambda found: f"{found[1]}{bodies.get(found[2], found[3])}{found[4]}", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Gives a table in Markdown, a line per row."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"
