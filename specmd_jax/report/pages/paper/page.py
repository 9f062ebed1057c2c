"""The page of `experiments.paper`, drawn from its table alone: verdicts, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmd_jax.report.columns import Row
from specmd_jax.report.document import Document
from specmd_jax.report.figures import save
from specmd_jax.report.pages.paper import sections, views
from specmd_jax.report.pages.paper.cells import percent, short
from specmd_jax.report.pages.paper.claims import CLAIMS
from specmd_jax.report.pages.paper.points import Point
from specmd_jax.report.pages.paper.results import MIDDLE, Results
from specmd_jax.report.pages.quality import page as quality
from specmd_jax.report.pages.quality.picture import picture
from specmd_jax.report.pages.quality.table import EVIDENCE
from specmd_jax.report.reader import ROWS, read_manifest, read_rows
from specmd_jax.report.rows import number

QUALITY = "quality"
"""The folder, below the page's, of what trained models read: a folder of results for each."""
RULES = (
    "A case is one trace and setting on which a claim can be tested. It agrees if it lies on the paper's side of no "
    "effect and is no fainter than a fiftieth of the paper's effect; it is close if it also lies within a factor of "
    "two of the paper's range. Reproduced: at least two thirds of the cases are close (a claim without a number: all "
    "hold). Reproduced in direction: at least two thirds agree. Contradicted: fewer. Not testable here: no case."
)


def draw(out: Path) -> str:
    """Writes report.md, report.html and figures/*.png into `out`; gives the verdicts as text for a terminal."""
    manifest, rows = read_manifest(out), read_rows(out)
    read = [path.parent for path in sorted((out / QUALITY).glob(f"*/{ROWS}"))]
    results = Results(rows, [row for folder in read for row in read_rows(folder)])
    groups: dict[str, list[str]] = {}
    for trace, evidence in results.evidence.items():
        groups.setdefault(evidence, []).append(trace)
    trained = list(dict.fromkeys(str(row["model"]) for row in results.quality))
    judged = groups | ({EVIDENCE: trained} if trained else {})
    found = views.judged(results, judged)
    page = Document(views.title(found), manifest)
    if not all(read_manifest(folder)["complete"] for folder in read):
        page.warning("The run that lets a trained model read did not finish. The same command continues it.")
    page.answer(views.answer(found))
    config = manifest["config"]
    page.text(
        "Every number below is simulated, but for quality on held-out text, which is measured: on "
        f"{config['hardware']} (a link of 5 GB/s), batch 1, one pool of experts, capacities in % of the bytes of all "
        "experts at 16 bits while experts are stored at 4 or 8 (so 5 % holds 20 % or 10 % of them). The paper measured "
        "one "
        "A100. Its models have no public traces: "
        f"{config['requests']} requests of {config['prompt_tokens']} prompt and {config['decode_tokens']} decoded "
        f"tokens each were "
        "made up in their shapes; recorded traces are other models. Tables give C/T, the cache size over what one "
        "token needs."
    )
    _traces(page, results, rows)
    views.fill(page, results, rows, found)
    page.heading("Verdicts")
    page.text(RULES)
    lines = _verdicts(page, results, judged)
    for section in (
        sections.collisions,
        sections.prefetch,
        sections.reading,
        sections.miss_rules,
        sections.mixes,
        sections.drop_ins,
        sections.rankings,
    ):
        section(page, results, groups, out)
    for folder in read:
        _quality(page, read_rows(folder), read_manifest(folder)["config"], out)
    paths = page.save(out)
    return "\n".join([views.title(found), *lines, *map(str, paths)])


def _quality(page: Document, rows: Sequence[Row], config: dict[str, Any], out: Path) -> None:
    """Adds what a trained model reads under every rule."""
    name = str(rows[0]["model"])
    page.heading(f"Quality on held-out text: {name}")
    page.text(quality.about(rows, config))
    quality.views(page, rows)
    page.table(quality.HEAD, quality.cells(rows))
    page.picture(save(picture(rows), out, f"quality_{Path(name).name}"), "Quality against speed")


def _traces(page: Document, results: Results, rows: Sequence[Row]) -> None:
    body = []
    for trace, evidence in results.evidence.items():
        row = next(r for r in rows if r["trace"] == trace and r["layer"] is None)
        cycles = {bits: results.get(trace, Point(bits=(float(bits),)), MIDDLE) for bits in results.bits}
        shown = ", ".join(f"{number(r, 'cycles'):.2f} ({bits} bit)" for bits, r in cycles.items() if r is not None)
        body.append([trace, evidence, f"{number(row, 'tokens'):,.0f}", percent(100 * number(row, "repeat")), shown])
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
                    span = f"{short(found.median)}{unit} [{short(found.least)}, {short(found.most)}], {span}"
            cells += [found.verdict, span]
            said.append(f"{found.verdict} ({span})")
        body.append(cells)
        lines.append(f"{claim.text}\n    " + "\n    ".join(f"{e}: {s}" for e, s in zip(groups, said, strict=True)))
    page.table(head, body)
    return lines
