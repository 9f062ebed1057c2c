"""The page of a recommendation: the answer in words, then the mixes, what memory buys, and how the answer moves."""

from __future__ import annotations

import math
from typing import Any

from specmd_jax.report.charts import SERIES, Chart, Field, bars, lines
from specmd_jax.report.columns import Row, Scalar
from specmd_jax.report.document import Document, Said
from specmd_jax.report.pages.recommend.advice import (
    Answer,
    cold_lines,
    headline,
    holdings_of,
    meaning,
    memory_lines,
    moved_by,
    on_host,
    proxies_of,
    target_line,
    variant_of,
)
from specmd_jax.report.pages.recommend.elsewhere import elsewhere
from specmd_jax.report.pages.recommend.front import front
from specmd_jax.report.pages.recommend.reasons import change, mix, reason
from specmd_jax.report.pages.recommend.ties import interval, tied
from specmd_jax.report.rows import mix_name, number
from specmd_jax.report.style import looks
from specmd_jax.units import GIB, MIB

NAMED = 5
GIBS = Field("gib", "accelerator memory in all, GiB", ".2f")
TPOT = Field("tpot", "TPOT, ms", ",.2f")
COPIED = Field("copied", "MiB copied a token", ",.4~g")
TOLD = (
    Field(SERIES, "mix"),
    GIBS,
    Field("pct", "experts cached, %", ".1f"),
    Field("cycles", "token cycles", ".2f"),
    TPOT,
    Field("rate", "tokens a second", ",.1f"),
    Field("ttft", "TTFT, s", ".3~g"),
    COPIED,
    Field("stall", "stall, % of the time", ".1f"),
    Field("hit", "hit rate, %", ".1f"),
)
ALL = (
    Field("study", "study"),
    Field("variant", "what"),
    *TOLD,
    Field("low", "TPOT from, ms", ",.2f"),
    Field("high", "to, ms", ",.2f"),
    Field("evidence", "evidence"),
)


def fill(page: Document, answer: Answer) -> None:
    """Adds everything that the rows support."""
    best = answer.best
    evidence = str(best["evidence"])
    said = [headline(answer), *(line[0].upper() + line[1:] for line in meaning(answer))]
    said += [line for line in (on_host(answer), target_line(answer) if answer.target_s is not None else None) if line]
    said += [line for line in cold_lines(answer) if line]
    page.answer([Said(line, evidence) for line in said])

    rows = [*answer.grid, *answer.others]
    page.data("rows", [record(row) for row in rows])
    page.data("curve", [record(row) for row in answer.grid])
    page.filters(eviction="eviction", prefetch="prefetch", study="study (table)")
    ranked = list(dict.fromkeys(mix_name(*mix(row)) for row in [*answer.here, *rows]))
    found = looks(sorted(ranked))
    named = [*ranked[:NAMED], *(["lru"] if "lru" in ranked[NAMED:] else [])]
    page.series({name: found[name] for name in ranked}, named, "mixes, fastest first")

    page.chart(_mixes(page, answer))
    if len({row["memory_bytes"] for row in answer.grid}) > 1:
        for chart in _curves(page, answer):
            page.chart(chart)
    page.chart(_memory(page, answer))
    if answer.others:
        page.chart(_moves(page, answer))
    page.heading("Where the memory goes")
    page.verbatim("\n".join(memory_lines(answer)))
    page.heading("The same memory elsewhere")
    page.text("The nearest setting of other engines, from sizes alone; no speed is meant.")
    page.verbatim("\n".join(elsewhere(holdings_of(answer))))
    page.heading("All cells")
    page.rows("rows", ALL, "Every cell that was replayed")


def record(row: Row) -> dict[str, Scalar]:
    """Gives what the page holds of a row."""
    ends = interval(row) if row["request_decode_s"] is not None else None
    eviction, prefetch = mix(row)
    return {
        SERIES: mix_name(eviction, prefetch),
        "eviction": eviction,
        "prefetch": prefetch,
        "study": str(row["study"]),
        "variant": variant_of(row),
        "gib": number(row, "memory_bytes") / GIB,
        "pct": number(row, "capacity_pct"),
        "cycles": number(row, "cycles"),
        "tpot": 1e3 * number(row, "tpot_s"),
        "rate": number(row, "tokens_per_s"),
        "ttft": number(row, "ttft_s"),
        "copied": number(row, "bytes_per_token") / MIB,
        "stall": 100 * number(row, "stall_share"),
        "hit": 100 * number(row, "hit_rate"),
        "low": None if ends is None else 1e3 * ends[0],
        "high": None if ends is None else 1e3 * ends[1],
        "evidence": str(row["evidence"]),
    }


