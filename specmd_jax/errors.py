"""The one exception users meet: a single clear line that names the place and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecmdError(ValueError):
    """Bad input. The message is one line; the command line prints it and exits with status 2."""


def unknown(kind: str, name: object, known: Iterable[str]) -> SpecmdError:
    """Makes the error for a name that no table knows: lists the known ones and suggests the nearest."""
    names = sorted(known)
    by_case = {one.casefold(): one for one in names}
    near = difflib.get_close_matches(str(name).casefold(), by_case, n=1)
    hint = f"; did you mean {by_case[near[0]]!r}?" if near else ""
    return SpecmdError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")


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
