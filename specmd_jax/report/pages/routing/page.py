"""The page of `experiments.routing`, drawn from its table: where the first trace is like the others, and where not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from specmd_jax.report.columns import Row
from specmd_jax.report.document import Document, Said
from specmd_jax.report.pages.routing import charts
from specmd_jax.report.pages.routing.compared import MEASURES, Compared, compare, off
from specmd_jax.report.pages.routing.table import found, traces_of, value
from specmd_jax.report.reader import read_manifest, read_rows
from specmd_jax.report.rows import number
from specmd_jax.report.style import categories
from specmd_jax.report.terminal import aligned


def draw(out: Path) -> str:
    """Writes report.md and report.html into `out`; what is found as text for a terminal."""
    manifest, rows = read_manifest(out), read_rows(out)
    names, config = traces_of(rows), manifest["config"]
    told, own = compare(rows), specialised(rows, names[0])
    page = Document(title(rows, told), manifest)
    first = verdicts(names[0], told) if told else alone(rows, names[0])
    answer = [Said(text, evidence) for text, evidence in [*first, *own]]
    page.answer(answer)
    cut = f"the first {config['tokens']} decoded tokens of each request" if config["tokens"] else "all decoded tokens"
    page.text(
        f"Counted on recorded routing: {cut}, within each request and layer. Policies and predictors are replayed on "
        f"requests that no learned policy has seen, each from an empty cache (scope {config['scope']}, event contract, "
        "nothing copied early). Reuse distances are distinct other experts of the layer. Evenness is the entropy of "
        f"use as a share of what uniform choices of as many tokens have; a few tokens are {config['window']}. Like "
        "means: between the least and the largest of the others, or a tenth beyond."
    )
    kinds = {name: charts.domains_of(rows, name) for name in names}
    if any(kinds.values()):
        listed = "; ".join(f"of {name} {', '.join(its)}" for name, its in kinds.items() if its)
        page.text(f"Domains are what each trace calls them, and as different as they are: {listed}.")
    small = [name for name in names if value(rows, "tokens", trace=name) < 1000]
    if small:
        page.warning(
            f"{' and '.join(small)}: one short text of a few hundred tokens at most; its numbers are of that text."
        )
    head, body = side_by_side(rows, names)
    page.heading("Side by side")
    page.table(head, body)
    page.series(categories(names), names, "traces")
    charts.add(page, rows, names)
    return "\n".join([*(said.text for said in answer), "", *aligned(head, body), *map(str, page.save(out))])


def title(rows: Sequence[Row], told: Sequence[Compared]) -> str:
    names = traces_of(rows)
    if not told:
        return f"{names[0]}: what its routing is like"
    like = sum(it.like for it in told)
    return f"{names[0]} routes like the other models in {like} of {len(told)} measures"


def verdicts(name: str, told: Sequence[Compared]) -> list[tuple[str, str]]:
    """Gives a sentence for what is alike and one for what is not, of each evidence, and says which trace is nearest."""
    said = []
    for evidence in dict.fromkeys(it.measure.evidence for it in told):
        mine = [it for it in told if it.measure.evidence == evidence]
        groups = {
            "like the others in": [it for it in mine if it.like],
            "above the others in": [it for it in mine if not it.like and it.own > max(it.others.values())],
            "below the others in": [it for it in mine if not it.like and it.own < min(it.others.values())],
        }
        for way, found_so in groups.items():
            if found_so:
                said.append((f"{name} is {way}: {'; '.join(it.sentence for it in found_so)}.", evidence))
    others = {other: off(told, other) for other in dict.fromkeys(it for one in told for it in one.others)}
    nearest = min(others, key=lambda other: others[other])
    rest = ", ".join(f"{other} {100 * by:.0f} %" for other, by in others.items() if other != nearest)
    text = f"Nearest is {nearest}: over these measures {name} is {100 * others[nearest]:.0f} % off in the median"
    said.append((f"{text} ({rest})." if rest else f"{text}.", "measured and simulated"))
    return said


def alone(rows: Sequence[Row], name: str) -> list[tuple[str, str]]:
    """Gives a sentence with the measures of a trace that stands beside none, of each evidence."""
    said = []
    for evidence in dict.fromkeys(measure.evidence for measure in MEASURES):
        numbers = {it: it.of(rows, name) for it in MEASURES if it.evidence == evidence}
        listed = [f"{it.words}, {it.text(number)}" for it, number in numbers.items() if not math.isnan(number)]
        if listed:
            said.append((f"{name}: {'; '.join(listed)}.", evidence))
    return said


def specialised(rows: Sequence[Row], name: str) -> list[tuple[str, str]]:
    """Says how far experts of a trace belong to domains."""
    shares: dict[tuple[float, float], dict[str, float]] = {}
    for row in rows:
        if row["measure"] == "domain share" and row["trace"] == name:
            of_expert = shares.setdefault((number(row, "layer"), number(row, "expert")), {})
            of_expert[str(row["domain"])] = number(row, "value")
    if not shares:
        return []
    count = value(rows, "domains", trace=name)
    most = [max(of_expert.values()) for of_expert in shares.values()]
    half = sum(share > 0.5 for share in most) / len(most)
    bits, chance = (value(rows, measure, trace=name) for measure in ("domain bits", "domain bits by chance"))
    text = (
        f"Of {name}'s experts {100 * half:.0f} % have more than half of their use from one of {count:.0f} domains "
        f"(evenly it would be {100 / count:.0f} % each); an expert that is used says {bits:.2f} of "
        f"{math.log2(count):.2f} bits about the domain"
    )
    if not math.isnan(chance):
        text += f", {chance:.2f} where texts are dealt to domains at random"
    return [(f"{text}.", "measured")]


def side_by_side(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Gives a table of all measures, a column per trace."""
    body = [
        [what, *(f"{value(rows, what, trace=name):,.0f}" for name in names)]
        for what in ("requests", "tokens", "layers", "experts", "top_k", "judged tokens")
    ]
    for measure in MEASURES:
        numbers = [measure.of(rows, name) for name in names]
        if not all(map(math.isnan, numbers)):
            body.append([measure.words, *map(measure.text, numbers)])
    for capacity in dict.fromkeys(str(row["capacity"]) for row in found(rows, "cycles")):
        best = [_best(rows, name, capacity) for name in names]
        body.append([f"most of the gap, {capacity}", *best])
    return ["", *names], body


def _best(rows: Sequence[Row], name: str, capacity: str) -> str:
    """Names the policy without a bound that closes most of the gap."""
    of_policies = [
        row for row in found(rows, "gap closed", trace=name, capacity=capacity) if row["policy"] not in charts.BOUNDS
    ]
    if not of_policies:
        return "-"
    row = max(of_policies, key=lambda row: number(row, "value"))
    return f"{row['policy']} {100 * number(row, 'value'):.0f} %"
