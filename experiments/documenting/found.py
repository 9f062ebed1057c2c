"""Numbers of docs/findings.md that are replayed from the bundled traces: one function per block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments import least_stale, quality, starts
from experiments.documenting.blocks import table
from experiments.studies import validate
from experiments.validation.cells import published_cells
from specmd_jax import bundled, grid, prepare, stall_bounds, sweep
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.least_stale.findings import Curves
from specmd_jax.report.pages.least_stale.findings import findings as sentences_of
from specmd_jax.report.pages.paper.claims import CLAIMS
from specmd_jax.report.pages.paper.results import Results
from specmd_jax.report.pages.quality.front import at, front, sizes
from specmd_jax.report.pages.starts import cells_of
from specmd_jax.report.pages.validate import sentences
from specmd_jax.report.reader import read_rows
from specmd_jax.report.rows import number

TRACE, TOKENS = "gpt-oss-20b", 8_000
SHOWN = ("belady", "adaptive", "online", "lfu_decay", "least_stale", "lru", "least_stale_literal", "lfu")
ENDS = ("lru", "belady")
READINGS = ("lru", "least_stale_literal", "least_stale_left_first", "least_stale")
SLOTS = (38, 77, 120, 162, 324, 649)
DRAFTS, ACCEPTANCES = (1, 2, 4), (0.5, 0.7, 0.9)
DRAFTED = ("lru", "least_stale")
DRAFT_TOKENS = 1_500
BOUNDED = ("phone-ufs", "nvme-4", "pcie4-x16")
BOUND_TOKENS = 40
BOUND_SIZES = ("5%", "10%", "15%", "25%")
MIXES = ("static", "lru, 50 % pinned", "lru", "lru, warm start", "lfu_decay", "belady")


def policies(shown: Sequence[str] = SHOWN) -> str:
    """Gives a line per eviction policy at 25 % of the experts; `ENDS` must be among `shown`."""
    rows = list(sweep(bundled(TRACE, tokens=TOKENS), eviction=list(shown), capacity="25%"))
    low, high = (next(row["hits"] for row in rows if row["eviction"] == end) for end in ENDS)
    lines = []
    for row in sorted(rows, key=lambda row: row["misses"]):
        lines.append(
            [
                f"`{row['eviction']}`" + (" (a bound)" if row["eviction"] == "belady" else ""),
                f"{100 * row['hit_rate']:.2f}",
                f"{row['misses']:,}",
                f"{row['collisions']:,}",
                f"{100 * (row['hits'] - low) / (high - low):.1f} %",
            ]
        )
    return table(("policy", "hit %", "misses", "collisions", "gap closed"), lines)


def readings(slots: Sequence[int] = SLOTS) -> str:
    """Gives a line per cache size: hit % and collisions of Least-Stale's readings, experts in order of their id."""
    trace = bundled(TRACE, tokens=TOKENS)
    sizes = [f"{size} slots" for size in slots]
    found: dict[tuple[Any, Any], dict[str, Any]] = {
        (row["capacity_slots"], row["eviction"]): row
        for row in sweep(_in_id_order(trace), grid(eviction=list(READINGS), capacity=sizes, hardware=None))
    }
    lines = []
    for size in slots:
        cells = [found[size, policy] for policy in READINGS]
        counts = [f"{100 * cell['hit_rate']:.1f} ({cell['collisions']:,})" for cell in cells]
        lines.append([f"{size} ({100 * size / (trace.layers * trace.experts):.0f} %)", *counts])
    return table((f"slots of {trace.layers * trace.experts}", *(f"`{policy}`" for policy in READINGS)), lines)


def _in_id_order(trace: Any) -> Any:
    """Gives the trace with the experts of each visit by rising id, as the published table counts them."""
    return dataclasses.replace(trace, expert_ids=np.sort(trace.expert_ids, axis=-1), gates=None)


def drafting(policies: Sequence[str] = DRAFTED, drafts: Sequence[int] = DRAFTS) -> str:
    """Gives a line per number of drafts: time of a kept token against no drafts, at each acceptance."""
    trace = bundled(TRACE, tokens=DRAFT_TOKENS)
    plain = {row["eviction"]: row["tpot_s"] for row in sweep(trace, eviction=list(policies), hardware="pcie4-x16")}
    axes = {"eviction": list(policies), "drafts": list(drafts), "acceptance": list(ACCEPTANCES)}
    found = {
        (row["eviction"], row["drafts"], row["acceptance"]): row["tpot_s"] / plain[row["eviction"]]
        for row in sweep(trace, hardware="pcie4-x16", **axes)
    }
    accepted = ", ".join(f"{100 * share:.0f}" for share in ACCEPTANCES) + " %"
    lines = []
    for count in drafts:
        cells = [", ".join(f"{found[policy, count, share]:.2f}" for share in ACCEPTANCES) for policy in policies]
        lines.append([str(count), accepted, *cells])
    return table(("drafts", "accepted", *(f"`{policy}`" for policy in policies)), lines)


