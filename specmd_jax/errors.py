"""The one exception users meet: a single clear line that names the place and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecmdError(ValueError):
    """Bad input. The message is one line; the command line prints it and exits with status 2."""


def unknown(kind: str, name: object, known: Iterable[str]) -> SpecmdError:
    """Error for a name that no table knows: lists the known ones and suggests the nearest."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return SpecmdError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
