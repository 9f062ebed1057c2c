"""The data and the charts of a sweep's page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from specmd_jax.report.charts import SERIES, Chart, Field, heat, lines
from specmd_jax.report.columns import Row, Scalar
from specmd_jax.report.pages.sweep.answer import stall_ms, winners
from specmd_jax.report.pages.sweep.series import (
    LOWER_BOUNDS,
    Setting,
    curves,
    hardware_of,
    mean_hit_rate,
    near,
    one_cycle,
    per_1000,
)
from specmd_jax.report.pages.sweep.summary import CAPACITIES_PCT, TRAINED
from specmd_jax.report.rows import number
from specmd_jax.units import GIB

MOST = 6000
"""Records in a page at most; more capacities than fit are thinned, and the page says so."""
NAMED = 5  # policies that are named at first, besides the bounds
CYCLES = (1, 2, 4, 8)

SIZE = Field("pct", "cache size, % of all experts", ".4~g")
HIT = Field("hit", "hit rate, %", ".2f")
MISSES = Field("misses", "misses per 1000 demanded experts", ",.4~g")
COLLISIONS = Field("collisions", "collisions per 1000 demanded experts", ",.4~g")
STALL = Field("stall", "stall, ms a token", ",.4~g")
SPEED = Field("rate", "tokens a second", ",.4~g")
COUNTED = (
    Field(SERIES, "policy"),
    SIZE,
    Field("gib", "GiB", ".3~f"),
    Field("cycles", "token cycles", ".3~f"),
    HIT,
    MISSES,
    COLLISIONS,
    Field("moved", "MiB copied a token", ",.4~g"),
    Field("gap", "gap closed, lru to belady, %", ".1f"),
)
TIMES = (Field("ttft", "TTFT, s", ".4~g"), Field("tpot", "TPOT, ms", ".4~g"))
TIMED = (Field("hardware", "hardware"), STALL, SPEED, *TIMES)

Records = list[dict[str, Scalar]]


def label_of(setting: Setting, every: Iterable[Setting]) -> str:
    """Gives what tells a setting from the others of its table."""
    apart = [name for name in Setting._fields if len({getattr(one, name) for one in every}) > 1]
    return ", ".join(f"{name} {getattr(setting, name)}" for name in apart) or setting.title


def thinned(groups: Mapping[Setting, Sequence[Row]]) -> tuple[dict[Setting, list[Row]], int]:
    """Gives rows at as many capacities as a page holds, and every how many-th that is."""
    total = sum(map(len, groups.values()))
    step = -(-total // MOST)
    found: dict[Setting, list[Row]] = {}
    for setting, rows in groups.items():
        sizes = sorted({number(row, "capacity_bytes") for row in rows})
        kept = {*sizes[::step], sizes[-1], *near(rows, CAPACITIES_PCT)}
        found[setting] = [row for row in rows if number(row, "capacity_bytes") in kept]
    return found, step


def records(groups: Mapping[Setting, Sequence[Row]]) -> Records:
    """Gives a record for each row."""
    found: Records = []
    for setting, rows in groups.items():
        label, timed = label_of(setting, groups), bool(hardware_of(rows))
        per = {name: per_1000(rows, name).tolist() for name in ("misses", "collisions")}
        for at, row in enumerate(rows):
            found.append(
                {
                    SERIES: str(row["eviction"]),
                    "setting": label,
                    "pct": number(row, "capacity_pct"),
                    "gib": number(row, "capacity_bytes") / GIB,
                    "cycles": number(row, "cycles"),
                    "hit": 100 * number(row, "hit_rate"),
                    "misses": per["misses"][at],
                    "collisions": per["collisions"][at],
                    "moved": _moved_mib(row),
                    "gap": 100 * number(row, "gap_closed"),
                    "hardware": row["hardware"],
                }
                | (_times(row) if timed else {})
            )
    return found


def _times(row: Row) -> dict[str, Scalar]:
    return {
        "stall": stall_ms(row),
        "rate": number(row, "tokens_per_s"),
        "ttft": number(row, "ttft_s"),
        "tpot": 1e3 * number(row, "tpot_s"),
    }


def _moved_mib(row: Row) -> float:
    moved = sum(number(row, name) for name in ("bytes_demand", "bytes_prefetch_used", "bytes_prefetch_wasted"))
    tokens = number(row, "tokens")
    return moved / tokens / 2**20 if tokens else float("nan")


def marks(groups: Mapping[Setting, Sequence[Row]]) -> Records:
    """Gives where whole token cycles lie."""
    return [
        {"setting": label_of(setting, groups), "at": times * one_cycle(rows), "text": f"{'C/T ' * (times == 1)}{times}"}
        for setting, rows in groups.items()
        for times in CYCLES
        if times * one_cycle(rows) <= max(number(row, "capacity_pct") for row in rows)
    ]


def bands(groups: Mapping[Setting, Sequence[Row]]) -> Records:
    """Gives the room above the best policy: up to belady, and from there to belady_bypass."""
    found: Records = []
    for setting, rows in groups.items():
        by_size: dict[float, dict[str, Row]] = {}
        for name, cells in curves(rows).items():
            for row in cells:
                by_size.setdefault(number(row, "capacity_pct"), {})[name] = row
        for pct, cells in sorted(by_size.items()):
            best = winners(list(cells.values()))
            ends = [100 * number(best[0], "hit_rate") if best else None]
            ends += [100 * number(cells[name], "hit_rate") if name in cells else None for name in LOWER_BOUNDS]
            texts = ("best policy to belady: what foresight adds", "belady to belady_bypass: what not admitting adds")
            for low, high, text in zip(ends, ends[1:], texts, strict=False):
                if low is not None and high is not None:
                    found.append(
                        {
                            "setting": label_of(setting, groups),
                            "pct": pct,
                            "low": min(low, high),
                            "high": high,
                            "text": text,
                        }
                    )
    return found


def order(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Gives the policies, best mean hit rate first, and those that are named at first: the best and the bounds."""
    means = {name: mean_hit_rate(cells) for name, cells in curves(rows).items()}
    names = sorted(means, key=lambda name: -means[name])
    fair = [name for name in names if name not in (*LOWER_BOUNDS, *TRAINED)]
    first = {*LOWER_BOUNDS, *fair[:NAMED], "lru"}
    return names, [name for name in names if name in first]