def _kind(answer: Answer) -> str:
    return str(answer.best["evidence"]).split()[0]


def _mixes(page: Document, answer: Answer) -> Chart:
    """Ranks the mixes at the memory that is there."""
    best = answer.best
    page.data(
        "here",
        [
            record(row)
            | {
                "label": mix_name(*mix(row)),
                "place": "recommended" if row is best else "a tie with it" if tied(row, best) else "slower",
                "why": reason(row, answer.here),
            }
            for row in answer.here
        ],
    )
    ties = sum(tied(row, best) for row in answer.here) - 1
    others = [row for row in answer.here if not tied(row, best)]
    title = f"{mix_name(*mix(best))} takes {1e3 * number(best, 'tpot_s'):.1f} ms a token"
    if others:
        title += f"; the next that is no tie takes {100 * change(others[0], best):.0f} % more"
    if ties:
        title += f", {ties} {'is a tie' if ties == 1 else 'are ties'} with it"
    words = "; ".join(f"{mix_name(*mix(row))} {1e3 * number(row, 'tpot_s'):.1f} ms" for row in answer.here)
    spec = bars(
        Field("label", "mix"), TPOT, (*TOLD, Field("why", "why")), table="here", low="low", high="high",
        group=None, order=[mix_name(*mix(row)) for row in answer.here],
    )  # fmt: skip
    spec["layer"][0]["encoding"]["color"] = {
        "field": "place", "type": "nominal", "title": None, "legend": {"orient": "bottom"},
        "scale": {"domain": ["recommended", "a tie with it", "slower"], "range": ["@blue", "@teal", "@faint"]},
    }  # fmt: skip
    note = "Lines: 95 % intervals over requests. Within 1 %, or not told apart by the requests, is a tie."
    return Chart(f"{title} ({_kind(answer)})", f"Time of a token for each mix: {words}.", spec, ("here",), note=note)


def _curves(page: Document, answer: Answer) -> list[Chart]:
    """What more or less memory buys."""
    best, kept = answer.best, front(answer.grid, "tpot_s")
    page.data("asked", [{"at": number(best, "memory_bytes") / GIB, "text": "asked"}])
    page.data("front", [record(row) for row in kept])
    told: dict[str, Any] = {"table": "curve", "marks": "asked", "dots": True, "x_scale": {"zero": False}}
    more = [row for row in kept if number(row, "memory_bytes") > 1.05 * number(best, "memory_bytes")]
    title = "More memory than asked for buys nothing that was tried"
    if more:
        half = next((row for row in more if number(row, "tpot_s") <= 0.5 * number(best, "tpot_s")), more[-1])
        title = (
            f"{number(half, 'memory_bytes') / GIB:.3g} GiB take {1e3 * number(half, 'tpot_s'):.3g} ms a token "
            f"instead of {1e3 * number(best, 'tpot_s'):.3g}"
        )
    words = "Pareto front of TPOT against memory: " + "; ".join(
        f"{number(row, 'memory_bytes') / GIB:.2f} GiB {mix_name(*mix(row))} {1e3 * number(row, 'tpot_s'):.2f} ms"
        for row in kept
    )
    speed = lines(GIBS, TPOT, TOLD, **told, y_scale={"zero": True})
    ring = {
        "data": {"name": "front"},
        "mark": {"type": "point", "size": 110, "color": "@ink", "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "gib", "type": "quantitative"},
            "y": {"field": "tpot", "type": "quantitative"},
        },
    }
    speed["layer"].insert(0, ring)
    if answer.target_s is not None:
        rule = {"mark": {"type": "rule", "color": "@red"}, "encoding": {"y": {"datum": 1e3 * answer.target_s}}}
        speed["layer"].insert(0, {"data": {"name": "asked"}, **rule})
    where = ("curve", "asked", "front")
    note = "Rings: the Pareto front, nothing is better with less." + (
        " Line across: the target." if answer.target_s is not None else ""
    )
    copied = lines(GIBS, COPIED, TOLD, **told, y_scale={"zero": True})
    least = min(answer.grid, key=lambda row: number(row, "bytes_per_token"))
    return [
        Chart(f"{title} ({_kind(answer)})", words, speed, where, _ends("tpot"), note=note),
        Chart(
            f"{number(best, 'bytes_per_token') / MIB:.4g} MiB are copied for each token at the memory asked for "
            f"({_kind(answer)})",
            f"Bytes over the link for each token against memory; the least is "
            f"{number(least, 'bytes_per_token') / MIB:.4g} MiB, with {number(least, 'memory_bytes') / GIB:.4g} GiB.",
            copied, ("curve", "asked"), _ends("copied"),
        ),
    ]  # fmt: skip


