"""The page of `experiments.least_stale`, drawn from its table alone: curves, check table, findings. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from configs.least_stale import CHECK, CHECK_TOKENS
from specmd_jax.report import figures
from specmd_jax.report.claims import Case, held, judge
from specmd_jax.report.document import Document
from specmd_jax.report.series import number
from specmd_jax.report.style import looks
from specmd_jax.report.table import FIGURES, Column, Row, read_manifest, read_rows

READINGS = ("least_stale", "least_stale_left_first", "least_stale_literal", "least_stale_recency")
POLICIES = ("lru", *READINGS, "belady")
KEY = ("trace", "tokens", "prefetch", "eviction", "capacity_bytes")
COLUMNS: dict[str, Column] = {
    "trace": Column("str", "recorded trace"),
    "tokens": Column("int", "tokens asked for; a shorter trace is replayed whole"),
    "prefetch": Column("str", "predictor"),
    "eviction": Column("str", "eviction policy"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_slots": Column("int", "cache size in experts of the largest size"),
    "capacity_pct": Column("float", "cache size as a share of all experts, in %"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "demand": Column("int", "demanded experts, summed over decode visits"),
    "hits": Column("int", "demanded experts that were resident"),
    "hits_late": Column("int", "hits whose copy was still in flight"),
    "misses": Column("int", "demanded experts that were not resident"),
    "collisions": Column("int", "misses on experts evicted earlier in the same pass"),
    "loads": Column("int", "copies over the link, prefetched ones included"),
    "stall_s": Column("float", "time that the device waits for experts; empty without prefetch"),
}
TIE_PCT = 1.0
"""Within this much of LRU a policy ties with it."""


class Curves:
    """Rows by (trace, tokens, prefetch) and policy, by rising capacity."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.studies: dict[tuple[str, int, str], dict[str, list[Row]]] = {}
        for row in sorted(rows, key=lambda row: number(row, "capacity_bytes")):
            study = (str(row["trace"]), int(number(row, "tokens")), str(row["prefetch"]))
            self.studies.setdefault(study, {}).setdefault(str(row["eviction"]), []).append(row)

    @property
    def main(self) -> list[tuple[str, int, str]]:
        """The longest study of each trace without prefetch."""
        most = max(tokens for _, tokens, _ in self.studies)
        return [s for s in self.studies if s[1:] == (most, "none")]

    @property
    def prefetched(self) -> list[tuple[str, int, str]]:
        return [s for s in self.studies if s[2] != "none"]


def cost(row: Row) -> float:
    """What a policy is judged by: its stall where there is prefetch (late copies count), else its misses."""
    return number(row, "misses") if row["stall_s"] is None else number(row, "stall_s")


def against_lru(lines: dict[str, list[Row]], policy: str) -> list[tuple[float, float]]:
    """(C/T, change of the cost against LRU in %) at each capacity."""
    pairs = zip(lines["lru"], lines[policy], strict=True)
    return [
        (number(a, "cycles"), 0.0 if cost(a) == cost(b) else 100 * (cost(b) / cost(a) - 1) if cost(a) else math.inf)
        for a, b in pairs
    ]


def outcome(change_pct: float) -> str:
    return "wins" if change_pct <= -TIE_PCT else "loses" if change_pct >= TIE_PCT else "ties"


def spans(points: Sequence[tuple[float, float]]) -> str:
    """ "wins at C/T 0.25 to 0.85 (to -33 %), ties at 1" of what `against_lru` gives."""
    runs: list[tuple[str, list[tuple[float, float]]]] = []
    for point in points:
        what = outcome(point[1])
        if not runs or runs[-1][0] != what:
            runs.append((what, []))
        runs[-1][1].append(point)
    said = []
    for what, run in runs:
        first, last = run[0][0], run[-1][0]
        where = f"{first:.2f}" if first == last else f"{first:.2f} to {last:.2f}"
        largest = max((change for _, change in run), key=abs)
        said.append(f"{what} at C/T {where}" + ("" if what == "ties" else f" (up to {largest:+.0f} %)"))
    return ", ".join(said)


