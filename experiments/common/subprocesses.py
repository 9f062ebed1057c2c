"""Jobs of `experiments.common.worker` side by side, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmd_jax.errors import SpecmdError

ROOT = Path(__file__).resolve().parents[2]


def workers(jobs: Sequence[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Gives the seconds of the slowest of some jobs side by side, begun when all are ready, and what they print.

    Raises SpecmdError if one of them fails.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.common.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for job in jobs
    ]
    try:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SpecmdError(f"a worker did not begin: {last_line(process.communicate()[1])}")
        for process in running:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate() for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        if process.returncode:
            raise SpecmdError(f"a worker ended with status {process.returncode}: {last_line(errors)}")
    results = [json.loads(output) for output, _ in outputs]
    return max(result["seconds"] for result in results), results


def last_line(text: str) -> str:
    """Gives the last line of what a process wrote."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"
