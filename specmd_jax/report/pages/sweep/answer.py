"""What a sweep says, in words: which policy, how large a cache, and what foresight would add."""

from __future__ import annotations

from collections.abc import Sequence

from specmd_jax.report.columns import Row
from specmd_jax.report.document import Said
from specmd_jax.report.pages.sweep.series import LOWER_BOUNDS, curves, hardware_of, mean_hit_rate, near, one_setting
from specmd_jax.report.pages.sweep.summary import CAPACITIES_PCT, TRAINED
from specmd_jax.report.rows import number
from specmd_jax.units import GIB

TIE_PCT = 1.0
"""Policies whose misses lie within this much of the fewest share a place."""
WANTED_HITS = 0.8
BASE = "lru"
TRAINED_NOTE = "learned: trained beforehand, and its weights may have seen these very requests; never counted as best."


def winners(cells: Sequence[Row]) -> list[Row]:
    """Gives the rows of one capacity that miss least, and those that tie with it; neither bounds nor trained ones."""
    fair = [row for row in cells if row["eviction"] not in (*LOWER_BOUNDS, *TRAINED)]
    if not fair:
        return []
    least = min(number(row, "misses") for row in fair)
    best = [row for row in fair if number(row, "misses") <= least * (1 + TIE_PCT / 100)]
    return sorted(best, key=lambda row: (number(row, "misses"), str(row["eviction"])))


def at_sizes(rows: Sequence[Row]) -> list[list[Row]]:
    """Gives the rows of the first hardware at the capacities that are told of."""
    kinds = hardware_of(rows)
    mine = [row for row in rows if row["hardware"] == (kinds[0] if kinds else None)]
    return [[row for row in mine if number(row, "capacity_bytes") == size] for size in near(mine, CAPACITIES_PCT)]


def title(rows: Sequence[Row]) -> str:
    """States who is best, and where."""
    places = [(cells, winners(cells)) for cells in at_sizes(rows)]
    wins: dict[str, int] = {}
    for _, best in places:
        for row in best:
            wins[str(row["eviction"])] = wins.get(str(row["eviction"]), 0) + 1
    model = one_setting(rows).model
    if not wins:
        return f"{model}: what a policy that knows the future would hit"
    means = {name: mean_hit_rate(cells) for name, cells in curves(rows).items()}
    name = max(wins, key=lambda name: (wins[name], means[name]))
    every = len(places)
    where = "at every cache size" if wins[name] == every and every > 1 else f"at {wins[name]} of {every} cache sizes"
    tied = any(len(best) > 1 for _, best in places if name in {row["eviction"] for row in best})
    return f"{model}: {name} misses least{', or ties,' if tied else ''} {where}"


def answer(rows: Sequence[Row]) -> list[Said]:
    """Gives what follows from the rows of one setting."""
    evidence = one_setting(rows).evidence
    places = at_sizes(rows)
    middle = min(places, key=lambda cells: abs(number(cells[0], "capacity_pct") - 25))
    said = [at_one(middle), *([] if not hardware_of(rows) else speeds(rows, middle)), enough(rows)]
    small = [cells[0] for cells in places if number(cells[0], "cycles") < 1]
    if small:
        said.append(
            f"Below one token cycle ({number(small[0], 'capacity_bytes') / number(small[0], 'cycles') / GIB:.2f} GiB "
            "here) recency is useless: each token pushes out what the next one needs, and a global LRU hits nothing "
            "in decode."
        )
    trained = [row for row in middle if row["eviction"] in TRAINED]
    said += [
        f"{row['eviction']} hits {_percent(row)} there, but its weights were trained beforehand and may have seen "
        "these very requests: it is not counted among the best. python -m experiments.evaluate_learned judges it on "
        "requests that it never saw."
        for row in trained
    ]
    return [Said(text, evidence) for text in said if text]


def at_one(cells: Sequence[Row]) -> str:
    """Says who hits how much in one cache."""
    by_name = {row["eviction"]: row for row in cells}
    best = winners(cells)
    names = " and ".join(str(row["eviction"]) for row in best)
    words = [f"{names} {'tie at' if len(best) > 1 else 'hits'} {_percent(best[0])}"] if best else []
    if BASE in by_name and BASE not in {row["eviction"] for row in best}:
        words.append(f"{BASE} {_percent(by_name[BASE])}")
    if "belady" in by_name:
        words.append(f"belady, which knows the future, {_percent(by_name['belady'])}")
    first = cells[0]
    return (
        f"With {number(first, 'capacity_pct'):.3g} % of the experts cached "
        f"({number(first, 'capacity_bytes') / GIB:.2f} GiB, {number(first, 'cycles'):.2f} token cycles) "
        f"{', '.join(words)} of the demanded experts."
    )


def speeds(rows: Sequence[Row], middle: Sequence[Row]) -> list[str]:
    """Says for each kind of hardware how fast the best at a size is, beside LRU."""
    best, size = winners(middle), middle[0]["capacity_bytes"]
    said = []
    for kind in hardware_of(rows):
        cells = {row["eviction"]: row for row in rows if row["hardware"] == kind and row["capacity_bytes"] == size}
        names = [name for name in dict.fromkeys([*(row["eviction"] for row in best[:1]), BASE]) if name in cells]
        told = [
            f"{name} {number(cells[name], 'tokens_per_s'):.3g} tokens/s, of which each waits "
            f"{stall_ms(cells[name]):.3g} ms for experts"
            for name in names
        ]
        if told:
            said.append(f"On {kind} there: {'; '.join(told)}.")
    return said


def enough(rows: Sequence[Row]) -> str:
    """Says how large a cache must be for most demanded experts to be hits."""
    lines = curves(rows)
    least: dict[str, Row] = {}
    for name, cells in lines.items():
        found = next((row for row in cells if number(row, "hit_rate") >= WANTED_HITS), None)
        if found is not None and name not in (*LOWER_BOUNDS, *TRAINED):
            least[name] = found
    if not least:
        return ""
    name = min(least, key=lambda name: (number(least[name], "capacity_bytes"), -mean_hit_rate(lines[name])))
    other = f", {BASE} takes {_gib(least[BASE])}" if BASE in least and _gib(least[BASE]) != _gib(least[name]) else ""
    return f"To hit {100 * WANTED_HITS:.0f} % the least cache tried is {_gib(least[name])}, with {name}{other}."


def stall_ms(row: Row) -> float:
    """Gives the time that the device waits for experts, for each token."""
    tokens = number(row, "tokens")
    return 1e3 * number(row, "stall_s") / tokens if tokens else float("nan")


def _gib(row: Row) -> str:
    return f"{number(row, 'capacity_bytes') / GIB:.2f} GiB ({number(row, 'capacity_pct'):.0f} % of the experts)"


def _percent(row: Row) -> str:
    return f"{100 * number(row, 'hit_rate'):.1f} %"
