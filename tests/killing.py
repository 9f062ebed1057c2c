"""Runs Python code in a process of its own, and kills it in the middle: what a resumed run is compared with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def run_until(said: str, script: str) -> None:
    """Runs a script and kills it (SIGKILL) as soon as its `report` has said a line that begins so.

    The script finds the tests' modules and ``Path``, and passes on ``report``, which waits there for the end.
    """
    begin = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests', '.']\n"
        f"def report(line): print(line, flush=True); line.startswith({said!r}) and sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", begin + script]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(said):
            os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
