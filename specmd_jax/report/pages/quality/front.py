"""What the rows of `experiments.quality` say: which rules nothing beats, and which are safe."""

from __future__ import annotations

from collections.abc import Sequence

from specmd_jax.report.columns import Row
from specmd_jax.report.rows import number

SAFE_PCT = 2.0
"""A rule is safe if it makes held-out text at most so much longer, in % of the bits per byte."""
COLLAPSED = 2.0
"""A text has collapsed if the perplexity of a token is at least so many times what it was."""


def sizes(rows: Sequence[Row]) -> list[float]:
    """Gives the cache sizes, in % of the bytes at 16 bits, smallest first."""
    return sorted({number(row, "capacity_pct") for row in rows})


def at(rows: Sequence[Row], pct: float) -> list[Row]:
    return [row for row in rows if number(row, "capacity_pct") == pct]


def beats(one: Row, other: Row) -> bool:
    """Whether `one` is as fast and as near to the model as shipped, and better in one of them. Nearness is the KL
    divergence, which a few hundred tokens tell better than their bits per byte."""
    mine, theirs = ((number(row, "tpot_s"), number(row, "kl_nats")) for row in (one, other))
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def front(rows: Sequence[Row]) -> list[Row]:
    """Gives the rows of one cache size that none beats, fastest first; of equal ones, as of rules that had nothing to
    do, the first."""
    kept: dict[tuple[float, float], Row] = {}
    for row in rows:
        if not any(beats(other, row) for other in rows):
            kept.setdefault((number(row, "tpot_s"), number(row, "kl_nats")), row)
    return sorted(kept.values(), key=lambda row: number(row, "tpot_s"))


def safe(row: Row) -> bool:
    return number(row, "change_pct") <= SAFE_PCT


def collapsed(row: Row) -> bool:
    return number(row, "perplexity") >= COLLAPSED * number(row, "resident_perplexity")


def plain(rows: Sequence[Row], precision: str) -> Row | None:
    """Gives the row of one cache size that fetches every expert at a precision."""
    return next(
        (row for row in rows if row["precisions"] == precision and row["miss"] == "fetch" and row["number"] is None),
        None,
    )


def family(row: Row) -> str:
    """Names what a rule does, without its number."""
    if row["routing"] != "standard":
        return str(row["routing"])
    return str(row["miss"])