def size_axis(rows: Sequence[Row]) -> dict[str, Any]:
    """Labels the capacity in % and in GiB."""
    most = max(rows, key=lambda row: number(row, "capacity_pct"))
    gib_per_pct = number(most, "capacity_bytes") / number(most, "capacity_pct") / GIB
    return {
        "labelExpr": f"[datum.label + ' %', format(datum.value * {gib_per_pct!r}, '.2~f') + ' GiB']",
        "tickCount": 6,
        "grid": False,
    }


def charts(rows: Sequence[Row], words: Mapping[str, str], *, banded: bool) -> list[Chart]:
    """Gives the charts of a sweep; `rows` are those of its first setting, `words` the titles that say what is found."""
    timed = bool(hardware_of(rows))
    sizes = {row["capacity_bytes"] for row in rows}
    axis: dict[str, Any] = {"x_axis": size_axis(rows), "marks": "marks", "dots": len(sizes) < 25}
    told = [*COUNTED[:6], *(TIMED[1:3] if timed else ())]
    log: dict[str, Any] = {"y_scale": {"type": "symlog", "constant": 0.1}, "y_axis": {"values": [0, 1, 10, 100, 1000]}}
    beside = at_words(rows, "hit_rate", 100, " %")
    found = [
        Chart(
            words["hit"], f"Hit rate against cache size. {beside}",
            lines(SIZE, HIT, told, **axis, y_scale={"domain": [0, 100]}, bands="bands" if banded else "", height=430),
            ("rows", "marks", *(["bands"] if banded else [])), {"table": "rows", "x": "pct", "y": "hit"}, wide=True,
        )
    ]  # fmt: skip
    if timed:
        found += [
            Chart(
                words["stall"], "Time that the device waits for experts, for each token, against cache size.",
                lines(SIZE, STALL, told, **axis, y_scale={"zero": True}), ("rows", "marks"),
                {"table": "rows", "x": "pct", "y": "stall"},
            ),
            Chart(
                words["speed"], "Tokens a second against cache size.",
                lines(SIZE, SPEED, told, **axis, y_scale={"zero": True}), ("rows", "marks"),
                {"table": "rows", "x": "pct", "y": "rate"},
            ),
        ]  # fmt: skip
    found += [
        Chart(
            words["collisions"], "Misses on experts that were evicted earlier in the same pass, against cache size.",
            lines(SIZE, COLLISIONS, told, **axis, **log), ("rows", "marks"),
            {"table": "rows", "x": "pct", "y": "collisions"},
        ),
        Chart(
            words["misses"], "All misses against cache size, on the scale of the collisions.",
            lines(SIZE, MISSES, told, **axis, **log), ("rows", "marks"),
            {"table": "rows", "x": "pct", "y": "misses"},
        ),
    ]  # fmt: skip
    return found


