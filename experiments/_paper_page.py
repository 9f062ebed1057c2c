"""The page of `experiments.paper`, drawn from its table alone: verdicts, tables and pictures. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from configs import paper_numbers as paper
from experiments._paper_claims import (
    CLAIMS,
    MIDDLE,
    ONLINE,
    Results,
    best,
    drop_in,
    mix_rows,
    paper_drop_in,
    run_bits,
    settings,
)
from experiments.common.paper_plan import EVICTIONS, MISS_RULES, MIXES, PREDICTORS, SYSTEMS, Point
from specmd_jax.report import figures
from specmd_jax.report.claims import cut_pct
from specmd_jax.report.document import Document
from specmd_jax.report.series import number
from specmd_jax.report.style import looks
from specmd_jax.report.table import FIGURES, Row, read_manifest, read_rows

SHOWN = ("lru", "score", "least_stale", "least_stale_literal", "lfu", "fld")
RULES = (
    "A case is one trace and setting on which a claim can be tested. It agrees if it lies on the paper's side of no "
    "effect and is no fainter than a fiftieth of the paper's effect; it is close if it also lies within a factor of "
    "two of the paper's range. Reproduced: at least two thirds of the cases are close (a claim without a number: all "
    "hold). Reproduced in direction: at least two thirds agree. Contradicted: fewer. Not testable here: no case."
)


def draw(out: Path) -> str:
    """Write paper.md, paper.html and figures/*.png into `out` from its table; the verdicts as text for a terminal."""
    manifest, rows = read_manifest(out), read_rows(out)
    results = Results(rows)
    groups: dict[str, list[str]] = {}
    for trace, evidence in results.evidence.items():
        groups.setdefault(evidence, []).append(trace)
    page = Document("SpecMD's claims, simulated")
    config = manifest["config"]
    page.text(
        f"Every number below is simulated: on {config['hardware']} (a link of 5 GB/s), batch 1, one pool of "
        f"experts, capacities in % of the "
        "bytes of all experts at 16 bits while experts are stored at 4 or 8 (so 5 % holds 20 % or 10 % of them). "
        "The paper measured one "
        "A100. Its models have no public traces: "
        f"{config['requests']} requests of {config['prompt_tokens']} prompt and {config['decode_tokens']} decoded "
        f"tokens each were "
        "made up in their shapes; recorded traces are other models. Tables give C/T, the cache size over what one "
        "token needs."
    )
    _traces(page, results, rows)
    page.heading("Verdicts")
    page.text(RULES)
    lines = _verdicts(page, results, groups)
    for section in (_collisions, _prefetch, _miss, _mixes, _drop_in, _rankings):
        section(page, results, groups, out)
    page.provenance(manifest)
    paths = page.save(out, "paper")
    return "\n".join([*lines, *map(str, paths)])


# ------------------------------------------------------------------------------------------------ tables


def _traces(page: Document, results: Results, rows: Sequence[Row]) -> None:
    body = []
    for trace, evidence in results.evidence.items():
        row = next(r for r in rows if r["trace"] == trace and r["layer"] is None)
        cycles = {bits: results.get(trace, Point(bits=(float(bits),)), MIDDLE) for bits in results.bits}
        shown = ", ".join(f"{number(r, 'cycles'):.2f} ({bits} bit)" for bits, r in cycles.items() if r is not None)
        body.append([trace, evidence, f"{number(row, 'tokens'):,.0f}", _pct(100 * number(row, "repeat")), shown])
    page.table(("routing of", "evidence", "tokens", "repeats of the token before", "C/T at 5 %"), body)


def _verdicts(page: Document, results: Results, groups: dict[str, list[str]]) -> list[str]:
    head, body, lines = ["claim", "paper", "measured here as"], [], []
    for evidence in groups:
        head += [f"{evidence}: verdict", "median [range], close / agree / cases"]
    for claim in CLAIMS:
        cells = [claim.text, claim.paper, claim.measure]
        said = []
        for traces in groups.values():
            found = claim.judge(results, traces)
            span = "-"
            if found.cases:
                unit = claim.unit
                span = f"{found.close} / {found.agree} / {found.cases}"
                if claim.with_number:
                    span = f"{_num(found.median)}{unit} [{_num(found.least)}, {_num(found.most)}], {span}"
            cells += [found.verdict, span]
            said.append(f"{found.verdict} ({span})")
        body.append(cells)
        lines.append(f"{claim.text}\n    " + "\n    ".join(f"{e}: {s}" for e, s in zip(groups, said, strict=True)))
    page.table(head, body)
    return lines


def _collisions(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
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
                                    _pct(100 * number(row, "collision_rate")),
                                    _pct(100 * number(row, "hit_rate")),
                                    _ms(row, "ttft_s"),
                                    _ms(row, "tpot_s"),
                                ]
                            )
        page.table(
            ("setting", "C/T", "eviction", "collisions", "misses", "collisions / misses", "hits", "TTFT ms", "TPOT ms"),
            body,
        )
        page.picture(
            _save(_collision_picture(results, traces, evidence), out, f"collisions_{_slug(evidence)}"),
            "Collisions and misses",
        )
        page.picture(
            _save(_layer_picture(results, traces, evidence), out, f"layers_{_slug(evidence)}"), "Collisions by layer"
        )


def _prefetch(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
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
                            _pct(100 * number(row, "prefetch_precision")),
                            _pct(100 * number(row, "prefetch_recall")),
                            _pct(100 * on_time),
                            _pct(100 * number(row, "hits_late") / demand),
                            f"{number(row, 'stall_s'):.3f}",
                            f"{number(row, 'bytes_prefetch_used') / 1e9:.2f}",
                            f"{number(row, 'bytes_prefetch_wasted') / 1e9:.2f}",
                        ]
                    )
    page.table(
        ("setting", "predictor", "precision", "recall", "hits on time", "hits late", "stall s", "GB used", "GB wasted"),
        body,
    )
    if any(cells[1] not in ("none",) for cells in body):
        page.picture(_save(_prefetch_picture(results), out, "prefetch"), "Prefetch: precision and recall against stall")


def _miss(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
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
                _ms(row, "ttft_s"),
                _ms(row, "tpot_s"),
                f"{run_bits(row):.2f}",
                _pct(100 * number(row, "lost_mass")),
                _pct(100 * number(row, "hit_rate")),
                *(f"{number(row, name):,.0f}" for name in ("dropped", "substituted", "on_host")),
            ]
            for trace, pct, rule, row in rows
        ],
    )
    page.picture(_save(_miss_picture(results), out, "miss_rules"), "Miss rules")


def _mixes(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
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
                    _ms(row, "ttft_s"),
                    _change(theirs[0] / first[0]),
                    _change(number(row, "ttft_s") / number(rows["#1"], "ttft_s")),
                    f"{theirs[1]:g}",
                    f"{number(row, 'tokens_per_s'):.1f}",
                    _change(theirs[1] / first[1]),
                    _change(number(row, "tokens_per_s") / number(rows["#1"], "tokens_per_s")),
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
    page.picture(_save(_mix_picture(found), out, "mixes"), "The five mixes against #1")


def _drop_in(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
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
        page.picture(_save(_drop_in_picture(cells), out, "drop_in"), "TTFT saved by Least-Stale")


def _rankings(page: Document, results: Results, groups: dict[str, list[str]], out: Path) -> None:
    page.heading("Rankings by regime")
    page.text("Fewest misses among policies that do not see the future; - where all tie, as when every expert fits.")
    body = []
    for trace, evidence in results.evidence.items():
        for label, base in settings(Point()):
            names = [best(results, trace, base, pct) for pct in paper.CAPACITIES_PCT]
            if any(names):
                body.append([f"{trace}, {label}", *(" = ".join(n) if n else "-" for n in names), evidence])
    page.table(("setting", *(f"best at {pct:g} %" for pct in paper.CAPACITIES_PCT), "evidence"), body)
    page.picture(_save(_ranking_picture(results), out, "rankings"), "Misses against LRU by regime")


# ------------------------------------------------------------------------------------------------ pictures


def _panels(count: int, across: int, size: tuple[float, float], title: str) -> tuple[Figure, list]:
    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(max(10.5, size[0] * across), size[1] * down + 0.9), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for extra in axes[count:]:
        extra.remove()
    figure.suptitle(title, fontsize=12)
    return figure, axes[:count]


def _collision_picture(results: Results, traces: Sequence[str], evidence: str) -> Figure:
    """Misses of each policy and the collisions among them at each capacity; a panel for each trace and reading."""
    cells = [(trace, bits) for trace in traces for bits in results.bits]
    figure, axes = _panels(
        len(cells), 2 * len(results.bits), (4.4, 3.1), f"Collisions (dark) within all misses, no prefetch; {evidence}"
    )
    style = looks(SHOWN)
    for ax, (trace, bits) in zip(axes, cells, strict=True):
        for i, name in enumerate(SHOWN):
            rows = [results.get(trace, Point(name, bits=(float(bits),)), pct) for pct in paper.CAPACITIES_PCT]
            demand = [number(r, "demand") if r is not None else math.nan for r in rows]
            where = np.arange(len(rows)) + (i - (len(SHOWN) - 1) / 2) * 0.13
            for column, alpha in (("misses", 0.35), ("collisions", 1.0)):
                heights = [
                    100 * number(r, column) / d if r is not None else 0 for r, d in zip(rows, demand, strict=True)
                ]
                ax.bar(
                    where,
                    heights,
                    0.115,
                    color=style[name].color,
                    alpha=alpha,
                    hatch="//" if "literal" in name else None,
                    edgecolor="white",
                    linewidth=0.3,
                    label=name if column == "collisions" else None,
                )
        ax.set_xticks(range(len(paper.CAPACITIES_PCT)), [f"{pct:g} %" for pct in paper.CAPACITIES_PCT])
        ax.set_title(f"{trace}, {bits} bit", fontsize=9.5)
        ax.set_ylim(0, 102)
        _plain(ax)
    axes[0].set_ylabel("% of demanded experts")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(SHOWN), frameon=False, fontsize=9)
    return figure


def _layer_picture(results: Results, traces: Sequence[str], evidence: str) -> Figure:
    names = ("lru", "score", "least_stale", "least_stale_literal")
    title = f"Collisions by layer at 5 %, {results.bits[0]} bit, no prefetch; {evidence}"
    figure, axes = _panels(len(traces), 4, (4.4, 3.1), title)
    style = looks(names)
    for ax, trace in zip(axes, traces, strict=True):
        for name in names:
            rows = results.layers(trace, Point(name, bits=(float(results.bits[0]),)), MIDDLE)
            heights = [100 * number(r, "collisions") / max(1, number(r, "demand")) for r in rows]
            ax.plot(
                range(len(rows)),
                heights,
                label=name,
                color=style[name].color,
                linestyle=style[name].linestyle,
                linewidth=1.6,
            )
        ax.set_title(trace, fontsize=9.5)
        ax.set_xlabel("layer")
        ax.set_ylim(bottom=0)
        _plain(ax)
    axes[0].set_ylabel("collisions, % of demand")
    handles, shown = axes[0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def _prefetch_picture(results: Results) -> Figure:
    """Stall against no prefetch, by predictor and capacity."""
    traces = list(results.evidence)
    figure, axes = _panels(
        len(traces), 4, (4.4, 3.2), "Stall of each predictor, relative to no prefetch (LRU, 4 bit); lower is better"
    )
    colors = ("#777777", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#000000", "#CC79A7")
    for ax, trace in zip(axes, traces, strict=True):
        shown = [
            (name, color, [results.get(trace, point, pct) for pct in paper.CAPACITIES_PCT])
            for (name, point), color in zip(PREDICTORS.items(), colors, strict=True)
        ]
        shown = [
            (n, c, r)
            for n, c, r in shown
            if r[0] is not None and not (n.startswith("gate") and r[0]["prefetch"] != "gate_ahead")
        ]
        base = [number(row, "stall_s") if row else math.nan for row in shown[0][2]]
        for i, (name, color, rows) in enumerate(shown[1:]):
            heights = [
                number(r, "stall_s") / b if r is not None and b > 0 else 0 for r, b in zip(rows, base, strict=True)
            ]
            ax.bar(np.arange(len(rows)) + (i - (len(shown) - 2) / 2) * 0.15, heights, 0.13, color=color, label=name)
        ax.axhline(1, color="#444444", linewidth=1)
        ax.set_xticks(range(len(paper.CAPACITIES_PCT)), [f"{pct:g} %" for pct in paper.CAPACITIES_PCT])
        ax.set_title(trace, fontsize=9.5)
        _plain(ax)
    axes[0].set_ylabel("stall / stall without prefetch")
    labelled = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        labelled.values(),
        labelled.keys(),
        loc="outside lower center",
        ncols=min(4, max(1, len(labelled))),
        frameon=False,
        fontsize=9,
    )
    return figure


def _miss_picture(results: Results) -> Figure:
    traces = [t for t in results.evidence if results.get(t, Point(miss="cpu", bits=(4.0, 8.0)), MIDDLE) is not None]
    title = "Miss rules at 5 % (LRU, no prefetch, 8:4 bit): speed and precision; outer ring: gate mass lost"
    figure, axes = _panels(len(traces), 4, (4.4, 3.4), title)
    colors = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
    for ax, trace in zip(axes, traces, strict=True):
        for place, (rule, color) in enumerate(zip(MISS_RULES, colors, strict=True)):
            row = results.get(trace, Point(miss=rule, bits=(4.0, 8.0)), MIDDLE)
            assert row is not None  # all rules are replayed together
            x, y = 1e3 * number(row, "tpot_s"), run_bits(row)
            ax.scatter(x, y, s=150 - 20 * place, color=color, label=rule, zorder=3)  # equal points show as rings
            ax.scatter(x, y, s=150 + 4000 * number(row, "lost_mass"), facecolors="none", edgecolors=color, zorder=2)
        ax.set_title(trace, fontsize=9.5)
        ax.set_xlabel("TPOT, ms")
        ax.set_ylim(3.5, 8.5)
        ax.set_xlim(left=0)
        _plain(ax)
    axes[0].set_ylabel("mean bits run (proxy)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def _mix_picture(found: dict[str, dict[str, Row]]) -> Figure:
    figure, axes = _panels(
        len(found), 4, (4.4, 3.2), "TTFT of each mix at 5 %, relative to #1: the paper's (grey) and ours (blue)"
    )
    for ax, (trace, rows) in zip(axes, found.items(), strict=True):
        table = paper.MIX_TTFT_MS_AND_TOKENS_PER_S
        theirs = [table[name][trace][0] / table["#1"][trace][0] for name in MIXES]
        ours = [number(rows[name], "ttft_s") / number(rows["#1"], "ttft_s") for name in MIXES]
        where = np.arange(len(MIXES))
        ax.bar(where - 0.2, theirs, 0.38, color="#AAAAAA", label="paper")
        ax.bar(where + 0.2, ours, 0.38, color="#0072B2", label="simulated on synthetic routing")
        ax.axhline(1, color="#444444", linewidth=1)
        ax.set_xticks(where, list(MIXES), fontsize=9)
        ax.set_title(trace, fontsize=9.5)
        _plain(ax)
    axes[0].set_ylabel("TTFT / TTFT of #1")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _drop_in_picture(cells: dict[tuple[str, str], tuple[float, float]]) -> Figure:
    traces = list(dict.fromkeys(trace for trace, _ in cells))
    figure, axes = _panels(
        len(traces), 4, (4.4, 3.2), "Time saved by Least-Stale at 5 %: the paper's (grey) and ours (blue)"
    )
    for ax, trace in zip(axes, traces, strict=True):
        systems = [system for system in SYSTEMS if (trace, system) in cells]
        where = np.arange(len(systems))
        ax.bar(
            where - 0.2,
            [cells[trace, s][0] for s in systems],
            0.38,
            color="#AAAAAA",
            label="paper (its mean, for recorded traces)",
        )
        ax.bar(where + 0.2, [cells[trace, s][1] for s in systems], 0.38, color="#0072B2", label="simulated")
        ax.axhline(0, color="#444444", linewidth=1)
        ax.set_xticks(where, systems, fontsize=8.5)
        ax.set_title(trace, fontsize=9.5)
        _plain(ax)
    axes[0].set_ylabel("TTFT (or TPOT) saved, %")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _ranking_picture(results: Results) -> Figure:
    """Heat map: misses of each policy against LRU, by trace and capacity."""
    names = [name for name in ONLINE if name != "lru"]
    columns = [(t, b, pct) for t in results.evidence for b in results.bits for pct in paper.CAPACITIES_PCT]
    table = np.full((len(names), len(columns)), np.nan)
    for j, (trace, bits, pct) in enumerate(columns):
        base = results.get(trace, Point(bits=(float(bits),)), pct)
        for i, name in enumerate(names):
            row = results.get(trace, Point(name, bits=(float(bits),)), pct)
            if row is not None and base is not None and number(base, "misses") > 0:
                table[i, j] = 100 * (number(row, "misses") / number(base, "misses") - 1)
    figure = Figure(figsize=(max(7.0, 2.2 + 0.42 * len(columns)), 1.9 + 0.62 * len(names)), layout="constrained")
    ax = figure.add_subplot()
    limit = max(5.0, float(np.nanquantile(np.abs(table), 0.9))) if np.isfinite(table).any() else 5.0
    image = ax.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            ax.text(
                j,
                i,
                f"{value:+.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(value) > 0.65 * limit else "#222222",
            )
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_xticks(range(len(columns)), [f"{pct:g}%" for _, _, pct in columns], fontsize=7)
    width = len(paper.CAPACITIES_PCT)
    for k in range(0, len(columns), width):
        ax.axvline(k - 0.5, color="white", linewidth=2)
        trace, bits, _ = columns[k]
        ax.text(
            k + (width - 1) / 2,
            -0.6,
            f"{trace.removeprefix('bigmoe-')}\n{bits} bit",
            ha="center",
            va="bottom",
            fontsize=6.5,
        )
    figure.colorbar(image, ax=ax, label="misses against LRU, %", pad=0.01)
    figure.suptitle("Misses against LRU by regime (blue: fewer), no prefetch", fontsize=12)
    return figure


def _plain(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#EEEEEE", zorder=0)
    ax.set_axisbelow(True)


def _save(figure: Figure, out: Path, name: str) -> Path:
    return figures.save(figure, out / FIGURES / f"{name}.png")


# ------------------------------------------------------------------------------------------------ text of numbers


def _slug(text: str) -> str:
    return text.split()[-2]


def _policies(point: Point) -> str:
    prefetch = "no prefetch" if point.prefetch == "none" else f"{point.prefetch} {point.selection}"
    return f"{prefetch}, {point.eviction}, {point.miss}, {point.routing}"


def _pct(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f} %"


def _change(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * (value - 1):+.1f} %"


def _ms(row: Row, name: str) -> str:
    value = number(row, name)
    return "-" if math.isnan(value) else f"{1e3 * value:,.1f}"


def _num(value: float) -> str:
    return "-" if math.isnan(value) else "inf" if math.isinf(value) else f"{value:.3g}"