def _ends(y: str) -> dict[str, str]:
    return {"table": "curve", "x": "gib", "y": y}


def _memory(page: Document, answer: Answer) -> Chart:
    """Where the memory goes."""
    asked = answer.asked
    left = asked["memory_bytes"] - sum(asked["parts"].values())
    parts = asked["parts"] | {"cached experts": left}
    page.data(
        "parts",
        [
            {"part": name, "gib": size / GIB, "assumed": asked["assumed"].get(name, "worked out from shapes")}
            for name, size in parts.items()
        ],
    )
    told = (Field("part", "part"), Field("gib", "GiB", ".3f"), Field("assumed", "how"))
    spec = bars(told[0], told[1], told, table="parts", order=list(parts))
    words = "; ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items())
    title = f"{left / GIB:.2f} of {asked['memory_bytes'] / GIB:.4g} GiB are left for cached experts (from sizes)"
    return Chart(title, f"Parts of the memory: {words}.", spec, ("parts",))


def _moves(page: Document, answer: Answer) -> Chart:
    """How the answer moves when something else is changed."""
    best = answer.best
    rows = [row for row in answer.others if row["study"] != "cold" and not math.isnan(number(row, "tpot_s"))]
    page.data(
        "moves",
        [
            record(row)
            | {
                "label": f"{row['study']}: {variant_of(row)}",
                "change": 100 * change(row, best),
                "moved": moved_by(row, best),
                "quality": proxies_of(row) or "-",
                "kind": _change_kind(row, best),
            }
            for row in rows
        ],
    )
    told = (Field("label", "what"), Field("change", "change of TPOT, %", "+.1f"), TPOT, Field("quality", "quality"))
    spec = bars(told[0], told[1], told, table="moves", order="x")
    spec["layer"][0]["encoding"]["color"] = {
        "field": "kind", "type": "nominal", "title": None, "legend": {"orient": "bottom"},
        "scale": {"domain": ["faster", "a tie", "slower"], "range": ["@teal", "@faint", "@red"]},
    }  # fmt: skip
    words = "; ".join(f"{row['study']} {variant_of(row)}: {moved_by(row, best)}" for row in rows)
    fair = [
        row for row in rows if row["study"] in ("host", "link", "reading")
    ]  # bounds cannot be run, bits cost quality
    fastest = min(fair, key=lambda row: number(row, "tpot_s"), default=best)
    title = f"{variant_of(fastest)} would take {-100 * change(fastest, best):.0f} % less time a token"
    if change(fastest, best) >= 0:
        title = "Nothing else that was tried is faster"
    return Chart(f"{title} ({_kind(answer)})", f"Change of TPOT with the same cache bytes: {words}.", spec, ("moves",))


def _change_kind(row: Row, best: Row) -> str:
    return "a tie" if tied(row, best) else "faster" if change(row, best) < 0 else "slower"


def short_title(answer: Answer) -> str:
    """States the answer in a line that a tab can show."""
    best = answer.best
    return (
        f"Run {mix_name(*mix(best))}: {number(best, 'tokens_per_s'):.1f} tokens/s of {best['model']} in "
        f"{number(best, 'memory_bytes') / GIB:.4g} GiB on {best['hardware']}"
    )
