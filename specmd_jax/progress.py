"""A sign of life while something takes long: a count of seconds at a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

AFTER_S = 3.0  # nothing is shown before
EVERY_S = 1.0
IN_A_LOG_S = 30.0  # between lines where stderr is no terminal


@contextlib.contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Shows on stderr `what` is going on and for how long, once it takes long.

    At a terminal and in a notebook it counts, and wipes it in the end; elsewhere it writes a line every `IN_A_LOG_S`.
    """
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    done, began = threading.Event(), time.perf_counter()

    def show() -> None:
        width = 0
        pause_s = AFTER_S if watched else IN_A_LOG_S
        while not done.wait(pause_s):
            line = f"{what}: {time.perf_counter() - began:.0f} s"
            if not watched:
                print(line, file=sys.stderr, flush=True)
                continue
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
