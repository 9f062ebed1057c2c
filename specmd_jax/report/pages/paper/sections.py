"""The sections of `experiments.paper`'s page: a table and a picture each."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from specmd_jax.report.document import Document
from specmd_jax.report.figures import save
from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper import pictures
from specmd_jax.report.pages.paper.cells import change, milliseconds, percent
from specmd_jax.report.pages.paper.points import (
    EVICTIONS,
    MISS_RULES,
    MIXES,
    PREDICTORS,
    READING,
    READING_SOFTWARE_MS,
    SYSTEMS,
    Point,
)
from specmd_jax.report.pages.paper.results import (
    MIDDLE,
    Results,
    best,
    drop_in,
    mix_rows,
    paper_drop_in,
    run_bits,
    settings,
)
from specmd_jax.report.rows import number
from specmd_jax.report.verdicts import cut_pct
from specmd_jax.units import GIB


def collisions(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    page.heading("Collisions by eviction policy, beside all misses")
    page.text(
        "A collision is a miss on an expert that was evicted earlier in the same pass. Few of them are worth "
        "little if misses rise."
    )
    for evidence, traces in groups.items():
        page.heading(f"{evidence.capitalize()}", 3)
        body = []
        for trace in traces:
            for label, base in settings(Point()):
                for pct in paper.CAPACITIES_PCT:
                    for name in EVICTIONS:
                        row = results.get(trace, replace(base, eviction=name), pct)
                        if row is not None:
                            body.append(
                                [
                                    f"{trace}, {label}, {pct:g} %",
                                    f"{number(row, 'cycles'):.2f}",
                                    name,
                                    f"{number(row, 'collisions'):,.0f}",
                                    f"{number(row, 'misses'):,.0f}",
                                    percent(100 * number(row, "collision_rate")),
                                    percent(100 * number(row, "hit_rate")),
                                    milliseconds(row, "ttft_s"),
                                    milliseconds(row, "tpot_s"),
                                ]
                            )
        page.table(
            ("setting", "C/T", "eviction", "collisions", "misses", "collisions / misses", "hits", "TTFT ms", "TPOT ms"),
            body,
        )
        page.picture(
            save(pictures.collisions(results, traces, evidence), out, f"collisions_{_slug(evidence)}"),
            "Collisions and misses",
        )
        page.picture(
            save(pictures.layers(results, traces, evidence), out, f"layers_{_slug(evidence)}"), "Collisions by layer"
        )


def prefetch(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    page.heading("Prefetch: precision and recall against hits and stall")
    page.text(
        "Prefetch copies use the same link as demand copies. `perfect` sees the future and `shuffled` deals it "
        "to wrong tokens: a bound and "
        "a control. A late hit is one whose copy was still in flight at the gate. LRU, 4 bit, unless said otherwise."
    )
    body = []
    for trace in results.evidence:
        for pct in paper.CAPACITIES_PCT:
            for name, point in PREDICTORS.items():
                for eviction in ("lru", "least_stale"):
                    row = results.get(trace, replace(point, eviction=eviction), pct)
                    if row is None or (point.prefetch == "gate_ahead") != (row["prefetch"] == "gate_ahead"):
                        continue
                    demand = number(row, "demand")
                    on_time = (number(row, "hits") - number(row, "hits_late")) / demand
                    body.append(
                        [
                            f"{trace}, {pct:g} %, {eviction}",
                            name,
                            percent(100 * number(row, "prefetch_precision")),
                            percent(100 * number(row, "prefetch_recall")),
                            percent(100 * on_time),
                            percent(100 * number(row, "hits_late") / demand),
                            f"{number(row, 'stall_s'):.3f}",
                            f"{number(row, 'bytes_prefetch_used') / GIB:.2f}",
                            f"{number(row, 'bytes_prefetch_wasted') / GIB:.2f}",
                        ]
                    )
    page.table(
        (
            "setting",
            "predictor",
            "precision",
            "recall",
            "hits on time",
            "hits late",
            "stall s",
            "GiB used",
            "GiB wasted",
        ),
        body,
    )
    if any(cells[1] not in ("none",) for cells in body):
        page.picture(save(pictures.prefetch(results), out, "prefetch"), "Prefetch: precision and recall against stall")


def reading(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    """Shows when Least-Stale hits 88 to 92 % at 5 %."""
    page.heading("When does Least-Stale hit 88 to 92 % at 5 %?")
    rows = [
        (trace, point, row)
        for trace in results.evidence
        for bits in (4.0, 16.0)
        for ms in READING_SOFTWARE_MS
        for eviction in ("least_stale", "lru")
        for point in [replace(READING, eviction=eviction, bits=(bits,), software_ms=ms)]
        if (row := results.get(trace, point, MIDDLE)) is not None
    ]
    if not rows:
        page.text("Not in this table: it needs a longer run.")
        return
    page.text(
        "The predictor has a precision and a recall of 0.9 and fetches 1.5 times the experts of a token. The paper's "
        "times contain 1 to 2.4 ms of software for each expert. While the software runs the link is free, so that "
        "prefetch copies arrive in time: the slower the engine, the better prefetching looks, whatever is evicted. "
        "Without that time fewer copies begin before their experts are needed, more of them come late, and 16-bit "
        "slots leave no room for them."
    )
    page.table(
        ("setting", "software ms", "eviction", "hits", "of them late", "collisions", "TPOT ms"),
        [
            [
                f"{trace}, {point.bits[0]:g} bit",
                f"{point.software_ms:g}",
                point.eviction,
                percent(100 * number(row, "hit_rate")),
                percent(100 * number(row, "hits_late") / max(1.0, number(row, "hits"))),
                f"{number(row, 'collisions'):,.0f}",
                milliseconds(row, "tpot_s"),
            ]
            for trace, point, row in rows
        ],
    )


def miss_rules(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    rows = [
        (trace, pct, rule, row)
        for trace in results.evidence
        for pct in paper.CAPACITIES_PCT
        for rule in MISS_RULES
        if (row := results.get(trace, Point(miss=rule, bits=(4.0, 8.0)), pct)) is not None
    ]
    page.heading("Miss rules: speed against what they give up")
    if not rows:
        page.text("Not in this table: these rules need the router's logits or a longer run.")
        return
    page.text(
        "Experts are stored at 8 and 4 bits; LRU, no prefetch. Mean bits and lost gate mass are proxies of "
        "quality, not quality."
    )
    page.table(
        (
            "setting",
            "miss rule",
            "TTFT ms",
            "TPOT ms",
            "mean bits",
            "lost mass",
            "hits",
            "dropped",
            "substituted",
            "on host",
        ),
        [
            [
                f"{trace}, {pct:g} %",
                rule,
                milliseconds(row, "ttft_s"),
                milliseconds(row, "tpot_s"),
                f"{run_bits(row):.2f}",
                percent(100 * number(row, "lost_mass")),
                percent(100 * number(row, "hit_rate")),
                *(f"{number(row, name):,.0f}" for name in ("dropped", "substituted", "on_host")),
            ]
            for trace, pct, rule, row in rows
        ],
    )
    page.picture(save(pictures.miss_rules(results), out, "miss_rules"), "Miss rules")


def mixes(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    page.heading("The five mixes at 5 %")
    found = {trace: rows for trace in results.evidence if (rows := mix_rows(results, trace)) and trace in paper.MODELS}
    if not found:
        page.text("Not in this table: the mixes need the router's logits and gate-ahead scores, or a longer run.")
        return
    page.text(
        "Experts at 4 bits (the baseline at 8; the cascade of #3 at 4 and 2, so that its best copy is what the "
        "others store). Ours is "
        "simulated on synthetic routing; compare the columns that are relative to #1."
    )
    body = []
    for trace, rows in found.items():
        for name, point in MIXES.items():
            theirs, first = (paper.MIX_TTFT_MS_AND_TOKENS_PER_S[n][trace] for n in (name, "#1"))
            row = rows[name]
            body.append(
                [
                    f"{trace}, {name}",
                    _policies(point),
                    f"{theirs[0]:,.0f}",
                    milliseconds(row, "ttft_s"),
                    change(theirs[0] / first[0]),
                    change(number(row, "ttft_s") / number(rows["#1"], "ttft_s")),
                    f"{theirs[1]:g}",
                    f"{number(row, 'tokens_per_s'):.1f}",
                    change(theirs[1] / first[1]),
                    change(number(row, "tokens_per_s") / number(rows["#1"], "tokens_per_s")),
                ]
            )
    page.table(
        (
            "mix",
            "policies",
            "TTFT ms, paper",
            "TTFT ms, ours",
            "against #1, paper",
            "against #1, ours",
            "tok/s, paper",
            "tok/s, ours",
            "against #1, paper",
            "against #1, ours",
        ),
        body,
    )
    page.picture(save(pictures.mixes(found), out, "mixes"), "The five mixes against #1")


def drop_ins(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    page.heading("Least-Stale as a drop-in replacement at 5 %")
    page.text(
        "TTFT saved, in % (TPOT where the trace has no prompt). On recorded routing the systems lack what needs "
        "scores: `previous` "
        "prefetch for the gate, fetch for substitution, standard routing for cache-aware; the paper's column is "
        "then its mean."
    )
    body, cells = [], {}
    for trace in results.evidence:
        for system in SYSTEMS:
            ours, theirs = drop_in(system, trace, results), paper_drop_in(system, trace)
            if not math.isnan(ours):
                cells[trace, system] = (theirs, ours)
                row = results.get(trace, SYSTEMS[system], MIDDLE)
                after = results.get(trace, replace(SYSTEMS[system], eviction="least_stale"), MIDDLE)
                assert row is not None and after is not None  # drop_in found both
                what = "TTFT" if row["ttft_s"] is not None else "TPOT"
                body.append(
                    [
                        f"{system}, {trace}",
                        what,
                        f"{theirs:.1f}",
                        f"{ours:.1f}",
                        f"{cut_pct(number(row, 'tpot_s'), number(after, 'tpot_s')):.1f}",
                        f"{cut_pct(number(row, 'misses'), number(after, 'misses')):.1f}",
                        results.evidence[trace],
                    ]
                )
    page.table(
        ("system", "time", "saved %, paper", "saved %, ours", "TPOT saved %", "misses saved %", "evidence"), body
    )
    if cells:
        page.picture(save(pictures.drop_in(cells), out, "drop_in"), "TTFT saved by Least-Stale")


def rankings(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    page.heading("Rankings by regime")
    page.text("Fewest misses among policies that do not see the future; - where all tie, as when every expert fits.")
    body = []
    for trace, evidence in results.evidence.items():
        for label, base in settings(Point()):
            names = [best(results, trace, base, pct) for pct in paper.CAPACITIES_PCT]
            if any(names):
                body.append([f"{trace}, {label}", *(" = ".join(n) if n else "-" for n in names), evidence])
    page.table(("setting", *(f"best at {pct:g} %" for pct in paper.CAPACITIES_PCT), "evidence"), body)
    page.picture(save(pictures.rankings(results), out, "rankings"), "Misses against LRU by regime")


def _slug(text: str) -> str:
    return text.split()[-2]


def _policies(point: Point) -> str:
    prefetch = "no prefetch" if point.prefetch == "none" else f"{point.prefetch} {point.selection}"
    return f"{prefetch}, {point.eviction}, {point.miss}, {point.routing}"