def findings(found: Curves) -> list[tuple[str, list[Case]]]:
    """Statements about Least-Stale and the cases (trace and capacity) that test each."""
    demand = {study: found.studies[study] for study in found.main}
    ahead = {study: found.studies[study] for study in found.prefetched}

    def each(studies: dict, policy: str, test, where=lambda cycles: True) -> list[Case]:
        return [
            held(f"{study[0]}, C/T {cycles:.2f}", test(change))
            for study, lines in studies.items()
            for cycles, change in against_lru(lines, policy)
            if where(cycles)
        ]

    def collisions(policy: str) -> list[Case]:
        return [
            held(f"{study[0]}, C/T {number(row, 'cycles'):.2f}", row["collisions"] == 0)
            for study, lines in demand.items()
            for row in lines[policy]
            if number(row, "cycles") >= 1
        ]

    def equal_to_lru() -> list[Case]:
        return [
            held(f"{study[0]}, C/T {number(a, 'cycles'):.2f}", a["misses"] == b["misses"])
            for study, lines in demand.items()
            for a, b in zip(lines["lru"], lines["least_stale_recency"], strict=True)
        ]

    def gains_more() -> list[Case]:
        cases = []
        for study, lines in ahead.items():
            without = found.studies[study[0], study[1], "none"]
            pairs = zip(against_lru(lines, "least_stale"), against_lru(without, "least_stale"), strict=True)
            cases += [held(f"{study[0]}, C/T {c:.2f}", change <= base) for (c, change), (_, base) in pairs]
        return cases

    return [
        (
            "Without prefetch, the cyclic reading beats LRU below one token cycle",
            each(demand, "least_stale", lambda x: outcome(x) == "wins", lambda c: c < 0.999),
        ),
        (
            "Without prefetch, the left-first reading does so too",
            each(demand, "least_stale_left_first", lambda x: outcome(x) == "wins", lambda c: c < 0.999),
        ),
        (
            "Without prefetch, the literal reading does so too",
            each(demand, "least_stale_literal", lambda x: outcome(x) == "wins", lambda c: c < 0.999),
        ),
        ("Without prefetch, the recency reading misses exactly what LRU misses", equal_to_lru()),
        (
            "Without prefetch, the cyclic reading never loses to LRU",
            each(demand, "least_stale", lambda x: outcome(x) != "loses"),
        ),
        ("The cyclic reading has no collisions from one token cycle on", collisions("least_stale")),
        ("The literal reading has no collisions from one token cycle on", collisions("least_stale_literal")),
        (
            "Without prefetch, the literal reading nevertheless loses to LRU from two token cycles on",
            each(demand, "least_stale_literal", lambda x: outcome(x) == "loses", lambda c: c >= 1.999),
        ),
        (
            "Without prefetch, the left-first reading loses to LRU from two token cycles on",
            each(demand, "least_stale_left_first", lambda x: outcome(x) == "loses", lambda c: c >= 1.999),
        ),
        (
            "With prefetch, the cyclic reading stalls less than LRU up to two token cycles",
            each(ahead, "least_stale", lambda x: outcome(x) == "wins", lambda c: c <= 2.001),
        ),
        (
            "With prefetch, the cyclic reading never loses to LRU",
            each(ahead, "least_stale", lambda x: outcome(x) != "loses"),
        ),
        ("The cyclic reading gains at least as much on LRU with prefetch (stall) as without (misses)", gains_more()),
    ]


def draw(out: Path) -> str:
    """Write least_stale.md, least_stale.html and figures/*.png into `out`; the findings as text for a terminal."""
    manifest, found = read_manifest(out), Curves(read_rows(out))
    config = manifest["config"]
    page = Document("Least-Stale: where it wins, ties and loses")
    page.text(
        "Simulated on recorded routing, one pool of experts, decode passes of one request at a time. C/T is the "
        "cache size in token cycles. "
        f"Without prefetch a policy is judged by its misses, with {config['prefetch']} prefetch (on "
        f"{config['hardware']}) by its stall, in "
        f"which late copies count. Within {TIE_PCT:g} % of LRU is a tie. A statement is reproduced if it holds in "
        f"every case (trace and "
        "capacity), reproduced in direction if in two thirds, else contradicted."
    )
    page.heading("Findings")
    lines, body = [], []
    for text, cases in findings(found):
        verdict = judge(cases, with_number=False)
        failed = [case.label for case in cases if not case.agrees]
        shown = "; ".join(failed[:3]) + (f"; and {len(failed) - 3} more" if len(failed) > 3 else "")
        body.append([text, verdict.verdict, f"{verdict.agree} of {verdict.cases}", shown or "-"])
        lines.append(f"{verdict.verdict}: {text} ({verdict.agree} of {verdict.cases})")
    page.table(("statement", "verdict", "holds in", "not at"), body)

    for title, studies in (("Without prefetch", found.main), ("With prefetch", found.prefetched)):
        if not studies:
            continue
        page.heading(title)
        page.table(
            ("trace", "reading", "against LRU"),
            [
                [f"{s[0]}, at most {s[1]:,} tokens", name, spans(against_lru(found.studies[s], name))]
                for s in studies
                for name in READINGS
                if name in found.studies[s]
            ],
        )
        name = title.lower().replace(" ", "_")
        page.picture(figures.save(_picture(found, studies, title), out / FIGURES / f"{name}.png"), title)
    _check(page, found, config)
    _tables(page, found)
    page.provenance(manifest)
    return "\n".join([*lines, *map(str, page.save(out, "least_stale"))])


