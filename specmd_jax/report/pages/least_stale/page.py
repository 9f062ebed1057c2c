"""The page of `experiments.least_stale`, drawn from its table alone: curves, check table, findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from specmd_jax.report.charts import Chart, Field, lines
from specmd_jax.report.columns import Column, Scalar, Table
from specmd_jax.report.document import Document, Said
from specmd_jax.report.figures import save
from specmd_jax.report.pages.least_stale.findings import TIE_PCT, Curves, against_lru, findings, outcome, spans
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import looks
from specmd_jax.report.verdicts import judge
from specmd_jax.units import GIB

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
TABLE = Table("least_stale", COLUMNS, KEY)

CHECK_TOKENS = 8000
CHECK: dict[str, tuple[tuple[float, int], ...]] = {
    # hit % and collisions at `check_slots`: an independent replay of the first CHECK_TOKENS tokens of `check_trace`
    "lru": ((0.0, 129_102), (0.0, 278_710), (43.2, 44_705), (53.0, 44_189), (83.6, 8_860), (99.5, 65)),
    "least_stale_literal": ((0.0, 129_102), (0.0, 278_710), (45.1, 0), (48.5, 0), (63.2, 0), (89.7, 0)),
    "least_stale_left_first": (
        (0.0, 129_102),
        (26.5, 75_308),
        (44.0, 14_801),
        (48.0, 14_673),
        (62.5, 14_222),
        (89.1, 11_950),
    ),
    "least_stale": ((12.9, 16_274), (33.0, 16_274), (48.1, 0), (58.2, 0), (83.9, 0), (99.4, 0)),
}


def draw(out: Path) -> str:
    """Writes report.md, report.html and figures/*.png into `out`; gives the findings as terminal text."""
    manifest, found = read_manifest(out), Curves(read_rows(out))
    config = manifest["config"]
    page = Document(_headline(found), manifest)
    page.answer([Said(f"{study[0]}: {name} {spans(points)}.", "simulated") for study, name, points in _against(found)])
    page.text(
        "Simulated on recorded routing, one pool of experts, decode passes of one request at a time. C/T is the "
        "cache size in token cycles. "
        f"Without prefetch a policy is judged by its misses, with {config['prefetch']} prefetch (on "
        f"{config['hardware']}) by its stall, in "
        f"which late copies count. Within {TIE_PCT:g} % of LRU is a tie. A statement is reproduced if it holds in "
        f"every case (trace and "
        "capacity), reproduced in direction if in two thirds, else contradicted."
    )
    _views(page, found)
    page.heading("Findings")
    told, body = [], []
    for text, cases in findings(found):
        verdict = judge(cases, with_number=False)
        failed = [case.label for case in cases if not case.agrees]
        shown = "; ".join(failed[:3]) + (f"; and {len(failed) - 3} more" if len(failed) > 3 else "")
        body.append([text, verdict.verdict, f"{verdict.agree} of {verdict.cases}", shown or "-"])
        told.append(f"{verdict.verdict}: {text} ({verdict.agree} of {verdict.cases})")
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
        page.picture(save(_picture(found, studies, title), out, name), title)
    _check(page, found, config)
    _tables(page, found)
    return "\n".join([*told, *map(str, page.save(out))])


def _against(found: Curves) -> Iterator[tuple[tuple[str, int, str], str, list[tuple[float, float]]]]:
    """Gives the main reading against LRU, without prefetch and with it."""
    for study in (*found.main, *found.prefetched):
        if "least_stale" in found.studies[study]:
            ahead = "" if study[2] == "none" else f" with {study[2]} prefetch"
            yield study, f"least_stale{ahead}", against_lru(found.studies[study], "least_stale")


def _headline(found: Curves) -> str:
    """States how often the main reading beats LRU."""
    points = [point for study, _, every in _against(found) if study[2] == "none" for point in every]
    count = {what: sum(outcome(change) == what for _, change in points) for what in ("wins", "ties", "loses")}
    return (
        f"Least-Stale (cyclic) against LRU without prefetch: fewer misses in {count['wins']} of {len(points)} cases, a "
        f"tie in {count['ties']}, more in {count['loses']} (simulated)"
    )


CYCLES = Field("cycles", "cache size, token cycles (C/T)", ".3~g")
TOLD = (
    Field("series", "policy"),
    Field("trace", "trace"),
    Field("prefetch", "prefetch"),
    CYCLES,
    Field("pct", "cache, % of all experts", ".3~g"),
    Field("gib", "GiB", ".2f"),
    Field("hit", "hits on time, %", ".1f"),
    Field("change", "cost against lru, %", "+.1f"),
    Field("collisions", "collisions", ",d"),
)


def _views(page: Document, found: Curves) -> None:
    """Adds hits and the cost against LRU over C/T."""
    shown = [*found.main, *found.prefetched]
    records: list[dict[str, Scalar]] = []
    for study in shown:
        rows = found.studies[study]
        for name in (name for name in POLICIES if name in rows):
            for row, (cycles, change) in zip(rows[name], against_lru(rows, name), strict=True):
                records.append({
                    "series": name, "trace": study[0], "prefetch": study[2], "cycles": cycles,
                    "pct": number(row, "capacity_pct"), "gib": number(row, "capacity_bytes") / GIB,
                    "hit": 100 * (number(row, "hits") - number(row, "hits_late")) / number(row, "demand"),
                    "change": change, "collisions": row["collisions"],
                })  # fmt: skip
    page.data("rows", records)
    page.data("marks", [{"at": 1, "text": "C/T 1"}])
    page.filters(trace="trace!", prefetch="prefetch!")
    style = looks(POLICIES)
    page.series(style, ["lru", "least_stale", "belady"], "policies")
    study, _, points = next(_against(found))
    low = min(points, key=lambda point: point[1])
    log = {"x_scale": {"type": "log"}, "marks": "marks", "dots": True}
    page.chart(
        Chart(
            f"{study[0]}: least_stale costs {low[1]:+.0f} % against lru at C/T {low[0]:.2f} at best (simulated)",
            f"Misses (with prefetch: stall) against LRU's over cache size. {spans(points)}.",
            lines(CYCLES, Field("change", "misses or stall against lru, %"), TOLD, **log),
            ("rows", "marks"), {"table": "rows", "x": "cycles", "y": "change"},
        )
    )  # fmt: skip
    page.chart(
        Chart(
            f"{study[0]}: hits over cache size; recency fails below one token cycle (simulated)",
            "Hit rate over cache size in token cycles, hits on time only.",
            lines(CYCLES, Field("hit", "hits on time, %"), TOLD, **log, y_scale={"domain": [0, 100]}),
            ("rows", "marks"), {"table": "rows", "x": "cycles", "y": "hit"},
        )
    )  # fmt: skip
    page.rows("rows", TOLD, "Every policy at every cache size")


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
    for (trace, tokens, prefetch), curves in found.studies.items():
        shown = "hits % (collisions)" if prefetch == "none" else "hits % (collisions), stall s"
        page.heading(f"{trace}, at most {tokens:,} tokens, prefetch {prefetch}: {shown}", 3)
        names = [name for name in POLICIES if name in curves]
        body = [
            [f"{number(rows[0], 'cycles'):.2f} C/T = {rows[0]['capacity_slots']} slots"]
            + [
                f"{100 * number(row, 'hits') / number(row, 'demand'):.1f} ({number(row, 'collisions'):,.0f})"
                + ("" if row["stall_s"] is None else f", {number(row, 'stall_s'):.2f}")
                for row in rows
            ]
            for rows in zip(*(curves[name] for name in names), strict=True)
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