def at_words(rows: Sequence[Row], name: str, scale: float, unit: str) -> str:
    """Says a column at some capacities, best policies first."""
    said = []
    for size in near(rows, CAPACITIES_PCT):
        cells = {str(row["eviction"]): row for row in rows if number(row, "capacity_bytes") == size}
        best = sorted(cells.values(), key=lambda row: -number(row, "hit_rate"))[:4]
        told = ", ".join(f"{row['eviction']} {scale * number(row, name):.1f}{unit}" for row in best)
        said.append(f"At {number(best[0], 'capacity_pct'):.3g} %: {told}.")
    return " ".join(said)


def routing(counts: Sequence[Sequence[int]]) -> tuple[Records, Chart]:
    """Gives how often each expert is routed to, over the uniform share."""
    table = np.array(counts, np.float64)
    total = table.sum(axis=1, keepdims=True)
    share = table.shape[1] * np.divide(table, total, out=np.zeros_like(table), where=total > 0)
    found: Records = [
        {"layer": layer, "expert": expert, "share": float(value)} for (layer, expert), value in np.ndenumerate(share)
    ]
    ordered = -np.sort(-share, axis=1)
    quarter = max(1, share.shape[1] // 4)
    top = 100 * ordered[:, :quarter].sum() / max(share.sum(), 1e-9)
    spec = heat(
        Field("expert", "expert"), Field("layer", "MoE layer"), Field("share", "routed tokens over the uniform share"),
        (Field("layer", "layer"), Field("expert", "expert"), Field("share", "over the uniform share", ".2f")),
        table="routing", height=min(520, 60 + 14 * share.shape[0]),
        scale={"domain": [0, float(np.quantile(share, 0.995)) or 1.0], "clamp": True},
    )  # fmt: skip
    words = (
        f"How often each of {share.shape[0]} x {share.shape[1]} experts is routed to, over the uniform share. The most "
        f"used one gets {share.max():.1f} times its share."
    )
    title = f"The most used quarter of each layer's experts gets {top:.0f} % of the routes (as recorded in the trace)"
    return found, Chart(title, words, spec, ("routing",), wide=True)


def reuse(counts: Sequence[Sequence[int]]) -> tuple[Records, Chart]:
    """Gives how many tokens ago an expert was used last, layer by layer; the last column are first uses."""
    table = np.array(counts, np.float64)
    total = np.maximum(table.sum(axis=1, keepdims=True), 1)
    share = 100 * table / total
    last = table.shape[1] - 2
    between = (f"{2 ** (at - 1) + 1} to {2**at}" for at in range(2, last))
    names = ["1", "2", *between, f"over {2 ** (last - 1)}", "never"]
    found: Records = [
        {"layer": layer, "ago": names[at], "share": float(value)} for (layer, at), value in np.ndenumerate(share)
    ]
    whole = 100 * table.sum(axis=0) / max(table.sum(), 1)
    told = (Field("layer", "layer"), Field("ago", "tokens ago"), Field("share", "uses, %", ".1f"))
    spec = heat(
        Field("ago", "tokens since the expert's last use in the request"), Field("layer", "MoE layer"),
        Field("share", "share of the layer's uses, %"), told, table="reuse", height=min(520, 60 + 14 * len(counts)),
    )  # fmt: skip
    words = "; ".join(f"{name} tokens ago {value:.1f} %" for name, value in zip(names, whole, strict=True))
    title = (
        f"Reuse distances: {whole[0]:.0f} % of the uses repeat the token before, {whole[:4].sum():.0f} % one of the "
        "last 8 (as recorded in the trace)"
    )
    return found, Chart(title, f"When an expert was used last before a use: {words}.", spec, ("reuse",), wide=True)
