"""The page of `experiments.paper`, drawn from its table alone: verdicts, tables and pictures."""

from __future__ import annotations

from pathlib import Path

from specmd_jax.report.document import Document
from specmd_jax.report.pages.paper import sections
from specmd_jax.report.pages.paper.results import Results
from specmd_jax.report.reader import read_manifest, read_rows

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
    page = Document("SpecMD's claims, simulated", manifest)
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
    sections.traces(page, results, rows)
    page.heading("Verdicts")
    page.text(RULES)
    lines = sections.verdicts(page, results, groups)
    for section in (
        sections.collisions,
        sections.prefetch,
        sections.miss_rules,
        sections.mixes,
        sections.drop_ins,
        sections.rankings,
    ):
        section(page, results, groups, out)
    paths = page.save(out, "paper")
    return "\n".join([*lines, *map(str, paths)])
