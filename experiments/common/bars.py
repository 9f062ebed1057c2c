"""Progress of a command: a bar at a terminal, elsewhere (in a log, through a pipe) a line now and then."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

EVERY_S = 30.0  # where nobody looks at a terminal; before that nothing is told


class _Lines:
    """A file that gets what tqdm writes over itself as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Writes what there is to read as a line of its own."""
        if text.strip():
            self._stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        """Passes it on."""
        self._stream.flush()


def bar(total: int, unit: str, done: int = 0) -> tqdm[Any]:
    """Gives a bar on stderr for `total` units of which some are `done`; a context manager."""
    if sys.stderr.isatty():
        return tqdm(total=total, initial=done, unit=unit, file=sys.stderr)
    lines: Any = _Lines(sys.stderr)
    return tqdm(
        total=total, initial=done, unit=unit, file=lines, ascii=True, ncols=80, mininterval=EVERY_S, delay=EVERY_S,
        miniters=1,
    )  # fmt: skip
