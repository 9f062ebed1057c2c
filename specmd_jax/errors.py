"""The one exception users meet: a single clear line that names the place and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_SHOWN = 60
"""Characters of a value in a message."""
MOST_MESSAGE = 2000
"""Characters of a whole message; of a longer one the middle is left out."""


class SpecmdError(ValueError):
    """Bad input. The message is one line; the command line prints it and exits with status 2.

    What no terminal can show (line ends, control characters, half characters) is escaped, and the middle of a message
    that is too long is left out: whatever a file or a name holds, the line stays one that can be read.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """Gives a text as one line that can be printed, of at most `MOST_MESSAGE` characters."""
    text = _cut(text)
    if text.isprintable():
        return text
    text = " ".join(text.splitlines())
    return _cut("".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text))


def _cut(text: str) -> str:
    if len(text) <= MOST_MESSAGE:
        return text
    tail = MOST_MESSAGE // 4
    return f"{text[: MOST_MESSAGE - tail - 5]} ... {text[-tail:]}"


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """Gives a value as a message says it: one short line."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists in lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def unknown(kind: str, name: object, known: Iterable[str]) -> SpecmdError:
    """Makes the error for a name that no table knows: lists the known ones and suggests the nearest."""
    names = sorted(known)
    by_case = {one.casefold(): one for one in names}
    near = difflib.get_close_matches(str(name)[:MOST_SHOWN].casefold(), by_case, n=1)
    hint = f"; did you mean {by_case[near[0]]!r}?" if near else ""
    return SpecmdError(f"unknown {kind} {shown(name)}{hint} (known: {', '.join(names)})")


def find(kind: str, name: object, known: Iterable[str]) -> str:
    """Gives the table's own spelling of a name that is given in any case; raises `unknown` for one that it lacks."""
    names = list(known)
    if (found := spelling(name, names)) is None:
        raise unknown(kind, name, names)
    return found


def spelling(name: object, known: Iterable[str]) -> str | None:
    """Gives the table's own spelling of a name that is given in any case, or None for one that it lacks."""
    by_case = {one.casefold(): one for one in known}
    return by_case.get(name.strip().casefold()) if isinstance(name, str) else None
