"""A sweep as a table that a person reads in a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from specmd_jax.report.columns import Row
from specmd_jax.report.pages.sweep.series import LOWER_BOUNDS, hardware_of, near, one_setting
from specmd_jax.report.rows import number
from specmd_jax.report.terminal import WIDTH, aligned, width_of, widths_of
from specmd_jax.units import GIB, MIB

CAPACITIES_PCT = (5.0, 10.0, 25.0, 50.0)
TRAINED = ("learned",)  # before the replay, on some trace

HEAD = ("policy", "hit %", "misses", "collisions", "GiB moved", "MiB/token", "gap closed %")


def summary(rows: Sequence[Row], capacities_pct: Sequence[float] = CAPACITIES_PCT, width: int = WIDTH) -> str:
    """Blocks of policies, best hit rate first, at the capacities nearest to `capacities_pct` and to one token cycle.

    A block names its capacity in %, slots, MiB and token cycles and warns below one cycle. As many columns of tokens
    per second, one per kind of hardware, are added as fit into `width`. Raises `SpecmdError` if `rows` mix settings.
    """
    setting, kinds = one_setting(rows), hardware_of(rows)
    head = [*HEAD, *(f"tok/s {kind}" for kind in kinds)]
    blocks = [[row for row in rows if number(row, "capacity_bytes") == size] for size in near(rows, capacities_pct)]
    bodies = [table(block) for block in blocks]
    widths = widths_of(head, list(itertools.chain(*bodies)))
    while len(widths) > len(HEAD) and width_of(widths) > width:
        widths.pop()

    lines = [setting.title, *start_lines(rows)]
    for block, body in zip(blocks, bodies, strict=True):
        lines += ["", f"capacity {size_line(block[0])}"]
        if warning := small_cache_warning(block[0]):
            lines.append(f"! {warning}")
        lines += aligned(head, body, widths)
    lines.append("")
    if any(row["eviction"] in LOWER_BOUNDS for row in rows):
        lines.append("* sees the future: a bound, not a policy to run")
    if any(row["eviction"] in TRAINED for row in rows):
        lines.append("learned: its weights may have seen these requests; python -m experiments.evaluate_learned tells")
    if left_out := head[len(widths) :]:
        lines.append(f"no room for {', '.join(left_out)}: see rows.csv")
    return "\n".join(lines).rstrip()


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Gives the cells of one capacity under `HEAD`, then tokens per second on each hardware; best hit rate first."""
    kinds = hardware_of(rows)
    counted = [row for row in rows if row["hardware"] == (kinds[0] if kinds else None)]
    counted.sort(key=lambda row: (-number(row, "hit_rate"), str(row["eviction"])))
    rates = {(row["eviction"], row["hardware"]): _figure(number(row, "tokens_per_s"), 2) for row in rows}
    return [[*_cells(row), *(rates.get((row["eviction"], kind), "-") for kind in kinds)] for row in counted]


def size_line(row: Row) -> str:
    """Gives a capacity in every unit, e.g. ``25.0 % of the experts = 192 slots (8 a layer) = 2,304 MiB = 2.00 C/T``."""
    return (
        f"{number(row, 'capacity_pct'):.4g} % of the experts = {number(row, 'capacity_slots'):,.6g} slots "
        f"({number(row, 'capacity_slots_per_layer'):.4g} a layer) = {number(row, 'capacity_bytes') / MIB:,.0f} MiB "
        f"= {number(row, 'cycles'):.2f} C/T"
    )


def best_online(rows: Sequence[Row]) -> Row | None:
    """Gives the row with the most hits among policies that see neither the future nor, in training, these requests."""
    online = [row for row in rows if row["eviction"] not in (*LOWER_BOUNDS, *TRAINED)]
    return max(online, key=lambda row: number(row, "hit_rate")) if online else None


def start_lines(rows: Sequence[Row]) -> list[str]:
    """Gives what to say of caches that do not begin empty, or let not every copy in; nothing of tables without that."""
    row, lines = rows[0], []
    if row.get("pin_share"):
        lines.append(f"{100 * number(row, 'pin_share'):g} % of the cache is pinned for good")
    if row.get("admission") not in (None, "always"):
        lines.append(f"admission: {row['admission']}")
    return lines + [f"profile: {known}" for known in dict.fromkeys(row.get("profile") for row in rows) if known]


def small_cache_warning(row: Row) -> str | None:
    """Gives what to say of a cache that holds less than one token cycle; None for a larger one."""
    if number(row, "cycles") >= 1:
        return None
    return "smaller than one token cycle (C/T < 1): recency is useless here, a global LRU hits nothing in decode"


def _cells(row: Row) -> list[str]:
    moved = sum(number(row, name) for name in ("bytes_demand", "bytes_prefetch_used", "bytes_prefetch_wasted"))
    tokens = number(row, "tokens")
    return [
        f"{row['eviction']}{' *' if row['eviction'] in LOWER_BOUNDS else ''}",
        _figure(100 * number(row, "hit_rate"), 2),
        _figure(number(row, "misses"), 0),
        _figure(number(row, "collisions"), 0),
        _figure(moved / GIB, 1 if moved < 1000 * GIB else 0),
        _figure(moved / MIB / tokens if tokens else float("nan"), 1),
        _figure(100 * number(row, "gap_closed"), 1),
    ]


def _figure(value: float, digits: int) -> str:
    return "-" if value != value else f"{value:,.{digits}f}"
