"""What routing is like, by hand: reuse, overlap, evenness, domains; and what is said of a trace beside others."""

from __future__ import annotations

import numpy as np
import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.report.columns import Row
from specmd_jax.report.pages.routing.compared import compare, off
from specmd_jax.report.pages.routing.page import alone, specialised, verdicts
from specmd_jax.report.pages.routing.table import COLUMNS
from specmd_jax.trace import measures, synthesize
from specmd_jax.trace.locality import lru_hits
from specmd_jax.trace.prompts import without_prompts
from specmd_jax.types import Trace


def routed(*tokens: list[int], lengths: tuple[int, ...] = (), prompts: tuple[int, ...] = (), experts: int = 4) -> Trace:
    """One layer; each token names its experts."""
    lengths = lengths or (len(tokens),)
    return Trace(
        np.array(tokens, np.int16)[:, None, :],
        np.array(lengths, np.int32),
        np.array(prompts or [0] * len(lengths), np.int32),
        experts,
        np.full(1, 8, np.int64),
    )


def test_reuse_counts_other_experts_and_tokens_in_between() -> None:
    found = measures.reuse(routed([0, 1], [0, 2], [3, 2], [1, 0], [1, -1], lengths=(4, 1)))
    new = measures.NEW
    # 1 comes back after 0, 2 and 3 were used, 0 after 2 and 3; the second request begins anew
    assert found.experts[:, 0].tolist() == [[new, new], [0, new], [new, 0], [3, 2], [new, new]]
    assert found.tokens[:, 0].tolist() == [[new, new], [1, new], [new, 1], [3, 2], [new, new]]


def test_lru_hits_what_is_near_and_misses_what_is_far() -> None:
    trace = synthesize(layers=3, experts=16, top_k=2, tokens=200, requests=1, seed=3)
    found = measures.reuse(trace)
    again = found.experts != measures.NEW
    for slots in (4, 8, 12):
        sure = (again & (found.experts + trace.top_k <= slots)).mean()
        perhaps = (again & (found.experts < slots)).mean()
        assert sure <= lru_hits(trace, slots) <= perhaps < 1


def test_overlap_by_lag_and_by_chance() -> None:
    trace = routed([0, 1], [1, 2], [0, 1], [2, 3], [3, 2], lengths=(4, 1))
    assert measures.overlap(trace, 1)[0] == pytest.approx((1 + 1 + 0) / 6)
    assert measures.overlap(trace, 2)[0] == pytest.approx((2 + 1) / 4)
    assert np.isnan(measures.overlap(trace, 4)[0])
    # uses 2, 3, 3, 2 of 5 tokens
    assert measures.chance_overlap(trace)[0] == pytest.approx((4 + 9 + 9 + 4) / 25 / 2)


def test_evenness_of_uniform_routing_is_one_and_of_one_expert_zero() -> None:
    draw = np.random.default_rng(5)
    uniform = routed(*(draw.permutation(16)[:2].tolist() for _ in range(640)), experts=16)
    assert measures.evenness(uniform)[0] == pytest.approx(1, abs=0.01)
    in_time = measures.evenness_in_time(uniform, 32)
    assert in_time.shape == (20, 1) and in_time.mean() == pytest.approx(1, abs=0.02)
    one = routed(*[[0]] * 8)
    assert measures.evenness(one)[0] == 0
    assert measures.entropy_bits([2, 2, 4, 0]) == pytest.approx(1.5)
    assert measures.evenness_in_time(one, 9).shape == (0, 1)


def test_domains_weigh_alike_and_chance_deals_requests() -> None:
    tokens = [[0], [0], [0], [1], [2], [2], [2], [2]]
    trace = routed(*tokens, lengths=(2, 2, 1, 3))
    found = measures.domains(trace, np.array(["a", "a", "b", "b"]))
    assert found.names == ("a", "b")
    np.testing.assert_allclose(found.shares[0, :3], [[1, 0], [1, 0], [0, 1]])
    assert np.isnan(found.shares[0, 3]).all()  # never used
    assert found.bits[0] == pytest.approx(1) and 0 < found.chance_bits[0] < 1
    mixed = measures.domains(routed([0], [1], [0], [1], lengths=(2, 2)), np.array(["a", "b"]))
    assert mixed.bits[0] == pytest.approx(0) and np.isnan(mixed.chance_bits[0])
    with pytest.raises(SpecmdError, match="1 domain, expected at least 2"):
        measures.domains(trace, np.array(["a"] * 4))


def test_prompts_are_left_out() -> None:
    trace = routed([0], [1], [2], [3], lengths=(2, 1, 1), prompts=(1, 1, 0))
    found = without_prompts(trace)
    assert found.expert_ids.ravel().tolist() == [1, 3]
    assert found.lengths.tolist() == [1, 1] and not found.prompt_lengths.any()
    with pytest.raises(SpecmdError, match="no request has decoded tokens"):
        without_prompts(routed([0], prompts=(1,)))


# ------------------------------------------------------------------------------------------------- what is said of it


def _rows(trace: str, **values: float) -> list[Row]:
    places = {"overlap": 1.0, "reuse within": 0.25, "recall": 1.0}
    blank: Row = dict.fromkeys(COLUMNS)
    return [
        blank
        | {"trace": trace, "measure": measure, "value": value, "place": places.get(measure)}
        | ({"policy": "previous"} if measure == "recall" else {})
        for measure, value in ((name.replace("_", " "), value) for name, value in values.items())
    ]


def test_like_is_within_the_others_or_a_tenth_beyond() -> None:
    rows = [
        *_rows("mine", overlap=0.43, reuse_within=0.5, evenness=0.2, recall=0.5),
        *_rows("big", overlap=0.3, reuse_within=0.7, recall=0.25),
        *_rows("other", overlap=0.4, reuse_within=0.8, recall=0.5),
    ]
    told = compare(rows)
    assert [(it.measure.words[:12], it.like) for it in told] == [
        ("uses whose l", False), ("a token's ex", True), ("recall of th", True),
    ]  # fmt: skip
    assert off(told, "big") == pytest.approx(0.43 / 0.3 - 1)
    said = [text for text, _ in verdicts("mine", told)]
    assert (
        said[0]
        == "mine is like the others in: a token's experts that the token before used, too, 43 % (others 30 to 40 %)."
    )
    assert said[1].startswith(
        "mine is below the others in: uses whose last use is within a quarter of the experts, 50 %"
    )
    assert said[-1].startswith("Nearest is other: over these measures mine is 7 % off in the median")
    assert compare(rows[:4]) == []
    assert [text for text, _ in alone(rows, "big")] == [
        "big: uses whose last use is within a quarter of the experts, 70 %; a token's experts that the token before "
        "used, too, 30 %.",
        "big: recall of the last token's experts (previous), 25 %.",
    ]


def test_specialised_experts_are_counted() -> None:
    blank: Row = dict.fromkeys(COLUMNS) | {"trace": "mine", "measure": "domain share", "layer": 0}
    shares = [blank | {"expert": e, "domain": d, "value": v} for e, d, v in
              ((0, "a", 0.9), (0, "b", 0.1), (1, "a", 0.5), (1, "b", 0.5))]  # fmt: skip
    rows = [*shares, *_rows("mine", domains=2.0, domain_bits=0.25)]
    ((text, evidence),) = specialised(rows, "mine")
    assert text == (
        "Of mine's experts 50 % have more than half of their use from one of 2 domains (evenly it would be 50 % each); "
        "an expert that is used says 0.25 of 1.00 bits about the domain."
    )
    assert evidence == "measured" and specialised(rows, "other") == []