def bounds(machines: Sequence[str] = BOUNDED, sizes: Sequence[str] = BOUND_SIZES) -> str:
    """Gives a line per machine and scope: lower bound and best schedule in seconds at each size, and how far apart."""
    replays = prepare(bundled(TRACE, tokens=BOUND_TOKENS))
    lines = []
    for machine in machines:
        for scope in ("global", "layer"):
            found = [stall_bounds(replays, size, scope, machine) for size in sizes]
            cells = [
                f"{each.lower_s:.3f} to {each.feasible_s:.3f} ({100 * (each.feasible_s / each.lower_s - 1):.1f} %)"
                for each in found
            ]
            lines.append([f"`{machine}`", scope, *cells])
    return table(("machine", "cache", *(f"{size.removesuffix('%')} % of the experts" for size in sizes)), lines)


def staleness(results: Path) -> str:
    """Gives a line per statement about Least-Stale: in how many cells of `experiments.least_stale` it holds."""
    least_stale.main(["--out", str(results / "least_stale")])
    lines = []
    for sentence, cases in sentences_of(Curves(read_rows(results / "least_stale"))):
        lines.append([sentence, f"{sum(case.close for case in cases)} of {len(cases)}"])
    return table(("statement", "holds in cells"), lines)


def profiles(results: Path) -> str:
    """Gives a line per way to begin: misses in % of demand, from `experiments.starts`."""
    starts.main(["--out", str(results / "starts")])
    cells = cells_of(read_rows(results / "starts"))
    sizes = sorted(cells["lru"])
    heads = [f"{number(cells['lru'][size], 'capacity_pct'):.0f} %" for size in sizes]
    lines = [
        [
            name + (" (a bound)" if name == "belady" else ""),
            *(f"{number(cells[name][s], 'miss_pct'):.2f}" for s in sizes),
        ]
        for name in MIXES
    ]
    return table(("cache", *(f"{head} of the experts" for head in heads)), lines)


def quality_and_speed(results: Path) -> str:
    """Gives a line per rule that changes what a model computes: what it costs and how fast it would be, from
    `experiments.quality`."""
    quality.main(["--out", str(results / "quality")])
    return quality_lines(read_rows(results / "quality"))


def quality_lines(rows: Sequence[Row]) -> str:
    """Gives the same of the study's rows: time of a token in ms, and the change of bits per byte in %."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((str(row["rule"]), str(row["precisions"])), []).append(row)
    best = {id(row) for pct in sizes(rows) for row in front(at(rows, pct))}

    def text(row: Row) -> str:
        change = f"{number(row, 'change_pct'):+.2f} ± {number(row, 'change_se_pct'):.2f}"
        told = f"{1e3 * number(row, 'tpot_s'):.1f}, {change}"
        return f"**{told}**" if id(row) in best else told

    lines = [[f"`{rule}`", held, *map(text, cells)] for (rule, held), cells in found.items()]
    return table(("rule", "held at", *(f"{pct:g} % cached" for pct in sizes(rows))), lines)


def quality_claims(results: Path) -> str:
    """Gives a line per claim of SpecMD that `experiments.quality` can judge."""
    quality.main(["--out", str(results / "quality")])
    return claim_lines(read_rows(results / "quality"))


def claim_lines(rows: Sequence[Row]) -> str:
    """Gives the same of the study's rows: the verdict, and in how many cases the claim holds."""
    results, models = Results([], rows), list(dict.fromkeys(str(row["model"]) for row in rows))
    lines = []
    for claim in CLAIMS:
        told = claim.judge(results, models)
        if claim.section == "Quality" or told.cases:
            span = "-" if not told.cases else f"{told.agree} of {told.cases}"
            if told.cases and claim.with_number:
                span = f"{span}; {told.least:.0f} to {told.most:.0f}{claim.unit}"
            lines.append([claim.text, claim.measure, told.verdict, span])
    return table(("claim", "measured here as", "verdict", "agrees in"), lines)


def predictions() -> str:
    """Gives what follows from published measurements beside predictions, a line per sentence."""
    return "".join(f"- {line}\n" for line in sentences(list(validate.rows_of(published_cells()))))


REPLAYED: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"policies": policies, "readings": readings, "drafting": drafting, "bounds": bounds, "predictions": predictions}
)
"""Block -> what makes it, each in a minute or two at most."""
STUDIED: Mapping[str, Callable[[Path], str]] = MappingProxyType(
    {
        "staleness": staleness,
        "profiles": profiles,
        "quality": quality_and_speed,
        "quality_claims": quality_claims,
    }
)
"""Block -> what makes it of a study's results folder, which it fills first; minutes."""
