"""Rows of a recommendation -> tables and plain words. Every reason is a rule over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.recommend.front import front
from specmd_jax.report.rows import number
from specmd_jax.report.terminal import aligned
from specmd_jax.units import GIB, MB

RECENCY = ("lru", "fifo", "slru")
_SPEED_HEAD = ("TTFT s", "TPOT ms", "tok/s", "MB/token", "stall %")


class Answer(NamedTuple):
    """Rows of `experiments.recommend`, sorted out."""

    grid: list[Row]  # the candidates at every capacity
    here: list[Row]  # of them, those at the capacity asked for, best first
    others: list[Row]  # what was changed about the best one
    target_s: float | None
    reach: Row | None  # the least memory that decodes a token in `target_s`

    @property
    def best(self) -> Row:
        return self.here[0]


def sort_out(rows: Sequence[Row], capacity_bytes: int, target_s: float | None = None) -> Answer:
    """`capacity_bytes` is the cache that was asked for."""
    grid = [row for row in rows if row["study"] == "grid"]
    here = sorted((row for row in grid if row["capacity_bytes"] == capacity_bytes), key=rank)
    others = [row for row in rows if row["study"] != "grid" and row["capacity_bytes"] == capacity_bytes]
    fast = [] if target_s is None else [row for row in front(grid, "tpot_s") if number(row, "tpot_s") <= target_s]
    return Answer(grid, here, others, target_s, fast[0] if fast else None)


def rank(row: Row) -> tuple[float, float]:
    """Less is better: TPOT, then TTFT."""
    return number(row, "tpot_s"), number(row, "ttft_s")


def advice(answer: Answer) -> str:
    """Gives the ranked table, the front, the target, the sensitivity and the answer in words."""
    best = answer.best
    ranked = [
        (str(place), *_mix(row), *_speed(row), f"{_percent(row, 'hit_rate'):.1f}", reason(row, answer.here))
        for place, row in enumerate(answer.here, start=1)
    ]
    steps = [
        (
            f"{number(row, 'memory_bytes') / GIB:.2f}",
            f"{number(row, 'capacity_pct'):.1f}",
            f"{number(row, 'cycles'):.2f}",
            *_mix(row),
            *_speed(row),
        )
        for row in front(answer.grid, "tpot_s")
    ]
    moved = [("as asked", f"event, {number(best, 'slot_bits'):.3g} bits", *_speed(best), "", "")]
    moved += [
        (str(row["study"]), _variant(row), *_speed(row), f"{100 * _change(row, best):+.1f} %", _proxies(row))
        for row in answer.others
    ]
    size = f"{number(best, 'memory_bytes') / GIB:.4g} GiB"
    lines = [f"With {size}, best first ({best['evidence']}):"]
    lines += aligned(("", "eviction", "prefetch", *_SPEED_HEAD, "hit %", "why"), ranked)
    lines += ["", f"What more or less memory buys, Pareto front of TPOT against memory ({best['evidence']}):"]
    lines += aligned(("GiB", "% cached", "C/T", "eviction", "prefetch", *_SPEED_HEAD), steps)
    if answer.target_s is not None:
        lines += ["", _target(answer)]
    lines += [
        "",
        f"How the answer moves, {' + '.join(_mix(best))} unless named, same cache bytes ({best['evidence']}):",
    ]
    lines += aligned(("what", "", *_SPEED_HEAD, "change of TPOT", "proxies of quality"), moved)
    return "\n".join([*lines, "", paragraph(answer)])


def reason(row: Row, here: Sequence[Row]) -> str:
    """Says why a mix stands where it stands among the mixes at the same capacity."""
    if number(row, "capacity_pct") >= 100:
        return "everything fits: each expert is copied once"
    said = [_of_recency(row), _of_prefetch(row, here), _of_misses(row, here), _of_the_link(row)]
    return "; ".join(text for text in said if text)


def _of_recency(row: Row) -> str:
    if row["eviction"] not in RECENCY or row["prefetch"] != "none" or number(row, "cycles") >= 1:
        return ""
    hits = _percent(row, "hit_rate")
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
    slower = _change(row, plain[0])
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
    busy, waits = _percent(row, "link_utilisation"), _percent(row, "stall_share")
    if busy > 75:
        return f"link bound: copies fill {busy:.0f} % of the time"
    return f"device bound: it waits {waits:.0f} % of the time" if waits < 25 else f"waits {waits:.0f} % of the time"


def paragraph(answer: Answer) -> str:
    """Gives the answer in plain words."""
    best, here = answer.best, answer.here
    ahead = "" if best["prefetch"] == "none" else f" with {best['prefetch']} prefetching"
    words = [
        f"Run {best['eviction']}{ahead}: with {number(best, 'memory_bytes') / GIB:.4g} GiB, "
        f"{number(best, 'capacity_pct'):.0f} % of the experts of {best['model']} stay on the accelerator, and over "
        f"{best['hardware']} a decode pass takes {1e3 * number(best, 'tpot_s'):.1f} ms "
        f"({number(best, 'tokens_per_s'):.1f} tokens/s); {_percent(best, 'stall_share'):.0f} % of the time goes into "
        "waiting for copies."
    ]
    if len(here) > 1:
        close = sum(_change(row, best) < 0.02 for row in here[1:])
        near = "Nothing else is" if not close else f"{close} other mix{' is' if close == 1 else 'es are'}"
        words.append(
            f"{near} within 2 % of it; the worst tried ({' + '.join(_mix(here[-1]))}) takes "
            f"{1 + _change(here[-1], best):.2f} times as long."
        )
    more = [row for row in front(answer.grid, "tpot_s") if number(row, "memory_bytes") > number(best, "memory_bytes")]
    if more:
        words.append(
            f"The next step up that helps, {number(more[0], 'memory_bytes') / GIB:.1f} GiB, gives "
            f"{1e3 * number(more[0], 'tpot_s'):.1f} ms; the largest, {number(more[-1], 'memory_bytes') / GIB:.1f} GiB, "
            f"{1e3 * number(more[-1], 'tpot_s'):.1f} ms."
        )
    if answer.target_s is not None:
        words.append("The target is within reach." if answer.reach else "Nothing that was tried reaches the target.")
    for study, text in (
        ("contract", "Counting each expert as an event of its own, TPOT changes by"),
        ("reading", "Other readings of Least-Stale change it by"),
        ("precision", "Slots of another precision change it by"),
    ):
        moved = [
            f"{100 * _change(row, best):+.0f} % ({row['variant']})" for row in answer.others if row["study"] == study
        ]
        if moved:
            words.append(f"{text} {', '.join(moved)}.")
    return " ".join([*words, f"All of it is {best['evidence']}."])


def _target(answer: Answer) -> str:
    assert answer.target_s is not None
    asked = f"Target TPOT {1e3 * answer.target_s:g} ms:"
    if answer.reach is None:
        fastest = 1e3 * min(number(row, "tpot_s") for row in answer.grid)
        return f"{asked} out of reach; the fastest tried takes {fastest:.2f} ms ({answer.best['evidence']})"
    reach = answer.reach
    return (
        f"{asked} the least memory tried that reaches it is {number(reach, 'memory_bytes') / GIB:.2f} GiB, a cache of "
        f"{number(reach, 'capacity_pct'):.1f} % of the experts, {' + '.join(_mix(reach))}: "
        f"{1e3 * number(reach, 'tpot_s'):.2f} ms ({reach['evidence']})"
    )


def _mix(row: Row) -> tuple[str, str]:
    return str(row["eviction"]), str(row["prefetch"])


def _speed(row: Row) -> tuple[str, ...]:
    """Under `_SPEED_HEAD`."""
    return (
        f"{number(row, 'ttft_s'):.3g}",
        f"{1e3 * number(row, 'tpot_s'):.2f}",
        f"{number(row, 'tokens_per_s'):.1f}",
        f"{number(row, 'bytes_per_token') / MB:.1f}",
        f"{_percent(row, 'stall_share'):.0f}",
    )


def _percent(row: Row, name: str) -> float:
    return 100 * number(row, name)


def _change(row: Row, base: Row) -> float:
    """Gives the change of TPOT, as a share."""
    return number(row, "tpot_s") / number(base, "tpot_s") - 1


def _variant(row: Row) -> str:
    named = {"lossy": f"{row['miss']}, {row['variant']}", "reading": f"least_stale {row['variant']}"}
    return named.get(str(row["study"]), str(row["variant"]))


def _proxies(row: Row) -> str:
    if row["study"] not in ("lossy", "precision"):
        return ""
    lost = f"{_percent(row, 'lost_mass'):.1f} % of gate mass lost, " if row["study"] == "lossy" else ""
    return f"{lost}{number(row, 'mean_bits'):.2f} bits on average"