def _check(page: Document, found: Curves, config: dict) -> None:
    """Ours beside an independent replay of the same tokens."""
    study = (config["check_trace"], CHECK_TOKENS, "none")
    if study not in found.studies:
        return
    page.heading("The readings against an independent replay")
    page.text(
        f"{study[0]}, first {CHECK_TOKENS:,} tokens, no prefetch: hit % (collisions) here | there. "
        "The two may order the experts of one visit differently, which moves ties a little."
    )
    body = []
    for i, slots in enumerate(config["check_slots"]):
        cells = [f"{slots} slots"]
        for policy, expected in CHECK.items():
            row = next((r for r in found.studies[study][policy] if r["capacity_slots"] == slots), None)
            here = (
                "-"
                if row is None
                else f"{100 * number(row, 'hits') / number(row, 'demand'):.1f} ({number(row, 'collisions'):,.0f})"
            )
            cells.append(f"{here} | {expected[i][0]:.1f} ({expected[i][1]:,})")
        body.append(cells)
    page.table(("cache", *CHECK), body)


def _tables(page: Document, found: Curves) -> None:
    page.heading("All numbers")
    for (trace, tokens, prefetch), lines in found.studies.items():
        shown = "hits % (collisions)" if prefetch == "none" else "hits % (collisions), stall s"
        page.heading(f"{trace}, at most {tokens:,} tokens, prefetch {prefetch}: {shown}", 3)
        names = [name for name in POLICIES if name in lines]
        body = [
            [f"{number(rows[0], 'cycles'):.2f} C/T = {rows[0]['capacity_slots']} slots"]
            + [
                f"{100 * number(row, 'hits') / number(row, 'demand'):.1f} ({number(row, 'collisions'):,.0f})"
                + ("" if row["stall_s"] is None else f", {number(row, 'stall_s'):.2f}")
                for row in rows
            ]
            for rows in zip(*(lines[name] for name in names), strict=True)
        ]
        page.table(("cache", *names), body)


def _picture(found: Curves, studies: Sequence[tuple[str, int, str]], title: str) -> Figure:
    """Above: hit rate over C/T (on time only). Below: the cost against LRU."""
    figure = Figure(figsize=(max(11.0, 4.9 * len(studies)), 7.2), layout="constrained")
    panels = figure.subplots(2, len(studies), squeeze=False, sharex="col")
    style = looks(POLICIES)
    for column, study in enumerate(studies):
        top, bottom = panels[:, column]
        lines = found.studies[study]
        for name in (n for n in POLICIES if n in lines):
            look = style[name]
            drawn = {
                "color": look.color,
                "linestyle": look.linestyle,
                "marker": look.marker or None,
                "linewidth": look.linewidth,
                "zorder": look.zorder,
                "markersize": 4,
            }
            x = [number(row, "cycles") for row in lines[name]]
            top.plot(
                x,
                [100 * (number(r, "hits") - number(r, "hits_late")) / number(r, "demand") for r in lines[name]],
                label=name,
                **drawn,
            )
            bottom.plot(x, [change for _, change in against_lru(lines, name)], **drawn)
        for ax in (top, bottom):
            ax.set_xscale("log")
            ax.axvline(1, color="#444444", linewidth=1, linestyle=(0, (2, 2)))
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color="#EEEEEE")
        top.set_ylim(-2, 102)
        top.set_title(f"{study[0]}, at most {study[1]:,} tokens", fontsize=10)
        bottom.set_ylim(-100, 150)
        bottom.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
        bottom.minorticks_off()
        bottom.set_xlabel("C/T, token cycles")
    panels[0, 0].set_ylabel("hits on time, % of demand")
    panels[1, 0].set_ylabel("misses against LRU, %" if studies[0][2] == "none" else "stall against LRU, %")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    figure.suptitle(
        f"{title}: the readings of Least-Stale against LRU (dotted: one token cycle; simulated on recorded routing)",
        fontsize=12,
    )
    return figure
