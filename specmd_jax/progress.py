"""A sign of life while something takes long, for a person at a terminal or in a notebook."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

AFTER_S = 3.0  # nothing is shown before
EVERY_S = 1.0


@contextlib.contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Shows on stderr `what` is going on and for how long, once it takes long, and wipes it in the end.

    It shows nothing where nobody looks: stderr must be a terminal, or Python run in a notebook.
    """
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield
        return
    done, began = threading.Event(), time.perf_counter()

    def show() -> None:
        width = 0
        pause_s = AFTER_S
        while not done.wait(pause_s):
            line = f"{what}: {time.perf_counter() - began:.0f} s"
            width, pause_s = max(width, len(line)), EVERY_S
            print(f"\r{line.ljust(width)}", end="", file=sys.stderr, flush=True)
        if width:
            print(f"\r{' ' * width}\r", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
