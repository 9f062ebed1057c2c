"""The rules of verdicts on made-up cases, and the paper's claims on made-up rows."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from specmd_jax.policies import MISS
from specmd_jax.report.columns import Row
from specmd_jax.report.document import STRONG, Document
from specmd_jax.report.pages.least_stale.findings import spans
from specmd_jax.report.pages.paper import numbers as paper
from specmd_jax.report.pages.paper.cases import nothing
from specmd_jax.report.pages.paper.claims import CLAIMS, Claim
from specmd_jax.report.pages.paper.points import MIXES, ON_LOGITS, READING, RECORDED, SYNTHETIC, SYSTEMS, Point
from specmd_jax.report.pages.paper.results import Results, best, drop_in
from specmd_jax.report.verdicts import (
    CONTRADICTED,
    DIRECTION,
    REPRODUCED,
    UNTESTABLE,
    Case,
    cut_pct,
    held,
    judge,
    kendall,
    ratio,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.common.paper_plan import COLUMNS


def times(*values: float) -> list[Case]:
    """Cases of "2 to 8 times fewer"."""
    return [Case("case", value, 2.0, 8.0, 1.0) for value in values]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((2.0, 5.0, 8.0), REPRODUCED),
        ((1.1, 5.0, 16.0), REPRODUCED),  # the range widened by two, on the right side of 1
        ((0.99, 5.0, 8.0), REPRODUCED),  # two of three
        ((0.99, 17.0, 8.0), DIRECTION),  # two of three agree, one is close
        ((17.0, 20.0, math.inf), DIRECTION),
        ((0.5, 0.9, 5.0), CONTRADICTED),
        ((1.0, 1.0, 5.0), CONTRADICTED),  # no effect is not agreement
        ((), UNTESTABLE),
        ((math.nan,), UNTESTABLE),
        ((math.nan, 5.0), REPRODUCED),
    ],
)
def test_verdict_of_a_ratio(values: tuple[float, ...], verdict: str) -> None:
    assert judge(times(*values)).verdict == verdict


def test_a_negative_finding_of_the_paper_keeps_its_sign() -> None:
    assert Case("", -4.0, -4.3, -4.3, 0.0).close
    assert not Case("", 4.0, -4.3, -4.3, 0.0).agrees
    assert not Case("", -0.05, -4.3, -4.3, 0.0).agrees  # too faint
    assert Case("", -40.0, -4.3, -4.3, 0.0).agrees and not Case("", -40.0, -4.3, -4.3, 0.0).close


def test_a_level_has_no_direction() -> None:
    far, near = Case("", 30.0, 8.0, 12.0, None), Case("", 20.0, 8.0, 12.0, None)
    assert judge([far] * 3).verdict == CONTRADICTED
    assert judge([near] * 3).verdict == REPRODUCED


@pytest.mark.parametrize(
    ("holds", "verdict"), [("yyy", REPRODUCED), ("yyn", DIRECTION), ("ynn", CONTRADICTED), ("", UNTESTABLE)]
)
def test_verdict_without_a_number(holds: str, verdict: str) -> None:
    assert judge([held("case", it == "y") for it in holds], with_number=False).verdict == verdict


def test_judged_counts() -> None:
    found = judge(times(0.5, 3.0, 100.0, math.nan))
    assert (found.cases, found.agree, found.close) == (3, 2, 1)
    assert (found.median, found.least, found.most) == (3.0, 0.5, 100.0)
    assert judge(times(5.0, math.inf)).median == math.inf


def test_comparisons() -> None:
    assert ratio(6, 3) == 2 and ratio(1, 0) == math.inf and math.isnan(ratio(0, 0))
    assert cut_pct(200, 150) == 25 and math.isnan(cut_pct(0, 1))
    assert kendall([1, 2, 3], [10, 20, 30]) == 1 and kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert math.isnan(kendall([1], [1]))


def row(trace: str, point: Point, pct: float, **numbers: float | None) -> Row:
    found: Row = {name: 0 if column.kind == "int" else 0.0 for name, column in COLUMNS.items() if column.kind != "str"}
    found |= {
        "trace": trace,
        "evidence": SYNTHETIC,
        **point.columns(),
        "capacity_pct": pct,
        "layer": None,
        "demand": 100,
    }
    return found | numbers


def claim(text: str) -> Claim:
    return next(c for c in CLAIMS if c.text.startswith(text))


def test_a_claim_about_collisions_follows_the_rows() -> None:
    def results(lru: int, least_stale: int) -> Results:
        return Results(
            row("M", Point(name, bits=(bits,)), 5.0, collisions=count)
            for name, count in (("lru", lru), ("least_stale", least_stale))
            for bits in (4.0, 8.0)
        )

    few = claim("At 5 % Least-Stale (cyclic) has fewer collisions than LRU")
    assert few.judge(results(50, 10), ["M"]).verdict == REPRODUCED
    assert few.judge(results(500, 10), ["M"]).verdict == DIRECTION
    assert few.judge(results(10, 50), ["M"]).verdict == CONTRADICTED
    assert few.judge(results(0, 0), ["M"]).verdict == UNTESTABLE
    assert few.judge(results(50, 10), ["other"]).verdict == UNTESTABLE


def test_the_claim_on_hits_is_judged_under_each_reading() -> None:
    mine = replace(READING, eviction="least_stale")
    found = {(4.0, 2.4): 0.93, (4.0, 0.0): 0.6, (16.0, 2.4): 0.3}
    results = Results(
        row("M", replace(mine, bits=(bits,), software_ms=ms), 5.0, hit_rate=hits) for (bits, ms), hits in found.items()
    )
    claims = [c for c in CLAIMS if c.text.startswith("The same, read as: ") and "slots" in c.text]
    assert [c.judge(results, ["M"]).verdict for c in claims] == [REPRODUCED, CONTRADICTED, CONTRADICTED]
    assert [c.judge(results, ["other"]).verdict for c in claims] == [UNTESTABLE] * 3


def test_drop_in_is_the_change_of_ttft_and_of_tpot_without_prompts() -> None:
    point = SYSTEMS["MixtureCache"]
    pair = (point, replace(point, eviction="least_stale"))
    timed = Results(row("M", p, 5.0, ttft_s=t, tpot_s=1.0) for p, t in zip(pair, (2.0, 1.5), strict=True))
    assert drop_in("MixtureCache", "M", timed) == pytest.approx(25)
    decode = Results(row("M", p, 5.0, ttft_s=None, tpot_s=t) for p, t in zip(pair, (2.0, 2.5), strict=True))
    assert drop_in("MixtureCache", "M", decode) == pytest.approx(-25)
    assert math.isnan(drop_in("Zhu", "M", timed))


def test_only_recorded_routing_has_stand_ins() -> None:
    plain = Point()
    for evidence, found in ((SYNTHETIC, False), (RECORDED, True)):
        results = Results([row("M", plain, 5.0) | {"evidence": evidence}])
        assert (results.get("M", SYSTEMS["MixtureCache"], 5.0) is not None) == found


def test_recorded_routing_lacks_what_the_rules_on_logits_need() -> None:
    assert set(ON_LOGITS) == {name for name, rule in MISS.items() if rule().needs_logits}


def test_best_leaves_out_capacities_where_all_tie() -> None:
    results = Results(
        row("M", Point(name), pct, misses=misses)
        for pct, counts in ((1.0, (9, 7)), (5.0, (5, 6)), (25.0, (3, 3)))
        for name, misses in zip(("lru", "lfu"), counts, strict=True)
    )
    assert [best(results, "M", Point(), pct) for pct in (1.0, 5.0, 25.0)] == [("lfu",), ("lru",), None]
    assert claim("The best eviction at 1 %").judge(results, ["M"]).verdict == REPRODUCED


def test_the_papers_own_numbers_reproduce_it() -> None:
    rows = []
    for model in paper.MODELS:
        for name, point in MIXES.items():
            ttft_ms, per_s = paper.MIX_TTFT_MS_AND_TOKENS_PER_S[name][model]
            rows.append(row(model, point, 5.0, ttft_s=ttft_ms / 1e3, tokens_per_s=per_s))
        for system, point in SYSTEMS.items():
            rows.append(
                row(model, replace(point, eviction="least_stale"), 5.0, ttft_s=paper.TTFT_MS[system][model][1] / 1e3)
            )
    results = Results(rows)
    judged = [c for c in CLAIMS if c.section in ("Five mixes", "Drop-in") and c.cases is not nothing]
    assert len(judged) == 9
    for each in judged:
        assert each.judge(results, paper.MODELS).verdict == REPRODUCED, each.text


def test_spans_name_where_a_reading_wins() -> None:
    text = spans([(0.5, -30.0), (0.8, -12.0), (1.0, 0.5), (2.0, 4.0)])
    assert text == "wins at C/T 0.50 to 0.80 (up to -30 %), ties at C/T 1.00, loses at C/T 2.00 (up to +4 %)"


def test_a_document_is_the_same_in_both_forms(tmp_path: Path) -> None:
    page = Document("A & B", {"complete": True, "config": {"traces": ["x", "y"]}})
    page.table(("x", "y"), [["a|b", "1 < 2"], ["c", "3"]], {1: STRONG})
    page.warning("few & old")
    markdown, html = (path.read_text() for path in page.save(tmp_path))
    assert "| a\\|b | 1 < 2 |" in markdown
    assert "<td>1 &lt; 2</td>" in html and "A &amp; B" in html
    assert "| **c** | **3** |" in markdown and '<tr class="strong"><td>c</td><td>3</td></tr>' in html
    assert "**few & old**" in markdown and '<p class="warning">few &amp; old</p>' in html
    assert "- setting traces: x, y" in markdown and "<dt>setting traces</dt><dd>x, y</dd>" in html
