"""Why a mix stands where it stands: rules over the rows."""

from __future__ import annotations

from collections.abc import Sequence

from specmd_jax.report.columns import Row
from specmd_jax.report.rows import number

RECENCY = ("lru", "fifo", "slru")


def reason(row: Row, here: Sequence[Row]) -> str:
    """Says why a mix stands where it stands among the mixes at the same capacity."""
    if number(row, "capacity_pct") >= 100:
        return "everything fits"
    said = [_of_recency(row), _of_prefetch(row, here), _of_misses(row, here), _of_the_link(row)]
    return "; ".join(text for text in said if text)


def _of_recency(row: Row) -> str:
    if row["eviction"] not in RECENCY or row["prefetch"] != "none" or number(row, "cycles") >= 1:
        return ""
    hits = percent(row, "hit_rate")
    return f"below one token cycle recency {'cannot hit' if hits < 0.5 else f'hits only {hits:.0f} %'}"


def _of_prefetch(row: Row, here: Sequence[Row]) -> str:
    plain = [other for other in here if other["eviction"] == row["eviction"] and other["prefetch"] == "none"]
    if row["prefetch"] == "none":
        return ""
    ahead = number(row, "bytes_prefetch_used") + number(row, "bytes_prefetch_wasted")
    if not ahead:
        return "all that it would prefetch is cached already"
    wasted = f"prefetch wasted {100 * number(row, 'bytes_prefetch_wasted') / ahead:.0f} % of its bytes"
    if not plain:
        return wasted
    slower = change(row, plain[0])
    if abs(slower) < 0.005:
        return f"{wasted}: as fast as without"
    return f"{wasted}: {abs(100 * slower):.0f} % {'slower' if slower > 0 else 'faster'} than without"


def _of_misses(row: Row, here: Sequence[Row]) -> str:
    lru = [other for other in here if other["eviction"] == "lru" and other["prefetch"] == row["prefetch"]]
    if not lru or lru[0] is row or not number(lru[0], "misses"):
        return ""
    fewer = 100 * (1 - number(row, "misses") / number(lru[0], "misses"))
    if abs(fewer) < 0.5:
        return "as many misses as lru"
    return f"{abs(fewer):.0f} % {'fewer' if fewer > 0 else 'more'} misses than lru"


def _of_the_link(row: Row) -> str:
    busy, waits = percent(row, "link_utilisation"), percent(row, "stall_share")
    if busy > 75:
        return f"link bound: copies fill {busy:.0f} % of the time"
    return f"device bound: it waits {waits:.0f} % of the time" if waits < 25 else f"waits {waits:.0f} % of the time"


def mix(row: Row) -> tuple[str, str]:
    """Gives the eviction policy and the predictor."""
    return str(row["eviction"]), str(row["prefetch"])


def percent(row: Row, name: str) -> float:
    """Gives a share in %."""
    return 100 * number(row, name)


def change(row: Row, base: Row) -> float:
    """Gives the change of TPOT, as a share."""
    return number(row, "tpot_s") / number(base, "tpot_s") - 1
