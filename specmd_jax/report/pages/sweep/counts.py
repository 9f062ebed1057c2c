"""How often each expert of a trace was routed to, as a file beside a sweep's table."""

from __future__ import annotations

import os
from collections.abc import Sequence

from specmd_jax.errors import SpecmdError
from specmd_jax.files import replace_text
from specmd_jax.inputs import read_text


def write_counts(path: str | os.PathLike[str], counts: Sequence[Sequence[int]]) -> None:
    """Writes an [L, E] table of counts, a line per layer, as CSV."""
    lines = [",".join(str(int(value)) for value in layer) for layer in counts]
    replace_text(path, "\n".join(lines) + "\n")


def read_counts(path: str | os.PathLike[str]) -> list[list[int]]:
    """Gives the [L, E] counts that `write_counts` wrote. Raises `SpecmdError` naming the first line that is not one."""
    counts: list[list[int]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            counts.append([int(cell) for cell in line.split(",")])
        except ValueError:
            raise SpecmdError(f"{path}, line {number}: expected whole numbers, got {line[:60]!r}") from None
        if len(counts[-1]) != len(counts[0]):
            raise SpecmdError(f"{path}, line {number}: {len(counts[-1])} counts, expected {len(counts[0])}")
    if not counts:
        raise SpecmdError(f"{path}: empty, expected a line of counts for each layer")
    return counts
